"""A run: a training, and the network that came of it."""

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax.training.train_state import TrainState

from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.data import Dataset
from cnn_jax.errors import UsageError
from cnn_jax.models import create_model
from cnn_jax.report import plots
from cnn_jax.training.checkpoint import Checkpoints, Which
from cnn_jax.training.loop import ChunkReport, EpochRecord, Trainer, evaluate
from cnn_jax.training.state import abstract_train_state
from cnn_jax.workdir import Workdir

MAY_CHANGE = {"epochs", "target_accuracy", "data_dir"}
"""Settings that may differ when a run goes on: when to stop and where the data lie, not what is computed."""


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
        history: a record for each epoch up to ``state``.
        state: parameters and optimiser state.
    """

    workdir: Path
    config: Config
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    history: tuple[EpochRecord, ...]
    state: TrainState

    def evaluate(self, dataset: Dataset) -> Evaluation:
        """Score the network on a data set's test examples.

        Raises:
            UsageError: the data set's images or classes are not those the network was trained for.
        """
        if (dataset.image_shape, dataset.class_names) != (self.image_shape, self.class_names):
            raise UsageError(
                f"the run in {self.workdir} was made with another data set: it takes "
                f"{_describe(self.image_shape, self.class_names)}, and {dataset.name} has "
                f"{_describe(dataset.image_shape, dataset.class_names)}"
            )
        test = dataset.test
        metrics, logits = jax.device_get(
            evaluate(
                self.state.params,
                self.state.apply_fn,
                jax.device_put(test.images),
                jax.device_put(test.labels),
                batch_size=self.config.batch_size,
            )
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
) -> Run:
    """Train a network, or go on training it, and leave all that comes of it in its run directory.

    Args:
        config: the settings.
        workdir: the run directory; by default ``runs/<dataset>-<model>-<time>``.
        resume: go on from the newest checkpoint in ``workdir``, to the same parameters, bit for bit, that a run
            never interrupted would have.
        on_epoch: told of each epoch; ``print`` prints the lines of the command.
        on_chunk: told how far the epoch has come, every hundred steps.

    Raises:
        UsageError: the config cannot be used, or the run directory does not fit it.
        CnnJaxError: the data could not be fetched.
    """
    if workdir is not None and not resume:
        Workdir(Path(workdir)).check_unused()
    dataset = data.load(config)
    config = dataclasses.replace(config, dataset=dataset.name)
    directory = Workdir(_default_workdir(config) if workdir is None else Path(workdir))
    if resume:
        _check_same(config, directory)
    trainer = Trainer(config, dataset)
    directory.create(config)

    with Checkpoints(directory.checkpoints) as checkpoints:
        if resume:
            state, history = checkpoints.restore(trainer.abstract_state), _history(checkpoints.meta())
        else:
            state, history = trainer.initial_state(), []
        directory.write_history(history)
        compile_seconds = trainer.compile()
        epochs = () if reached_target(config, history) else trainer.epochs(state, on_chunk)
        for record, state in epochs:
            history.append(record)
            checkpoints.save(state, _meta(dataset, history), record.test_accuracy)
            directory.append_history(record)
            on_epoch(record)
            if reached_target(config, history):
                break

    directory.write_summary(config, history, compile_seconds)
    _, logits = trainer.evaluate(state.params)
    plots.save_curves(directory.path / "curves.png", history, trainer.steps_per_epoch)
    plots.save_confusion(
        directory.path / "confusion.png", dataset.test.labels, np.argmax(logits, axis=-1), dataset.class_names
    )
    return Run(directory.path, config, dataset.image_shape, dataset.class_names, tuple(history), state)


def load_run(workdir: str | Path, checkpoint: Which = "newest") -> Run:
    """The run in a run directory, as of its newest checkpoint or that of the best test accuracy.

    Raises:
        UsageError: there is no run, or no checkpoint.
    """
    directory = Workdir(Path(workdir))
    config = directory.config()
    with Checkpoints(directory.checkpoints, read_only=True) as checkpoints:
        meta = checkpoints.meta(checkpoint)
        image_shape, class_names = tuple(meta["image_shape"]), tuple(meta["class_names"])
        model = create_model(config.model, len(class_names))
        state = checkpoints.restore(abstract_train_state(model, image_shape, config.learning_rate), checkpoint)
    return Run(directory.path, config, image_shape, class_names, tuple(_history(meta)), state)


def reached_target(config: Config, history: Sequence[EpochRecord]) -> bool:
    """Whether the last epoch has the test accuracy asked for; false where none is asked for."""
    return bool(history) and config.target_accuracy is not None and history[-1].test_accuracy >= config.target_accuracy


def _default_workdir(config: Config) -> Path:
    name = re.sub(r"[^\w.-]+", "-", f"{config.dataset}-{config.model}-{time.strftime('%Y%m%d-%H%M%S')}")
    return Path("runs", name)


def _check_same(config: Config, directory: Workdir) -> None:
    before, now = (dataclasses.asdict(c) for c in (directory.config(), config))
    different = [name for name in now if now[name] != before[name] and name not in MAY_CHANGE]
    if different:
        differences = ", ".join(f"{name} was {before[name]} and is now {now[name]}" for name in different)
        raise UsageError(
            f"the run in {directory.path} was made with other settings: {differences}; leave them as they were, or "
            "choose another --workdir"
        )


def _meta(dataset: Dataset, history: Sequence[EpochRecord]) -> dict:
    return {
        "image_shape": dataset.image_shape,
        "class_names": dataset.class_names,
        "history": [dataclasses.asdict(record) for record in history],
    }


def _history(meta: dict) -> list[EpochRecord]:
    return [EpochRecord(**record) for record in meta["history"]]


def _describe(image_shape: tuple[int, int, int], class_names: tuple[str, ...]) -> str:
    return f"{'x'.join(map(str, image_shape))} images of {len(class_names)} classes ({', '.join(class_names[:3])}, ...)"
