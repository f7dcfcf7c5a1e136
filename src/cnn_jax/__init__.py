"""Image classification with CNNs in JAX and Flax: ``fit`` a ``Config``, ``resume`` a run, or ``load_run`` to use it."""

from importlib import import_module

from cnn_jax.config import Config
from cnn_jax.errors import CnnJaxError, UsageError

__all__ = ["CnnJaxError", "Config", "Dataset", "Run", "UsageError", "fit", "load_data", "load_run", "resume"]

__version__ = "0.1.0"

# jax takes a second to import, and numpy a tenth; a command that prints its help does not need them.
_IMPORTED_LATER = {
    "Dataset": ("cnn_jax.data", "Dataset"),
    "load_data": ("cnn_jax.data", "load"),
    "Run": ("cnn_jax.runs.run", "Run"),
    "load_run": ("cnn_jax.runs.run", "load_run"),
    "fit": ("cnn_jax.runs.fit", "fit"),
    "resume": ("cnn_jax.runs.fit", "resume"),
}


def __getattr__(name: str) -> object:
    if name not in _IMPORTED_LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _IMPORTED_LATER[name]
    return getattr(import_module(module), attribute)
