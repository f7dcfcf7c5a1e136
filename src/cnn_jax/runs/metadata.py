"""What a checkpoint holds besides the state, as JSON, and whether some JSON is that."""

import dataclasses
import math
import reprlib
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax.config import Config
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.training.history import EpochRecord

Meta = dict[str, Any]

FORMAT = 3
"""The version of what a checkpoint holds."""

_FORM = {
    "format": int,
    "config": {field.name: object for field in dataclasses.fields(Config)},
    "device_count": int,
    "image_shape": [int],
    "class_names": [str],
    "data_sha256": str,
    "dark_background": bool,
    "history": [object],
    "epoch": {
        "seconds": float,
        "metrics": {"loss": float, "num_correct": int, "num_examples": int, "first_nonfinite_step": int},
    },
    "test_accuracy": float,
}
"""The types of what a checkpoint holds besides the state, once it is JSON."""


def check_meta(meta: Meta, workdir: Path) -> None:
    """Raise CnnJaxError unless it is what this version writes down for a run in ``workdir``."""
    if meta["format"] != FORMAT:
        raise CnnJaxError(
            f"{workdir} was written by another version of cnn_jax, in format {reprlib.repr(meta['format'])}, "
            f"and this one reads format {FORMAT}: use the version that wrote it"
        )
    if not (_has_form(meta, _FORM) and len(meta["image_shape"]) == 3):
        raise CnnJaxError(f"the checkpoints in {workdir} were not written by this package: start a new run")


def config_of(meta: Meta, workdir: Path) -> Config:
    """The settings that the run was trained with when the checkpoint was written.

    Raises:
        CnnJaxError: they are not valid ones.
    """
    check_meta(meta, workdir)
    try:
        return Config.from_mapping(meta["config"], str(workdir))
    except UsageError as error:
        raise CnnJaxError(f"the checkpoints in {workdir} were not written by this package ({error})") from None


def history_of(meta: Meta) -> list[EpochRecord]:
    """The epochs before the checkpoint."""
    return [EpochRecord.from_json(record) for record in meta["history"]]


def _has_form(value: Any, form: Any) -> bool:
    """Whether a JSON value is of a type, a list of values of one form, or an object of a form for each of its keys.

    ``object`` stands for any value.
    """
    match form:
        case [inner]:
            return type(value) is list and all(_has_form(item, inner) for item in value)
        case dict():
            return (
                type(value) is dict
                and value.keys() == form.keys()
                and all(_has_form(value[key], form[key]) for key in form)
            )
    if form is object:
        return True
    if type(value) is not form:
        return False
    # Numbers come from the device, whose have 32 bits; and none of its integers is negative here.
    if form is int:
        return 0 <= value < 2**31
    return form is not float or not np.finfo(np.float32).max < abs(value) < math.inf
