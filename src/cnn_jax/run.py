"""A run: a training, and the network that came of it."""

import contextlib
import dataclasses
import itertools
import logging
import math
import os
import re
import reprlib
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax.training.train_state import TrainState

from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.data import Dataset, Split, ground
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.models import create_model
from cnn_jax.report import plots
from cnn_jax.training.checkpoint import CheckpointWriter, Which, restore
from cnn_jax.training.loop import ChunkReport, EpochRecord, Progress, Trainer, evaluate, predict
from cnn_jax.training.metrics import Metrics
from cnn_jax.training.sharding import make_mesh, replicate
from cnn_jax.training.state import abstract_train_state
from cnn_jax.workdir import Workdir

DETERMINISTIC_OPS = "--xla_gpu_deterministic_ops=true"
"""In the environment's ``XLA_FLAGS``, makes XLA take only operations that give the same bits each time on a GPU."""

FORMAT = 2
"""Of what a checkpoint holds; another number is another form."""

META_FORM = {
    "format": int,
    "device_count": int,
    "image_shape": [int],
    "class_names": [str],
    "dark_ground": bool,
    "history": [{field.name: field.type for field in dataclasses.fields(EpochRecord)}],
    "epoch": {
        "seconds": float,
        "metrics": {"loss": float, "num_correct": int, "num_examples": int, "broken_at": int},
    },
    "test_accuracy": float,
}
"""The types of what a checkpoint holds besides the state, once it is JSON."""

PREDICT_BATCH = 256
"""Images that are classified at a time."""

Invert = Literal["auto", "yes", "no"]

MAY_CHANGE = {"epochs", "target_accuracy", "data_dir", "checkpoint_every"}
"""Settings that may differ when a run goes on: when to stop, what to save, where data lie; not what is computed."""

logger = logging.getLogger("cnn_jax")


class StoppedError(CnnJaxError):
    """Training was asked to stop, and has saved how far it came."""

    def __init__(self, workdir: Path, step: int):
        go_on = f"python -m cnn_jax.train --resume --workdir {shlex.quote(str(workdir))}"
        super().__init__(f"stopped after step {step}: go on with {go_on}")


@dataclass(frozen=True)
class Evaluation:
    """A network's answers on ``N`` test examples.

    Attributes:
        loss: mean cross-entropy.
        accuracy: fraction of the examples classified rightly.
        labels: int32 ``[N]``, the true classes.
        predictions: int32 ``[N]``, the classes of the largest logits.
    """

    loss: float
    accuracy: float
    labels: np.ndarray
    predictions: np.ndarray


@dataclass(frozen=True)
class Run:
    """A trained network and how it came about.

    Attributes:
        workdir: the run directory.
        config: the settings, with the data set's resolved name.
        image_shape: ``(H, W, C)`` of the images it was trained on.
        class_names: one for each logit.
        dark_ground: whether nearly all images it was trained on show something light on a dark ground.
        history: a record for each epoch up to ``state``.
        state: parameters and optimiser state.
    """

    workdir: Path
    config: Config
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    dark_ground: bool
    history: tuple[EpochRecord, ...]
    state: TrainState

    def predict(self, images: np.ndarray) -> np.ndarray:
        """How probable each class is for each image.

        Args:
            images: uint8 ``[N, H, W, C]``, prepared as in training; ``prepare`` does it for a file.

        Returns:
            float32 ``[N, classes]``, the classes in the order of ``class_names``.

        Raises:
            UsageError: images of another shape or type.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise UsageError(
                f"the network takes images of uint8 [N, {expected}], not {images.dtype} {list(images.shape)}"
            )
        mesh = make_mesh(PREDICT_BATCH)
        params = replicate(self.state.params, mesh)
        probabilities = np.empty((len(images), len(self.class_names)), np.float32)
        for first in range(0, len(images), PREDICT_BATCH):
            part = images[first : first + PREDICT_BATCH]
            # Always as many, so that the program is compiled but once.
            filled = np.zeros((PREDICT_BATCH, *self.image_shape), np.uint8)
            filled[: len(part)] = part
            logits = predict(params, self.state.apply_fn, replicate(filled, mesh), batch_size=PREDICT_BATCH, mesh=mesh)
            probabilities[first : first + len(part)] = jax.nn.softmax(jax.device_get(logits)[: len(part)])
        return probabilities

    def prepare(self, file: str | Path, invert: Invert = "auto") -> np.ndarray:
        """Read an image file as the network wants it.

        Args:
            file: PNG, JPEG, WebP or BMP; its size and colours are brought to those the network was trained on.
            invert: exchange light and dark; ``"auto"`` does it for a picture on a light ground where the network was
                trained on pictures on a dark one.

        Returns:
            uint8 ``[H, W, C]``.

        Raises:
            UsageError: not an image, or none that can be read.
        """
        height, width, channels = self.image_shape
        from cnn_jax.data.image import read_image

        image = read_image(Path(file), (height, width), channels)
        inverted = self.dark_ground and ground.is_light(image) if invert == "auto" else invert == "yes"
        return 255 - image if inverted else image

    def evaluate(self, dataset: Dataset) -> Evaluation:
        """Score the network on a data set's test examples.

        Args:
            dataset: with images of the shape the network was trained on, and none but its classes, in any order.

        Raises:
            UsageError: the data set's images or classes do not fit.
        """
        if dataset.image_shape != self.image_shape or not set(dataset.class_names) <= set(self.class_names):
            raise UsageError(
                f"the run in {self.workdir} was made with another data set: it takes "
                f"{_describe(self.image_shape, self.class_names)}, and {dataset.name} has "
                f"{_describe(dataset.image_shape, dataset.class_names)}"
            )
        classes = np.array([self.class_names.index(name) for name in dataset.class_names], np.int32)
        test = Split(dataset.test.images, classes[dataset.test.labels])
        batch_size = self.config.batch_size
        mesh = make_mesh(batch_size)
        params, images, labels = replicate((self.state.params, test.images, test.labels), mesh)
        metrics, logits = jax.device_get(
            evaluate(params, self.state.apply_fn, images, labels, batch_size=batch_size, mesh=mesh)
        )
        return Evaluation(
            loss=float(metrics.loss / metrics.num_examples),
            accuracy=float(metrics.num_correct / metrics.num_examples),
            labels=test.labels,
            predictions=logits.argmax(axis=-1).astype(np.int32),
        )


def fit(
    config: Config,
    workdir: str | Path | None = None,
    *,
    resume: bool = False,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
    on_chunk: Callable[[ChunkReport], None] = lambda report: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Run:
    """Train a network, or go on training it, and leave all that comes of it in its run directory.

    Args:
        config: the settings.
        workdir: the run directory; by default ``runs/<dataset>-<model>-<time>``.
        resume: go on from the newest checkpoint in ``workdir``, to the same parameters, bit for bit, that a run
            never interrupted would have.
        on_epoch: told of each epoch; ``print`` prints the lines of the command.
        on_chunk: told how far the epoch has come, every hundred steps.
        stop_requested: asked every hundred steps; when it says so, a checkpoint is written and training stopped.

    Raises:
        UsageError: the config cannot be used, or the run directory does not fit it.
        CnnJaxError: the data could not be fetched, a checkpoint not be written, or the numbers broke.
        StoppedError: a stop was requested.
    """
    if config.deterministic and jax.default_backend() == "gpu" and DETERMINISTIC_OPS not in os.getenv("XLA_FLAGS", ""):
        raise UsageError(f"deterministic on a GPU needs XLA_FLAGS={DETERMINISTIC_OPS} set before jax looks for devices")
    if workdir is not None and not resume:
        Workdir(Path(workdir)).check_unused()
    dataset = data.load(config)
    config = dataclasses.replace(config, dataset=dataset.name)
    if config.data_dir is not None:
        config = dataclasses.replace(config, data_dir=str(Path(config.data_dir).expanduser().absolute()))
    if resume:
        _check_same(config, Workdir(Path(workdir)))
    trainer = Trainer(config, dataset)
    directory = Workdir(_make_default_workdir(config) if workdir is None else Path(workdir))
    directory.create()
    with directory.locked():
        if not resume:
            directory.check_unused()  # again: another process may have been quicker
        start, history = _saved(trainer, directory) if resume else (trainer.start(), [])
        if start.step > config.epochs * trainer.steps_per_epoch:
            begun = -(-start.step // trainer.steps_per_epoch)
            raise UsageError(f"{directory.path} is in its epoch {begun} already: give at least so many by --epochs")
        described = _describe_training(trainer, dataset)
        with CheckpointWriter(directory.checkpoints) as checkpoints:

            def save(progress: Progress, **score: float) -> None:
                trainer.check_finite(progress.metrics)
                checkpoints.save(progress.state, described | _describe_progress(history, progress), **score)

            def before_chunk(progress: Progress) -> None:
                if stop_requested():
                    save(progress)
                    raise StoppedError(directory.path.absolute(), progress.step)
                if config.checkpoint_every and progress.step % config.checkpoint_every == 0 and progress.step > 0:
                    save(progress)

            save(start)
            checkpoints.wait()
            directory.write_config(config)
            directory.write_history(history)
            compile_seconds = trainer.compile()
            progress = start
            epochs = trainer.epochs(start, on_chunk=on_chunk, before_chunk=before_chunk)
            for record, progress in () if reached_target(config, history) else epochs:
                history.append(record)
                save(progress, test_accuracy=record.test_accuracy)
                directory.append_history(record)
                on_epoch(record)
                if reached_target(config, history):
                    break

        directory.write_summary(config, history, compile_seconds, device_count=trainer.mesh.size)
        _, logits = trainer.evaluate(progress.state.params)
        with directory.replacing("curves.png") as path:
            plots.save_curves(path, history, trainer.steps_per_epoch)
        with directory.replacing("confusion.png") as path:
            plots.save_confusion(path, dataset.test.labels, np.argmax(logits, axis=-1), dataset.class_names)
    state = jax.device_put(progress.state, jax.devices()[0])  # on one device, as load_run gives it
    return _make_run(directory, config, described, history, state)


def load_run(workdir: str | Path, checkpoint: Which = "newest") -> Run:
    """The run in a run directory, as of its newest checkpoint or that of the best test accuracy.

    Raises:
        UsageError: there is no run, or no checkpoint.
        CnnJaxError: the checkpoints are damaged, or of another version of the package.
    """
    directory = Workdir(Path(workdir))
    config = directory.config()

    def like(meta: dict[str, Any]) -> TrainState:
        _check_meta(meta, directory)
        model = create_model(config.model, len(meta["class_names"]))
        return abstract_train_state(model, tuple(meta["image_shape"]), config.learning_rate)

    state, meta = restore(directory.checkpoints, like, checkpoint)
    return _make_run(directory, config, meta, _history(meta), state)


def reached_target(config: Config, history: Sequence[EpochRecord]) -> bool:
    """Whether the last epoch has the test accuracy asked for; false where none is asked for."""
    return bool(history) and config.target_accuracy is not None and history[-1].test_accuracy >= config.target_accuracy


def _make_default_workdir(config: Config) -> Path:
    name = re.sub(r"[^\w.-]+", "-", f"{config.dataset}-{config.model}-{time.strftime('%Y%m%d-%H%M%S')}")
    for number in itertools.count(1):
        path = Path("runs", name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):  # runs started within a second have one name
            path.mkdir(parents=True)
            return path


def _check_same(config: Config, directory: Workdir) -> None:
    before, now = (dataclasses.asdict(c) for c in (directory.config(), config))
    different = [name for name in now if now[name] != before[name] and name not in MAY_CHANGE]
    if different:
        differences = ", ".join(f"{name} was {before[name]} and is now {now[name]}" for name in different)
        raise UsageError(
            f"the run in {directory.path} was made with other settings: {differences}; leave them as they were, or "
            "choose another --workdir"
        )


def _make_run(
    directory: Workdir, config: Config, meta: dict[str, Any], history: Sequence[EpochRecord], state: TrainState
) -> Run:
    return Run(
        workdir=directory.path,
        config=config,
        image_shape=tuple(meta["image_shape"]),
        class_names=tuple(meta["class_names"]),
        dark_ground=meta["dark_ground"],
        history=tuple(history),
        state=state,
    )


def _describe_training(trainer: Trainer, dataset: Dataset) -> dict[str, Any]:
    """What every checkpoint holds besides the state."""
    return {
        "format": FORMAT,
        "device_count": trainer.mesh.size,
        "image_shape": dataset.image_shape,
        "class_names": dataset.class_names,
        "dark_ground": ground.is_dark(dataset.train.images),
    }


def _describe_progress(history: Sequence[EpochRecord], progress: Progress) -> dict[str, Any]:
    """What a checkpoint holds besides that."""
    return {
        "history": [dataclasses.asdict(record) for record in history],
        "epoch": {"seconds": progress.seconds, "metrics": progress.metrics.to_numbers()},
    }


def _saved(trainer: Trainer, directory: Workdir) -> tuple[Progress, list[EpochRecord]]:
    """Where the newest checkpoint stands, and the epochs before."""

    def like(meta: dict[str, Any]) -> TrainState:
        _check_meta(meta, directory)
        return trainer.abstract_state

    state, meta = restore(directory.checkpoints, like)
    step, epoch, history = int(state.step), meta["epoch"], _history(meta)
    ends = [((number + 1) * trainer.steps_per_epoch, number) for number in range(len(history))]
    if len(history) != step // trainer.steps_per_epoch or [(end.step, end.epoch) for end in history] != ends:
        raise CnnJaxError(
            f"the run in {directory.path} came to step {step} by other epochs than of {trainer.steps_per_epoch} steps: "
            "go on with the data set it was made with"
        )
    if meta["device_count"] != trainer.mesh.size:
        logger.warning(
            "%s was trained on %d device(s) and goes on with %d: the same up to rounding, but not to the last bit",
            directory.path,
            meta["device_count"],
            trainer.mesh.size,
        )
    return Progress(step, state, Metrics.from_numbers(epoch["metrics"]), epoch["seconds"]), history


def _check_meta(meta: dict[str, Any], directory: Workdir) -> None:
    if meta["format"] != FORMAT:
        raise CnnJaxError(
            f"{directory.path} was written by another version of cnn_jax, in format {reprlib.repr(meta['format'])}, "
            f"and this one reads format {FORMAT}: use the version that wrote it"
        )
    if not (_has_form(meta, META_FORM) and len(meta["image_shape"]) == 3):
        raise CnnJaxError(f"{directory.path} holds checkpoints that are not this package's: train the run anew")


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


def _history(meta: dict[str, Any]) -> list[EpochRecord]:
    return [EpochRecord(**record) for record in meta["history"]]


def _describe(image_shape: tuple[int, int, int], class_names: tuple[str, ...]) -> str:
    names = ", ".join(reprlib.repr(name)[1:-1] for name in class_names[:3])
    return f"{'x'.join(map(str, image_shape))} images of {len(class_names)} classes ({names}, ...)"
