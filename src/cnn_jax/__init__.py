"""Image-classifying CNNs in JAX and Flax: ``fit`` a ``Config``, ``load_run`` what came of it."""

from cnn_jax.config import Config
from cnn_jax.data import load as load_data
from cnn_jax.errors import CnnJaxError, UsageError

__all__ = ["CnnJaxError", "Config", "Run", "UsageError", "fit", "load_data", "load_run"]


def __getattr__(name: str) -> object:
    # jax takes a second to import, which somebody who asks a command for help need not wait for.
    if name in {"Run", "fit", "load_run"}:
        from cnn_jax import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
