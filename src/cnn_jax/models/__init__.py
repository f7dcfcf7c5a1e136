"""The architectures: ``create_model`` makes one by the name that ``--model`` takes, of those in ``MODELS``."""

from importlib import import_module

__all__ = ["MODELS", "create_model"]


def __getattr__(name: str) -> object:
    # jax takes a second to import; ``python -m cnn_jax.models --help`` does not need it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("cnn_jax.models.registry"), name)
