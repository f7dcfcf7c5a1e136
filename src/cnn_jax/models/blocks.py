"""What several residual networks are built of."""

from cnn_jax.models.conv import Conv
from cnn_jax.models.layers import kaiming_normal_fan_out


def conv(features: int, kernel: int, stride: int, portable: bool, name: str) -> Conv:
    """A convolution before batch normalization, which makes a bias superfluous, and ReLU, which the variance is for.

    Args:
        features: number of output channels.
        kernel: its size, an odd number.
        stride: the output is as large as the input, divided by the stride and rounded up.
        portable: see ``Conv``.
        name: the layer's name.
    """
    pad = (kernel // 2, kernel // 2)
    return Conv(
        features,
        (kernel, kernel),
        (pad, pad),
        portable=portable,
        strides=(stride, stride),
        use_bias=False,
        kernel_init=kaiming_normal_fan_out,
        name=name,
    )
