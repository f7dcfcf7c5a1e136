"""The state that training carries from step to step."""

from collections.abc import Callable
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState


@cache
def optimizer(learning_rate: float) -> optax.GradientTransformation:
    """Adam (Kingma & Ba, https://arxiv.org/abs/1412.6980); its other constants are the paper's, as in PyTorch.

    The same object for the same rate: a state carries it as part of its type, and a program compiled for one state
    takes another only if they agree in it.
    """
    return optax.adam(learning_rate)


def create_train_state(
    model: nn.Module, image_shape: tuple[int, int, int], learning_rate: float, key: jax.Array
) -> TrainState:
    """Initial parameters and optimiser state, at step 0.

    Args:
        model: maps float32 images ``[N, H, W, C]`` to logits.
        image_shape: ``(H, W, C)``.
        learning_rate: Adam's.
        key: determines the parameters.

    Raises:
        UsageError: the images are too small for the model.
    """
    return _compiled_init(model, image_shape, learning_rate)(key)


def abstract_train_state(model: nn.Module, image_shape: tuple[int, int, int], learning_rate: float) -> TrainState:
    """What ``create_train_state`` returns, as shapes and dtypes.

    Raises:
        UsageError: the images are too small for the model.
    """
    return jax.eval_shape(_init(model, image_shape, learning_rate), jax.random.key(0))


@cache
def _compiled_init(
    model: nn.Module, image_shape: tuple[int, int, int], learning_rate: float
) -> Callable[[jax.Array], TrainState]:
    # XLA's CPU compiler takes seconds to optimise the generator of random numbers, which runs once.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(_init(model, image_shape, learning_rate), compiler_options=options)


def _init(
    model: nn.Module, image_shape: tuple[int, int, int], learning_rate: float
) -> Callable[[jax.Array], TrainState]:
    def init(key: jax.Array) -> TrainState:
        params = model.init(key, jnp.zeros((1, *image_shape)))["params"]
        state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer(learning_rate))
        # Of one type with a restored step, so that the training program is compiled once for both.
        return state.replace(step=jnp.zeros((), jnp.int32))

    return init
