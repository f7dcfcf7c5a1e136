"""Layers with PyTorch's initialization and statistics, and what they need to know about the batch."""

import functools
import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class BatchContext:
    """What layers that behave differently in training know about the batch; None stands for inference.

    A pytree with ``axis_name`` as static data, so that it can be an argument of ``jax.jit``, ``nn.remat`` or a scan.

    Attributes:
        positions: int32 ``[N]``, the place of each example in the whole batch, of which this device may hold a part.
        mask: bool ``[N]``, false for padding.
        axis_name: the mapped axis over the devices that share the batch, if there are several.
    """

    positions: jax.Array
    mask: jax.Array
    axis_name: str | None = flax.struct.field(pytree_node=False, default=None)

    def num_examples(self) -> jax.Array:
        """The number of real examples in the whole batch, as float32."""
        return self._sum_over_devices(self.mask.astype(jnp.float32).sum())

    def mean(self, x: jax.Array) -> jax.Array:
        """The mean of ``x`` over all real examples of the whole batch, in float32 or, if ``x`` is, float64.

        A device's part of the batch may be all padding, so sums and counts are added up over the devices, not means.
        The result is NaN if the whole batch is padding.

        Args:
            x: ``[N, ...]``; whatever it holds for padding does not count.

        Returns:
            ``x`` without its first axis.
        """
        mask = self.mask.reshape(-1, *[1] * (x.ndim - 1))
        total = jnp.where(mask, x.astype(accumulator_dtype(x.dtype)), 0).sum(0)
        return self._sum_over_devices(total) / self.num_examples()

    def keys(self, key: jax.Array) -> jax.Array:
        """One random key per example, which does not depend on how the batch is divided among devices."""
        return jax.vmap(jax.random.fold_in, (None, 0))(key, self.positions)

    def _sum_over_devices(self, x: jax.Array) -> jax.Array:
        return x if self.axis_name is None else jax.lax.psum(x, self.axis_name)


def uniform_fan_in(fan_in: int) -> nn.initializers.Initializer:
    """Initializer that draws from the uniform distribution on ±1/sqrt(fan_in).

    PyTorch's default for the weights and biases of ``nn.Linear`` and ``nn.Conv2d`` (LeCun et al., "Efficient
    BackProp", 1998). The standard deviation is ``1 / sqrt(3 fan_in)``.

    Args:
        fan_in: the number of inputs that each output unit sums over.
    """
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def kaiming_normal_fan_out(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Initializer that draws a kernel ``[H, W, I, O]`` from the normal distribution with variance ``2 / (H W O)``.

    With it, a network with ReLU neither amplifies nor attenuates gradients (He et al.,
    https://arxiv.org/abs/1502.01852). It is ``torch.nn.init.kaiming_normal_(mode="fan_out")``, which does not truncate.
    """
    return nn.initializers.variance_scaling(2.0, "fan_out", "normal")(key, shape, dtype)


def promote(*arrays: jax.Array, dtype: jnp.dtype | None) -> list[jax.Array]:
    """The arrays cast to ``dtype``, or if it is None to the float type that they promote to, also in strict mode."""
    with jax.numpy_dtype_promotion("standard"):
        return nn.dtypes.promote_dtype(*arrays, dtype=dtype)


def accumulator_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The type to add up numbers of ``dtype`` in: at least float32."""
    return jnp.dtype(jnp.float32) if jnp.dtype(dtype).itemsize < 4 else jnp.dtype(dtype)


def add_bias(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    """``x + bias`` in the type of ``x``, for a bias of as many dimensions; ``x`` itself if the bias is None.

    The addition is done in float32 even for a bfloat16 ``x``. Autodiff sums the bias's gradient in the type of the
    addition, and a long sum in bfloat16 is wrong: adding ones stops at 256.
    """
    if bias is None:
        return x
    wide = accumulator_dtype(x.dtype)
    return (x.astype(wide) + bias.astype(wide)).astype(x.dtype)


class Dense(nn.Module):
    """``x @ kernel + bias`` with the parameters of ``flax.linen.Dense``, initialized as in ``torch.nn.Linear``.

    Attributes:
        features: size of the output's last axis.
        dtype: type of the computation and the result; None promotes the types of the input and the parameters.
    """

    features: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., I]`` to ``[..., features]``."""
        init = uniform_fan_in(x.shape[-1])
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        bias = self.param("bias", init, (self.features,))
        x, kernel = promote(x, kernel, dtype=self.dtype)
        return add_bias(jnp.dot(x, kernel), bias.reshape(*[1] * (x.ndim - 1), -1))


class BatchNorm(nn.Module):
    """Batch normalization over all axes but the last, as ``torch.nn.BatchNorm2d``.

    In training, the mean and variance are those of all real examples of the whole batch, on however many devices it
    is. In inference, they are the running averages in the collection ``batch_stats``, into which the variance goes
    unbiased (divided by n - 1), as in PyTorch and unlike ``flax.linen.BatchNorm``. The computation is in float32, or in
    float64 if the input is.

    Attributes:
        momentum: weight of the old value in the running averages: one minus PyTorch's ``momentum``.
        epsilon: added to the variance.
        portable: compute the same on all platforms, for a program exported to all of them at once.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    portable: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, batch: BatchContext | None = None) -> jax.Array:
        """``[N, ..., C]`` to the same shape and type; with ``batch``, ``batch_stats`` must be mutable."""
        features = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, features)
        bias = self.param("bias", nn.initializers.zeros, features)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, features)
        running_var = self.variable("batch_stats", "var", jnp.ones, features)

        arrays = (x, scale, bias, running_mean.value, running_var.value)
        normalize = functools.partial(_normalize, batch=batch, epsilon=self.epsilon)
        if self.portable:
            y, mean, var = normalize(*arrays)
        else:  # on CPUs, the batch is last, as in ``Conv``: two transpositions next to each other cancel
            y, mean, var = jax.lax.platform_dependent(
                *arrays, cpu=functools.partial(normalize, batch_last=True), default=normalize
            )
        if batch is not None and not self.is_initializing():
            n = batch.num_examples() * math.prod(x.shape[1:-1])
            unbiased = var * (n / jnp.maximum(n - 1, 1))
            weight = jnp.where(n > 1, 1 - self.momentum, 0)  # a single number has no variance
            running_mean.value += weight * (mean - running_mean.value)
            running_var.value += weight * (unbiased - running_var.value)
        return y


def _normalize(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    *,
    batch: BatchContext | None,
    epsilon: float,
    batch_last: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalize ``[N, ..., C]``; return the result, and the mean and variance: those given, or in training of ``x``."""
    dtype = accumulator_dtype(x.dtype)
    order = (x.ndim - 1, *range(1, x.ndim - 1), 0) if batch_last else tuple(range(x.ndim))
    examples, features, pixels = order.index(0), order.index(x.ndim - 1), tuple(range(1, x.ndim - 1))

    def along_features(values: jax.Array) -> jax.Array:
        return jnp.expand_dims(values.astype(dtype), [axis for axis in range(x.ndim) if axis != features])

    def mean_of(values: jax.Array) -> jax.Array:
        # Averaging each example first is more precise than one long sum, and needs the mask only for what is left.
        means = values.mean(pixels)
        return batch.mean(means.T if examples else means)

    wide = x.transpose(order).astype(dtype)
    if batch is not None:
        mean = mean_of(wide)
    centered = wide - along_features(mean)
    if batch is not None:
        # E[x^2] - E[x]^2 would need one pass, but cancels: a mean of 1000 standard deviations leaves no digit.
        var = mean_of(jnp.square(centered))
    factor = scale.astype(dtype) * jax.lax.rsqrt(var.astype(dtype) + epsilon)
    y = centered * along_features(factor) + along_features(bias)
    return y.astype(x.dtype).transpose(order), mean, var


class Dropout(nn.Module):
    """In training, sets each number to zero with probability ``rate`` and divides the others by ``1 - rate``.

    The random numbers come from the generator ``dropout``. They depend on an example's place in the whole batch, not
    on the number of devices.

    Attributes:
        rate: at least 0 and less than 1.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, batch: BatchContext | None = None) -> jax.Array:
        """``[N, ...]`` to the same shape and type; without ``batch``, ``x`` itself.

        Raises:
            ValueError: ``rate`` is not in [0, 1).
        """
        if not 0 <= self.rate < 1:
            raise ValueError(f"dropout rate must be at least 0 and less than 1, got {self.rate}")
        if batch is None or self.rate == 0:
            return x
        keys = batch.keys(self.make_rng("dropout"))
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, x.shape[1:]))(keys)
        return jnp.where(kept, x / (1 - self.rate), 0)
