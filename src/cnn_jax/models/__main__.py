"""``python -m cnn_jax.models``: list the networks with their parameters, FLOPs and options."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cnn_jax import cli
from cnn_jax.errors import UsageError
from cnn_jax.settings import Channels, Count, Settings, Size, setting

if TYPE_CHECKING:
    from cnn_jax.models.classifier import ImageClassifier


@dataclass(frozen=True, kw_only=True)
class ModelsFlags(Settings):
    """Print a table of the networks that --model takes: their parameters, FLOPs and options.

    MFLOPs are millions of floating-point operations in the forward pass of one image, as XLA counts them: a
    multiplication and an addition are two, and those with the padding of a convolution do not count. The options are
    shown with their defaults, which both numbers are for.
    """

    image_size: Size = setting("the size of the images (default: 28 28)", default=(28, 28), metavar=("HEIGHT", "WIDTH"))
    channels: Channels = setting("their channels: grayscale (1) or color (3)", default=1)
    classes: Count = setting("the number of classes", default=10)


def main(args: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    flags = cli.parse(ModelsFlags, args, module="cnn_jax.models")
    cli.initialize_jax()
    # Slow imports come after the flags are parsed.
    from cnn_jax.models.registry import MODELS, create_model, model_options

    print(_line("model", "parameters", "MFLOPs", "options"))
    for name in MODELS:
        model = create_model(name, flags.classes, portable=True)  # XLA's convolution, whose operations XLA counts
        try:
            parameters, flops = _costs(model, (*flags.image_size, flags.channels))
        except UsageError:  # the images are too small
            print(f"{name:14}needs images of at least {model.MIN_SIDE}x{model.MIN_SIDE} pixels")
            continue
        options = " ".join(f"--model-{option} {default}" for option, default in model_options(name).items())
        print(_line(name, f"{parameters:,}", f"{flops / 1e6:,.1f}", options))
    return 0


def _line(name: str, parameters: str, megaflops: str, options: str) -> str:
    return f"{name:12}{parameters:>12}{megaflops:>10}  {options}".rstrip()


def _costs(model: "ImageClassifier", image_shape: tuple[int, int, int]) -> tuple[int, float]:
    """The number of a model's parameters, and XLA's count of the FLOPs of its forward pass; nothing is computed.

    Raises:
        UsageError: the images are too small for the model.
    """
    import jax
    import jax.numpy as jnp

    from cnn_jax.runs.run import count_parameters

    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    cost = jax.jit(model.apply).lower(variables, image).cost_analysis()
    return count_parameters(variables["params"]), cost["flops"]


if __name__ == "__main__":
    cli.start(main)
