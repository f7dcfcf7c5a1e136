"""The architectures by their names, and their options."""

import dataclasses
from dataclasses import dataclass

from cnn_jax.errors import UsageError, suggest
from cnn_jax.models.classifier import ImageClassifier
from cnn_jax.models.cnn import CNN
from cnn_jax.models.resnet import ResNet18, ResNet34, ResNet50
from cnn_jax.models.resnet9 import ResNet9
from cnn_jax.models.small import SmallCNN
from cnn_jax.models.wide_resnet import WideResNet
from cnn_jax.settings import Dimension, Fraction, InvalidSettingError, Settings

MODELS: dict[str, type[ImageClassifier]] = {
    model.NAME: model for model in (CNN, SmallCNN, ResNet9, ResNet18, ResNet34, ResNet50, WideResNet)
}


@dataclass(frozen=True, kw_only=True)
class _Options(Settings):
    """What a model may have a field for; None for the model's default."""

    depth: Dimension | None = None
    width: Dimension | None = None
    dropout: Fraction | None = None


def create_model(
    name: str,
    num_classes: int,
    portable: bool = False,
    *,
    depth: int | None = None,
    width: int | None = None,
    dropout: float | None = None,
    freeze_backbone: bool = False,
) -> ImageClassifier:
    """The architecture with this name and one logit per class.

    Equal arguments give equal models with equal hashes, so that a model can be a static argument of ``jax.jit``.

    Args:
        name: a key of ``MODELS``.
        num_classes: number of logits.
        portable: see ``Conv``.
        depth: number of layers, as the model counts them; here and below, None for the model's default.
        width: factor of the number of channels.
        dropout: probability that dropout sets a number to zero.
        freeze_backbone: see ``ImageClassifier``.

    Raises:
        UsageError: there is no architecture with this name, it lacks an option, or an option is out of bounds.
    """
    if name not in MODELS:
        raise UsageError(f"unknown model {name!r}{suggest(name, MODELS)}; known: {', '.join(MODELS)}")
    try:
        options = dataclasses.asdict(_Options(depth=depth, width=width, dropout=dropout))
    except InvalidSettingError as error:
        raise UsageError(f"--model-{error.name} {error.problem}") from None
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in model_options(name):
            having = ", ".join(other for other in MODELS if option in model_options(other))
            raise UsageError(f"the network {name} has no --model-{option}: leave it out, or choose one of: {having}")
    return MODELS[name](num_classes=num_classes, portable=portable, freeze_backbone=freeze_backbone, **given)


def model_options(name: str) -> dict[str, int | float]:
    """The options that a model has, of ``depth``, ``width`` and ``dropout``, and their defaults.

    Args:
        name: a key of ``MODELS``.
    """
    options = {field.name for field in dataclasses.fields(_Options)}
    return {field.name: field.default for field in dataclasses.fields(MODELS[name]) if field.name in options}
