"""The architectures, by the names that ``--model`` takes."""

import flax.linen as nn

from cnn_jax.errors import UsageError, suggest
from cnn_jax.models.cnn import CNN

MODELS: dict[str, type[nn.Module]] = {"cnn": CNN}


def create_model(name: str, num_classes: int, portable: bool = False) -> nn.Module:
    """The architecture with this name and one logit per class.

    Equal arguments give equal models with equal hashes, so that a model can be a static argument of ``jax.jit``.

    Args:
        name: a key of ``MODELS``.
        num_classes: number of logits.
        portable: see ``Conv``.

    Raises:
        UsageError: there is no architecture with this name.
    """
    if name not in MODELS:
        raise UsageError(f"unknown model {name!r}{suggest(name, MODELS)}; known: {', '.join(MODELS)}")
    return MODELS[name](num_classes=num_classes, portable=portable)
