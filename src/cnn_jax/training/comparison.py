"""Runs side by side: what differs in their settings and data, their results, and McNemar's test of each pair."""

import dataclasses
import itertools
import statistics
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax.config import Config
from cnn_jax.training.history import EpochRecord
from cnn_jax.training.mcnemar import PairedCounts, holm


@dataclass(frozen=True)
class ImageResults:
    """A network's results on the ``N`` test images of its dataset.

    Attributes:
        correct: bool ``[N]``, whether each image is correctly classified.
        loss: mean cross-entropy.
        dataset: the name that the dataset was loaded by.
        digests: a digest of the pixels and the class of each image.
        files: str objects ``[N]``, the file of each image within the dataset's folder; None if it is not a folder.
    """

    correct: np.ndarray
    loss: float
    dataset: str
    digests: Sequence[bytes]
    files: np.ndarray | None


@dataclass(frozen=True)
class RunResult:
    """A run at one of its checkpoints, without the network.

    Attributes:
        name: what the run is called: the end of its path, which no other run of the comparison has.
        workdir: the run directory.
        config: the settings.
        image_shape: ``(H, W, C)`` of the images.
        class_names: one name per class.
        data_sha256: the ``sha256`` of the dataset.
        history: a record for each finished epoch.
        step: steps taken since the start of training.
        num_parameters: the size of the network.
        images: the results by test image, or the reason why there are none.
        test_accuracy: the fraction of the test images correctly classified, as recorded in training if ``images`` is a
            reason; None if it is unknown.
        test_loss: likewise, the mean cross-entropy.
        compile_seconds: the time that compilation took; None until training is finished, as for all that follows.
        backend: ``cpu``, ``gpu`` or ``tpu``.
        device: the model of the CPU or accelerator.
        device_count: the number of devices.
        versions: of Python and packages, by name; empty if they are unknown.
    """

    name: str
    workdir: Path
    config: Config
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    data_sha256: str
    history: tuple[EpochRecord, ...]
    step: int
    num_parameters: int
    images: ImageResults | str
    test_accuracy: float | None = None
    test_loss: float | None = None
    compile_seconds: float | None = None
    backend: str | None = None
    device: str | None = None
    device_count: int | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def train_seconds(self) -> float:
        """The training time of the finished epochs, excluding compilation and evaluation."""
        return sum(record.seconds for record in self.history)

    @property
    def images_per_second(self) -> float | None:
        """The median of the finished epochs; None without any."""
        return statistics.median(record.images_per_second for record in self.history) if self.history else None


@dataclass(frozen=True)
class Pair:
    """Two runs, and how they differ on the test images that both have.

    Attributes:
        first: the name of a run.
        second: the name of another run.
        counts: how many of the images they classify correctly, or the reason why this is unknown.
        adjusted_p_value: the p-value of McNemar's test with Holm's correction for all pairs; None without ``counts``.
    """

    first: str
    second: str
    counts: PairedCounts | str
    adjusted_p_value: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Two or more runs.

    Attributes:
        runs: the runs.
        differences: what differs: the values of a setting, a property of the data, or a version, by its name; a value
            for each run, None if it is unknown.
        pairs: every pair of runs.
    """

    runs: tuple[RunResult, ...]
    differences: Mapping[str, tuple[Any, ...]]
    pairs: tuple[Pair, ...]

    @property
    def num_tests(self) -> int:
        """The number of pairs that McNemar's test was computed for."""
        return sum(isinstance(pair.counts, PairedCounts) for pair in self.pairs)


def compare(runs: Sequence[RunResult]) -> Comparison:
    """Compare runs.

    Args:
        runs: at least two, with different names.
    """
    pairs = [Pair(one.name, other.name, _paired_counts(one, other)) for one, other in itertools.combinations(runs, 2)]
    tested = [pair for pair in pairs if isinstance(pair.counts, PairedCounts)]
    adjusted = iter(holm([pair.counts.p_value for pair in tested]))
    pairs = [dataclasses.replace(pair, adjusted_p_value=next(adjusted)) if pair in tested else pair for pair in pairs]
    return Comparison(tuple(runs), _differences(runs), tuple(pairs))


def _differences(runs: Sequence[RunResult]) -> dict[str, tuple[Any, ...]]:
    facts = {field.name: [getattr(run.config, field.name) for run in runs] for field in dataclasses.fields(Config)}
    facts |= {name: [getattr(run, name) for run in runs] for name in ("image_shape", "class_names", "data_sha256")}
    different = {name: tuple(values) for name, values in facts.items() if len(set(values)) > 1}
    for name in dict.fromkeys(name for run in runs for name in run.versions):
        versions = tuple(run.versions.get(name) for run in runs)
        if len({*versions} - {None}) > 1:  # an unknown version may be the same
            different[name] = versions
    return different


def _paired_counts(first: RunResult, second: RunResult) -> PairedCounts | str:
    """Count the test images that both runs have, or say why this is not possible.

    Both have an image if it is in the test splits of both. So neither was trained on it.
    """
    for run in (first, second):
        if isinstance(run.images, str):
            return f"{run.name} was not evaluated"
    if set(first.class_names) != set(second.class_names):
        return "their classes differ"
    one, other = first.images, second.images
    if one.files is not None and one.dataset == other.dataset:
        matches = _matches(one.files, other.files)  # the same images, perhaps of other sizes
    elif first.image_shape == second.image_shape:
        matches = _matches(one.digests, other.digests)
    else:
        return "their images differ in size or channels"
    if not matches:
        return "no image is in the test splits of both"
    indices, others = map(np.array, zip(*matches, strict=True))
    return PairedCounts.of(one.correct[indices], other.correct[others])


def _matches(first: Sequence[Hashable], second: Sequence[Hashable]) -> list[tuple[int, int]]:
    """The indices of equal elements of two sequences, each element being matched once."""
    places = defaultdict(list)
    for index in reversed(range(len(second))):
        places[second[index]].append(index)
    return [(index, places[key].pop()) for index, key in enumerate(first) if places.get(key)]
