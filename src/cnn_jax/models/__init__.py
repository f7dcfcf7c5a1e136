"""The architectures, by the names that ``--model`` takes."""

from functools import cache

import flax.linen as nn

from cnn_jax.errors import UsageError, suggest
from cnn_jax.models.cnn import CNN

MODELS: dict[str, type[nn.Module]] = {"cnn": CNN}


@cache
def create_model(name: str, num_classes: int, portable: bool = False) -> nn.Module:
    """The architecture of that name, with one logit a class; ``portable`` as of ``Conv``.

    The same object for the same arguments: programs are compiled for a model's ``apply``, and another object's is
    another function.

    Raises:
        UsageError: no such architecture.
    """
    if name not in MODELS:
        raise UsageError(f"unknown model {name!r}{suggest(name, MODELS)}; known: {', '.join(MODELS)}")
    return MODELS[name](num_classes=num_classes, portable=portable)
