"""The settings that determine a run, as one flat record made of a part for each topic."""

import dataclasses
import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Self

import yaml

from cnn_jax.errors import UsageError, suggest
from cnn_jax.settings import (
    Channels,
    Count,
    Dimension,
    Duration,
    FilePath,
    Fraction,
    Name,
    NonNegative,
    Pixels,
    PositiveFraction,
    Probability,
    Rate,
    Seed,
    Settings,
    Size,
    Switch,
    choice,
    setting,
    show,
)

PRESETS = resources.files("cnn_jax") / "configs"
DETERMINISTIC_OPS = "--xla_gpu_deterministic_ops=true"
"""The flag in ``XLA_FLAGS`` that restricts XLA on GPUs to bitwise reproducible operations."""

MAX_LENGTH = 100_000
"""The maximum size of a config file in bytes."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """The examples to train and test on."""

    dataset: Name = setting(
        "fashion_mnist, mnist, kmnist, digits, tfds:NAME or folder:PATH; "
        "auto is fashion_mnist if available, else digits",
        default="auto",
    )
    data_dir: FilePath | None = setting(
        "where datasets are read from and downloaded to (default: $CNN_JAX_DATA_DIR, else the user's cache directory)",
        default=None,
        metavar="DIR",
        may_change=True,
    )
    cache_limit: NonNegative | None = setting(
        "gigabytes of disk for the decoded images of folder:PATH and tfds:NAME; those of a dataset that needs more are "
        "decoded whenever they are used (default: half of the free space)",
        default=None,
        metavar="GB",
        may_change=True,
    )
    image_size: Size | None = setting(
        "resize the images of folder:PATH (default: their own size, if all have the same)",
        default=None,
        metavar=("HEIGHT", "WIDTH"),
    )
    fit: choice("pad", "crop", "stretch") = setting(
        "how images of another aspect ratio are resized: pad adds a border in their background color, crop cuts off "
        "their edges, stretch distorts them; predict does the same",
        default="pad",
    )
    channels: Channels | None = setting(
        "read the images of folder:PATH as grayscale (1) or color (3) (default: color if any image is)", default=None
    )
    skip_unreadable: Switch = setting(
        "skip files in folder:PATH that cannot be read as images, and print how many", default=False, may_change=True
    )
    validation_fraction: Fraction = setting(
        "fraction of the training examples to hold out for validation, in every class alike", default=0.0
    )
    split_seed: Seed = setting(
        "determines which examples are held out for validation and, in folder:PATH, for testing", default=0
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """The network, its input, and where its weights start."""

    model: Name = setting("the network architecture; python -m cnn_jax.models lists them", default="cnn")
    model_depth: Dimension | None = setting(
        "number of layers: for small a multiple of 3, for wide_resnet 6n + 4 (default: the model's own)", default=None
    )
    model_width: Dimension | None = setting(
        "width of the layers, for models of any width (default: the model's own)", default=None
    )
    model_dropout: Fraction | None = setting(
        "dropout rate, for models with dropout (default: the model's own)", default=None
    )
    normalize: Switch = setting(
        "standardize the network's input: subtract the mean of the training images and divide by their standard "
        "deviation, in each channel; weights of --init-from bring their own mean and standard deviation",
        default=True,
    )
    init_from: FilePath | None = setting(
        "start from the weights of a run directory, a safetensors file, a PyTorch state_dict (.pt, .pth) or "
        "torchvision:NAME instead of random weights; a last layer for other classes is replaced",
        default=None,
        metavar="PATH",
    )
    freeze: choice("none", "backbone") = setting(
        "train all layers (none), or only the last one (backbone)", default="none"
    )
    tta: choice("none", "flip", "multicrop") = setting(
        "test-time augmentation: average the logits over the image and its mirror image (flip), and over shifts by "
        "one pixel too (multicrop); predict and exported programs do the same",
        default="none",
    )


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig(Settings):
    """Random changes of the training images, different in every epoch."""

    flip: choice("none", "random", "alternating") = setting(
        "mirror half of the images: chosen at random, or each in every other epoch (alternating)", default="none"
    )
    shift: Pixels = setting("shift images by up to N pixels in each direction, filled by reflection", default=0)
    random_resized_crop: PositiveFraction = setting(
        "crop images to a random part of at least this fraction of their area, and resize it", default=1.0
    )
    random_erasing: Probability = setting("probability of erasing a random rectangle", default=0.0)
    color_jitter: Fraction = setting("strength of random brightness, contrast and saturation", default=0.0)
    mixup: NonNegative = setting(
        "mix pairs of images and their labels, with weights from Beta(X, X); 0 mixes none", default=0.0
    )
    cutmix: NonNegative = setting(
        "replace a rectangle by that of another image, whose area is from Beta(X, X), and mix the labels; 0 is off",
        default=0.0,
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Settings):
    """How gradients change the parameters."""

    optimizer: choice("adam", "adamw", "sgd", "muon") = setting(
        "Adam, AdamW, SGD with Nesterov momentum, or Muon for all kernels but the last, with Adam for the rest",
        default="adam",
    )
    learning_rate: Rate = setting("the learning rate, or the highest one of a schedule", default=0.01)
    schedule: choice("constant", "linear", "cosine", "one-cycle") = setting(
        "the learning rate after the warm-up: constant, or falling to zero (almost, for one-cycle) until the end",
        default="constant",
    )
    warmup: Duration = setting(
        "raise the learning rate for this long at the start, such as '2 epochs' or '500 steps'", default="0 epochs"
    )
    weight_decay: NonNegative = setting(
        "decoupled weight decay of kernels, not of biases and normalization, for adamw, sgd and muon", default=0.0
    )
    momentum: Fraction = setting("momentum of sgd and muon", default=0.9)
    clip_norm: Rate | None = setting("scale gradients down to this norm", default=None)
    accumulate: Count = setting("update the parameters every N steps, with the mean of their gradients", default=1)
    average_decay: Fraction = setting(
        "evaluate an exponential moving average of the parameters with this decay per step; 0 is off", default=0.0
    )
    backbone_rate: Rate = setting("factor of the learning rate of all layers but the last", default=1.0)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Settings):
    """The course of training and what it writes."""

    epochs: Count = setting("passes over the training set", default=10, may_change=True)
    batch_size: Count = setting("examples per step", default=100)
    label_smoothing: Fraction = setting("probability that the training targets give to all classes alike", default=0.0)
    class_weights: choice("none", "balanced") = setting(
        "weight the loss of each class by the inverse of its number of training examples (balanced)", default="none"
    )
    precision: choice("default", "float32", "bfloat16") = setting(
        "precision of matrix products and convolutions: the device's default, which on GPUs and TPUs is faster and "
        "less accurate than float32; float32 on all devices; or bfloat16 on all devices, with float32 parameters and "
        "loss",
        default="default",
    )
    shuffle: Switch = setting("shuffle the training examples in every epoch, as determined by --seed", default=True)
    seed: Seed = setting(
        "determines the initial parameters, the order of the examples and all random changes", default=0
    )
    patience: Count | None = setting(
        "stop after N epochs without a better validation accuracy", default=None, may_change=True
    )
    target_accuracy: PositiveFraction | None = setting(
        "stop once the accuracy on the validation set, or on the test set without one, reaches this fraction; "
        "the exit status is 3 if it never does",
        default=None,
        may_change=True,
    )
    checkpoint_every: Count | None = setting(
        "save a checkpoint every N steps, in addition to one after every epoch", default=None, may_change=True
    )
    deterministic: Switch = setting(
        "make results bitwise reproducible on GPUs too, where this is slower; on CPUs and TPUs they always are",
        default=False,
    )
    tensorboard: Switch = setting("write TensorBoard event files to the run directory", default=False, may_change=True)


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig, OptimizerConfig, AugmentationConfig, ModelConfig, DataConfig):
    """The settings of a run.

    Raises:
        InvalidSettingError: a value of the wrong type or out of bounds.
    """

    @classmethod
    def of(cls, flags: Self) -> Self:
        """The settings alone of an instance of a subclass, such as the flags of a command."""
        return cls(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(cls)})

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str) -> Self:
        """Create a config from values by field name, and from defaults for the rest.

        Args:
            values: settings by field name.
            source: where they come from, for error messages.

        Raises:
            UsageError: unknown key (the nearest known one is suggested) or invalid value.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                shown = show(key)
                raise UsageError(f"{source}: unknown key {shown}{suggest(shown.strip(chr(39)), known)}")
        try:
            return cls(**values)
        except UsageError as error:
            raise UsageError(f"{source}: {error}") from None

    @classmethod
    def from_yaml(cls, source: str | Path) -> Self:
        """Read a YAML file, or a preset that comes with the package by its bare name.

        Raises:
            UsageError: no such file or preset, invalid YAML, or invalid settings.
        """
        path = Path(source)
        if not os.path.isfile(path) and path.name == str(source) and not path.suffix:  # noqa: PTH113 (never raises)
            path = PRESETS / f"{source}.yaml"
            if not os.path.isfile(path):  # noqa: PTH113
                presets = sorted(Path(preset.name).stem for preset in PRESETS.iterdir())
                raise UsageError(
                    f"no preset or file {str(source)!r}{suggest(str(source), presets)}; presets: {', '.join(presets)}"
                )
        try:
            with path.open("rb") as file:
                content = file.read(MAX_LENGTH + 1)
        except OSError as error:
            raise UsageError(f"cannot read the config {source}: {error.strerror}; use another --config") from None
        return cls.from_yaml_content(content, str(source))

    @classmethod
    def from_yaml_content(cls, content: bytes, source: str) -> Self:
        """Create a config from the content of a YAML file.

        Args:
            content: the file's content, encoded in UTF-8.
            source: where it comes from, for error messages.

        Raises:
            UsageError: too long, invalid YAML, or invalid settings.
        """
        if len(content) > MAX_LENGTH:
            raise UsageError(f"{source} is too long for a config: more than {MAX_LENGTH} bytes")
        try:
            values = yaml.load(content.decode(), _Loader)
        # PyYAML also raises whatever Python does for malformed numbers, dates and tags, and for deep nesting.
        except Exception as error:
            raise UsageError(f"{source} is not valid YAML: {textwrap.shorten(str(error), 200)}") from None
        if not isinstance(values, dict):
            raise UsageError(f"{source} has no settings; expected lines such as 'epochs: 10'")
        return cls.from_mapping(values, source)

    def to_yaml(self) -> str:
        """Convert to YAML, which ``from_yaml`` reads back to an equal config."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


MAY_CHANGE = frozenset(field.name for field in dataclasses.fields(Config) if field.metadata["may_change"])
"""The names of the settings that a resumed run may change."""


class _Loader(yaml.SafeLoader):
    """Loads plain data, without merge keys (<<): a few lines of them can expand to any amount of memory."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Construct a mapping; duplicate keys are an error, as in the YAML specification but not in PyYAML."""
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "duplicate key", node.start_mark)
        return mapping

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Leave merge keys in place, so that constructing them fails."""
