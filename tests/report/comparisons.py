"""Runs to compare."""

import dataclasses
from pathlib import Path

import numpy as np
from pages import NASTY, STEPS_PER_EPOCH, make_history

from cnn_jax.config import Config
from cnn_jax.training.comparison import ImageResults, RunResult


def make_run(number, name=None, num_epochs=4, split="test", **fields):
    """A run with 500 test images, with its own learning curves and accuracy."""
    history = [
        dataclasses.replace(record, loss=record.loss * (1 + number), train_accuracy=0.9 - 0.1 * number)
        for record in make_history(num_epochs, split)
    ]
    correct = np.random.default_rng(number).random(500) < 0.95 - 0.05 * number
    values = {
        "config": Config(dataset="squares", epochs=num_epochs, seed=number),
        "image_shape": (8, 8, 1),
        "class_names": ("cat", "dog"),
        "data_sha256": "5e" * 32,
        "history": tuple(history),
        "step": STEPS_PER_EPOCH * num_epochs,
        "num_parameters": 32_998,
        "images": ImageResults(correct, 0.425, "squares", [bytes([n % 256, n // 256]) for n in range(500)], None),
        "test_accuracy": float(correct.mean()),
        "test_loss": 0.425,
        "compile_seconds": 3.25,
        "backend": "cpu",
        "device": "AMD EPYC 7B13",
        "device_count": 2,
        "versions": {"jax": "0.10.2"},
    }
    name = name or f"run{number}"
    return RunResult(name=name, workdir=Path("/runs", name), **values | fields)


UNFINISHED = {"compile_seconds": None, "backend": None, "device": None, "device_count": None, "versions": {}}
NOT_EVALUATED = {"images": "cannot read <b>/data</b>: No such file", "test_accuracy": None, "test_loss": None}
COMPARISONS = {
    "two": [make_run(0), make_run(1)],
    "different": [
        make_run(0),
        make_run(1, num_epochs=7, split="validation", class_names=("cat", "yak"), data_sha256="6f" * 32),
        make_run(2, history=(), step=7, **UNFINISHED),
        make_run(3, **NOT_EVALUATED),
    ],
    "ten": [make_run(n, f"fashion_mnist-cnn-20261124-1038{n:02}", num_epochs=28 + n) for n in range(10)],
    "nasty": [make_run(n, name[:60], class_names=(f"{n}", name)) for n, name in enumerate(NASTY)],
}
