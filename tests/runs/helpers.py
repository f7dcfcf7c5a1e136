"""What the tests of runs share besides their fixtures."""

import itertools
import json
import subprocess
import time
from pathlib import Path

import jax
import numpy as np

from cnn_jax.config import Config
from cnn_jax.runs.run import load_run

CONFIG = Config(epochs=4, batch_size=10, dataset="squares", seed=3, checkpoint_every=3)
"""Four epochs of five steps, with checkpoints inside the epochs."""


def stop_at(number):
    """A ``stop_requested`` that returns True when called for the ``number``-th time, counted from 0."""
    count = itertools.count()
    return lambda: next(count) == number


TIMES = ("seconds", "images_per_second", "input_wait_seconds")
"""The metrics that differ from one run to the next."""


def finished_checkpoints(workdir: Path) -> set[Path]:
    return set(workdir.glob("checkpoints/*/sha256sums"))


def wait_until_trained(workdir: Path, process: subprocess.Popen):
    """Wait until a process that trains has saved a step after the first."""
    while not {path.parent.name for path in finished_checkpoints(workdir)} - {"0"}:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def metrics_without_times(workdir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in TIMES} for line in lines]


def assert_same_state(state1, state2):
    jax.tree.map(np.testing.assert_array_equal, state1, state2)


def assert_same_outcome(workdir: Path, reference: Path):
    """Fail unless two runs have bitwise equal metrics and final states."""
    assert metrics_without_times(workdir) == metrics_without_times(reference)
    assert_same_state(load_run(workdir).state, load_run(reference).state)
