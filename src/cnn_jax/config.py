"""Everything a run is determined by, in one flat record."""

import dataclasses
import math
import os
import reprlib
import textwrap
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Self

import yaml
from tyro.conf import arg

from cnn_jax.errors import UsageError, suggest

PRESETS = resources.files("cnn_jax") / "configs"
MAX_LENGTH = 100_000
"""Bytes of a config: no genuine one comes near."""

MAX_NAME = 200
"""Characters of a model's name, and of a data set's that is no path."""

MAX_PATH = 4096
"""Characters of folder:PATH, Linux's own limit."""

MAX_SIDE = 10_000
"""Pixels: of this size no batch fits into any memory."""

TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple[int, int]: "two whole numbers",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of a run, validated when made.

    Raises:
        UsageError: a value of the wrong type or out of range.
    """

    epochs: int = 10
    """Passes over the training set."""

    batch_size: int = 100
    """Examples per step."""

    learning_rate: float = 0.01
    """Adam's."""

    dataset: str = "auto"
    """fashion_mnist, mnist, kmnist, digits, tfds:NAME, folder:PATH; auto: Fashion-MNIST if to be had, else digits."""

    data_dir: Annotated[str | None, arg(metavar="DIR")] = None
    """Where data sets are kept or already lie; else CNN_JAX_DATA_DIR, else the user's cache directory."""

    image_size: Annotated[tuple[int, int] | None, arg(metavar="HEIGHT WIDTH")] = None
    """The size that the images of folder:PATH are brought to; else the size they have, if it is one for all."""

    channels: Annotated[int | None, arg(metavar="{1,3}")] = None
    """1 to have the images of folder:PATH in grey, 3 in colour; else in colour if any of them is."""

    skip_unreadable: bool = False
    """Leave out the files of folder:PATH that cannot be read as images, and say how many they are."""

    validation_fraction: float = 0.0
    """Fraction of the training examples held out for validation, in every class alike; 0: none."""

    split_seed: int = 0
    """Determines which examples are held out for validation and, in folder:PATH, for testing."""

    shuffle: bool = True
    """A new order of the training examples each epoch, a function of seed and epoch alone."""

    model: str = "cnn"
    """The architecture; cnn is the lesson's."""

    init_from: Annotated[str | None, arg(metavar="FILE")] = None
    """Start from the weights in a safetensors file or a PyTorch state_dict (.pt), instead of from random ones."""

    seed: int = 0
    """Determines the initial parameters and the order of the examples."""

    target_accuracy: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Stop after the first epoch whose test accuracy, a fraction, reaches it; if none does, exit status 3."""

    checkpoint_every: Annotated[int | None, arg(metavar="INT")] = None
    """Write a checkpoint every so many steps, inside epochs too; one is written at each epoch's end anyway."""

    deterministic: bool = False
    """The same bits each time on a GPU too, which is slower there; on CPUs and TPUs they are the same anyway."""

    tensorboard: bool = False
    """Write the figures of each epoch as TensorBoard's event files too, into the run directory."""

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            _check_type(name, getattr(self, name), hint)
        for name in ("epochs", "batch_size", "learning_rate", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name} must be a finite number above zero, not {_show(value)}")
            if value is not None and not value < 2**31:
                raise UsageError(f"{name} must be below {2**31}, not {_show(value)}")
        if self.image_size is not None and not all(0 < side <= MAX_SIDE for side in self.image_size):
            raise UsageError(f"image_size must be two numbers from 1 to {MAX_SIDE}, not {_show(self.image_size)}")
        if self.channels not in (None, 1, 3):
            raise UsageError(f"channels must be 1 or 3, not {_show(self.channels)}")
        for name in ("seed", "split_seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise UsageError(f"{name} must be between 0 and {2**32 - 1}, not {_show(getattr(self, name))}")
        if not 0 <= self.validation_fraction < 1:
            raise UsageError(f"validation_fraction must be at least 0 and below 1, not {_show(self.validation_fraction)}")
        if self.target_accuracy is not None and not 0 < self.target_accuracy <= 1:
            raise UsageError(f"target_accuracy is a fraction between 0 and 1, not {_show(self.target_accuracy)}")
        for name in ("dataset", "model"):
            value = getattr(self, name)
            longest = MAX_PATH if value.startswith("folder:") else MAX_NAME
            if not (value.isprintable() and len(value) <= longest):
                raise UsageError(f"{name} must be a name, not {_show(value)}")
        for name in ("data_dir", "init_from"):
            value = getattr(self, name)
            if value is not None and not _is_path(value):
                raise UsageError(f"{name} must be a path, not {_show(value)}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str) -> Self:
        """The config with ``values`` in place of the defaults.

        Args:
            values: settings by field name.
            source: where they come from, for the messages.

        Raises:
            UsageError: an unknown key (the nearest known one is suggested) or a bad value.
        """
        hints = typing.get_type_hints(cls)
        for key in values:
            if key not in hints:
                shown = _show(key)
                raise UsageError(f"{source}: unknown key {shown}" + suggest(shown.strip("'"), hints))
        try:
            return cls(**{key: _from_yaml(value, hints[key]) for key, value in values.items()})
        except UsageError as error:
            raise UsageError(f"{source}: {error}") from None

    @classmethod
    def from_yaml(cls, source: str | Path) -> Self:
        """Read a YAML file, or the preset of that bare name that ships with the package.

        Raises:
            UsageError: no such file or preset, not YAML, or not a valid config.
        """
        path = Path(source)
        if not os.path.isfile(path) and path.name == str(source) and not path.suffix:  # noqa: PTH113 (it never raises)
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
            raise UsageError(f"cannot read the config {source}: {error.strerror}") from None
        return cls.from_yaml_content(content, str(source))

    @classmethod
    def from_yaml_content(cls, content: bytes, source: str) -> Self:
        """The config in the content of a YAML file.

        Args:
            content: what the file holds, in UTF-8.
            source: where it comes from, for the messages.

        Raises:
            UsageError: not YAML, or not a valid config.
        """
        try:
            values = yaml.load(content.decode(), _Loader) if len(content) <= MAX_LENGTH else None
        # Besides its own errors the parser lets through whatever Python raises on a number, a date, a tag or a depth of
        # nesting that makes no sense.
        except Exception as error:
            raise UsageError(f"{source} is not a YAML file: {textwrap.shorten(str(error), 200)}") from None
        if not isinstance(values, dict):
            raise UsageError(f"{source} holds no settings: lines of the form 'epochs: 10' are expected")
        return cls.from_mapping(values, source)

    def to_yaml(self) -> str:
        """The config as YAML that ``from_yaml`` reads back to an equal one."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML's plain data, without the merging of mappings (<<): a few lines of it ask for any amount of memory."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """A mapping that says everything once; YAML forbids the same key twice, and PyYAML takes the last."""
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key stands there twice", node.start_mark)
        return mapping

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Leave the mapping as it is, so that << in it is a key that nothing is made of: an error."""


def _from_yaml(value: Any, hint: Any) -> Any:
    if isinstance(value, list):  # YAML knows no tuples
        return tuple(value)
    # YAML 1.1 reads 1e-3, for want of a dot, as text.
    if isinstance(value, str) and float in (hint, *typing.get_args(hint)):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _check_type(name: str, value: Any, hint: Any) -> None:
    accepted = (hint,) if isinstance(hint, type) else typing.get_args(hint)
    # bool is a subclass of int, and an int is as good as a float.
    kind = tuple[*map(type, value)] if type(value) is tuple else type(value)
    if not (kind in accepted or (kind is int and float in accepted)):
        expected = " or ".join("nothing" if kind is NoneType else TYPE_NAMES[kind] for kind in accepted)
        raise UsageError(f"{name} must be {expected}, not {_show(value)}")


def _is_path(text: str) -> bool:
    # What the file functions take, without their errors; and what a message can name on one line.
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return b"\0" not in encoded and len(text.splitlines()) <= 1


def _show(value: Any) -> str:
    """A value as a message gives it: on one line, and short."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python writes out no number of more than 4300 digits
        return "a number of thousands of digits"
