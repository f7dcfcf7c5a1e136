"""Image-classifying CNNs in JAX and Flax: ``fit`` a ``Config``, ``resume`` the run, ``load_run`` it and use it."""

from importlib import import_module

from cnn_jax.config import Config
from cnn_jax.data import Dataset
from cnn_jax.data import load as load_data
from cnn_jax.errors import CnnJaxError, UsageError

__all__ = ["CnnJaxError", "Config", "Dataset", "Run", "UsageError", "fit", "load_data", "load_run", "resume"]

# jax takes a second to import, and a command that prints its help does not need it.
_IMPORTED_LATER = {
    "Run": "cnn_jax.runs.run",
    "load_run": "cnn_jax.runs.run",
    "fit": "cnn_jax.runs.fit",
    "resume": "cnn_jax.runs.fit",
}


def __getattr__(name: str) -> object:
    if name not in _IMPORTED_LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_IMPORTED_LATER[name]), name)
