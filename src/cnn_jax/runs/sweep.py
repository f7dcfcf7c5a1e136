"""Many runs that differ in their settings: training all of them, and their results.

A sweep has a directory, with a run directory for each member. Everything is read from these, so a sweep can be
interrupted at any moment and resumed, and any number of processes can work on it: each takes members that no other one
is training.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from cnn_jax import data
from cnn_jax.config import Config, DataConfig
from cnn_jax.data import Dataset, folder
from cnn_jax.data.memory import available_memory
from cnn_jax.data.streamed import StreamedImages
from cnn_jax.errors import UsageError
from cnn_jax.report.sweep import Result
from cnn_jax.runs.checks import check_dataset, check_usable
from cnn_jax.runs.fit import StoppedError, train
from cnn_jax.runs.grid import Grid
from cnn_jax.runs.members import train_members
from cnn_jax.runs.opening import Training, resuming, starting, with_absolute_paths
from cnn_jax.runs.pretrained import open_pretrained
from cnn_jax.runs.space import Space
from cnn_jax.runs.sweep_directory import SweepDirectory
from cnn_jax.runs.workdir import LockedError, make_default_workdir
from cnn_jax.training.ahead import lower_members
from cnn_jax.training.history import EpochRecord
from cnn_jax.training.loop import NonFiniteError, Trainer, create_task_for
from cnn_jax.training.task import SCALE

MOVABLE = ("dataset", "data_dir", "cache_limit", "skip_unreadable")
"""The settings that may change when a sweep is resumed: where its data is, and how it is read."""

MAX_PER_DEVICE = 128
"""The maximum number of members on a device: each has a thread and open files for its checkpoints."""

MEMORY_FRACTION = 0.8
"""The fraction of a device's memory that members may take."""


def create_sweep(
    config: Config,
    varied: Mapping[str, Sequence[Any]],
    workdir: str | Path | None,
    dataset: Dataset | None = None,
) -> SweepDirectory:
    """Create the directory of a new sweep.

    Args:
        config: the settings of all members, but for those that vary.
        varied: the values of each setting that varies, by its name.
        workdir: the directory; by default ``runs/sweep-<dataset>-<model>-<time>``.
        dataset: the examples that ``train_sweep`` will be given; by default those that the settings name.

    Raises:
        UsageError: a setting or its data cannot be used, or the directory is not empty.
        CnnJaxError: the data cannot be downloaded.
    """
    portable = {
        name: [getattr(with_portable_paths(dataclasses.replace(config, **{name: value})), name) for value in values]
        for name, values in varied.items()
    }
    grid = Grid(with_portable_paths(config), portable)
    for member in grid.members().values():
        check_usable(member)
    check_with_data(grid.members().values(), dataset)
    return create_directory(grid, workdir)


def check_with_data(
    configs: Iterable[Config], dataset: Dataset | None = None, *, needs_validation: bool = False
) -> None:
    """Raise UsageError if settings cannot be used with their data, before anything is trained.

    Args:
        configs: the settings; the data of neighbors is read once if its settings are the same.
        dataset: the examples instead of those that the settings name.
        needs_validation: whether the data must have a validation split.
    """
    examples, data_of = dataset, None
    for config in dict.fromkeys(map(_without_seed_and_rate, configs)):
        if config.init_from is not None:
            open_pretrained(config.init_from)
        if dataset is None and (data_of is None or not _shares_data(config, data_of)):
            examples = data.load(config)
            data_of = dataclasses.replace(config, dataset=examples.name)
        elif dataset is not None:
            examples = data.with_validation(dataset, config.validation_fraction, config.split_seed)
        if needs_validation and examples.validation is None:
            raise UsageError("--search compares validation accuracies: set --validation-fraction, such as 0.1")
        check_dataset(config, examples)
        Trainer(config, examples, task=create_task_for(config, examples, SCALE))


def create_directory(plan: Grid | Space, workdir: str | Path | None) -> SweepDirectory:
    """Create the directory of a new sweep, by default ``runs/sweep-<dataset>-<model>-<time>``.

    Raises:
        UsageError: the directory is not empty, or cannot be created.
    """
    path = make_default_workdir(plan.config, prefix="sweep-") if workdir is None else Path(workdir)
    directory = SweepDirectory(path)
    directory.create(plan)
    return directory


def with_portable_paths(config: Config) -> Config:
    """The same settings for any working directory, also with the path of a folder."""
    kind, _, path = config.dataset.partition(":")
    dataset = folder.dataset_name(path) if kind == "folder" and path else config.dataset
    return dataclasses.replace(with_absolute_paths(config), dataset=dataset)


def train_sweep(
    directory: SweepDirectory,
    *,
    dataset: Dataset | str | None = None,
    devices: Sequence[jax.Device] | None = None,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
    on_result: Callable[[Result], None] = lambda result: None,
    stop_requested: Callable[[], bool] = lambda: False,
    **changes: Any,
) -> list[Result]:
    """Train the members of a sweep that are not done and that no other process is training.

    Members whose settings differ in the seed and the learning rate only are trained as one program, as many at a time
    as ``max_members`` says, and others one after another.

    Args:
        directory: the directory of the sweep.
        dataset: the examples of all members, or the name of their dataset if it is a folder that has moved; by default
            the dataset that the settings of each member name.
        devices: the devices to train on; by default all local devices.
        on_epoch: called with the record of each epoch of each member.
        on_result: called with the result of each member that has ended.
        stop_requested: called before each chunk of steps; if it returns True, checkpoints are saved and training stops.
        **changes: new values of other settings in ``MOVABLE``.

    Returns:
        The results of all members. One whose loss is not finite does not stop the others.

    Raises:
        UsageError: settings or data cannot be used.
        CnnJaxError: the data cannot be downloaded, or a file cannot be written.
        StoppedError: a stop was requested.
    """
    devices = jax.local_devices() if devices is None else devices
    data_of = None
    for alike in _grouped(result for result in directory.results() if not result.is_done):
        while alike:
            if data_of is not None and stop_requested():
                raise StoppedError(directory.resume_command)
            with contextlib.ExitStack() as stack:
                trainings, most = [], 1
                while alike and len(trainings) < most:
                    result = alike.pop(0)
                    options = {"dataset": dataset, "devices": devices, "data_of": data_of}
                    training = open_member(stack, directory, result, **options, **changes)
                    if training is not None:
                        data_of = training
                        most = max_members(training.trainer) if alike and not trainings else most
                        trainings.append(training)
                for together in _divided(trainings):
                    for training, error in _train(together, on_epoch=on_epoch, stop_requested=stop_requested):
                        name = training.directory.path.name
                        if error is not None:
                            directory.end(name, error)
                        on_result(directory.result(name, training.metadata.config))
    return directory.results()


def max_members(trainer: Trainer) -> int:
    """The number of members to train as one program: on a CPU one per device, otherwise as many as memory allows.

    It is a multiple of the number of devices, or 1 if a copy of the training images for each device is too large, or if
    they are decoded whenever they are used.
    """
    num_devices, images = trainer.mesh.size, trainer.dataset.train.images
    if isinstance(images, StreamedImages):
        return 1
    device = trainer.mesh.devices.flat[0]
    if device.platform == "cpu":
        return num_devices if num_devices * images.nbytes < available_memory() // 2 else 1
    statistics = device.memory_stats() or {}
    memory = int(MEMORY_FRACTION * statistics.get("bytes_limit", 0)) - images.nbytes
    options = {
        "num_members": 2 * num_devices,  # a single one per device is not vectorized
        "num_examples": len(images),
        "batch_size": min(trainer.config.batch_size, len(images)),
        "chunk_steps": trainer.chunk_steps,
    }
    try:
        program = lower_members(trainer.task, trainer.dataset.image_shape, trainer.mesh, **options).compile()
    except NotImplementedError:  # jax 0.7 does not vectorize the gradient of a convolution
        return num_devices
    analysis = program.memory_analysis()  # of one device
    used = analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes
    member = (used - analysis.alias_size_in_bytes - images.nbytes) / 2
    return max(1, num_devices * min(int(memory / member), MAX_PER_DEVICE))


def _grouped(results: Iterable[Result]) -> list[list[Result]]:
    """Results whose settings differ in the seed and the learning rate only, in the order of the first of each."""
    groups: dict[Config, list[Result]] = {}
    for result in results:
        groups.setdefault(_without_seed_and_rate(result.config), []).append(result)
    return list(groups.values())


def _without_seed_and_rate(config: Config) -> Config:
    """The settings with the same seed and learning rate for all."""
    return dataclasses.replace(config, seed=0, learning_rate=1.0)


def _shares_data(config: Config, resolved: Config) -> bool:
    """Whether a config has the same data as that of a run, which has the name of its dataset instead of ``auto``."""
    names = [field.name for field in dataclasses.fields(DataConfig) if field.name != "dataset"]
    same = all(getattr(config, name) == getattr(resolved, name) for name in names)
    return same and config.dataset in ("auto", resolved.dataset)


def open_member(
    stack: contextlib.ExitStack,
    directory: SweepDirectory,
    result: Result,
    *,
    dataset: Dataset | str | None,
    devices: Sequence[jax.Device],
    data_of: Training | None,
    **changes: Any,
) -> Training | None:
    """Prepare a member for training; None if it is done, or another process is training it.

    Args:
        stack: holds what is opened.
        directory: the directory of the sweep.
        result: what was known of the member.
        dataset: as in ``train_sweep``.
        devices: the devices to train on.
        data_of: another member, whose data is used if the settings of the data are the same.
        **changes: as in ``train_sweep``.
    """
    workdir = directory.member(result.name)
    config = dataclasses.replace(result.config, **changes)
    if isinstance(dataset, str):
        config, examples = dataclasses.replace(config, dataset=dataset), None
    else:
        examples = dataset
    if data_of is not None and not _shares_data(config, data_of.metadata.config):
        data_of = None
    options = {"dataset": None if data_of else examples, "devices": devices, "data_of": data_of}
    try:
        stack.enter_context(directory.claimed(result.name))
        if directory.result(result.name, result.config).is_done:  # by another process
            return None
        if workdir.holds_run:
            moved = {"dataset": dataset} if isinstance(dataset, str) else {}
            opened = resuming(workdir.path, **(options | moved), **changes)
        else:
            opened = starting(config, workdir.path, **options)
        training = stack.enter_context(opened)
    except LockedError:
        return None
    # A copy on the host: on every device, it would take the memory of other members.
    start = dataclasses.replace(training.start, state=jax.device_get(training.start.state))
    return training._replace(start=start, resume_command=directory.resume_command)


def _divided(trainings: Sequence[Training]) -> Iterator[Sequence[Training]]:
    """Those to train as one program, which are at the same step and as many as devices or a multiple, and single ones.

    Members of a sweep that was killed can be an epoch apart.
    """
    by_step: dict[int, list[Training]] = {}
    for training in trainings:
        by_step.setdefault(training.start.step, []).append(training)
    for alike in by_step.values():
        count = len(alike) - len(alike) % alike[0].trainer.mesh.size
        if count > 1:
            yield alike[:count]
        yield from ([training] for training in (alike[count:] if count > 1 else alike))


def _train(trainings: Sequence[Training], **options: Any) -> Iterator[tuple[Training, NonFiniteError | None]]:
    """Train members to the end; yield each as soon as it has ended, and the error if its loss is not finite."""
    if len(trainings) > 1:
        yield from train_members(trainings, **options)
        return
    try:
        train(trainings[0], report=False, verbose=False, **options)
    except NonFiniteError as error:
        yield trainings[0], error
    else:
        yield trainings[0], None
