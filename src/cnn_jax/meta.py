"""What a checkpoint holds besides the state, as JSON, and whether some JSON is that."""

import dataclasses
import math
import reprlib
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax.errors import CnnJaxError
from cnn_jax.training.loop import EpochRecord

Meta = dict[str, Any]

FORMAT = 2
"""Of what a checkpoint holds; another number is another form."""

_FORM = {
    "format": int,
    "device_count": int,
    "image_shape": [int],
    "class_names": [str],
    "data_sha256": str,
    "dark_ground": bool,
    "history": [{field.name: field.type for field in dataclasses.fields(EpochRecord)}],
    "epoch": {
        "seconds": float,
        "metrics": {"loss": float, "num_correct": int, "num_examples": int, "broken_at": int},
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
        raise CnnJaxError(f"{workdir} holds checkpoints that are not this package's: train the run anew")


def history_of(meta: Meta) -> list[EpochRecord]:
    """The epochs before the checkpoint."""
    return [EpochRecord(**record) for record in meta["history"]]


def _has_form(value: Any, form: Any) -> bool:
    """Whether a JSON value is of a type, a list of values of one form, or an object of a form for each of its keys."""
    match form:
        case [inner]:
            return type(value) is list and all(_has_form(item, inner) for item in value)
        case dict():
            return (
                type(value) is dict
                and value.keys() == form.keys()
                and all(_has_form(value[key], form[key]) for key in form)
            )
    if type(value) is not form:
        return False
    # Numbers come from the device, whose have 32 bits; and none of its integers is negative here.
    if form is int:
        return 0 <= value < 2**31
    return form is not float or not np.finfo(np.float32).max < abs(value) < math.inf
