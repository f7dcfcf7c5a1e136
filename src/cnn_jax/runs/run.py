"""A run: the network that came of a training, and what can be done with it."""

import logging
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import jax
import numpy as np
from flax.training.train_state import TrainState

from cnn_jax import data
from cnn_jax.training.batches import batch_size_for
from cnn_jax.config import Config
from cnn_jax.data import Dataset, Split, background
from cnn_jax.data.image import read_image
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.formats import Format, verify
from cnn_jax.formats.verify import Verification
from cnn_jax.formats.network import Network
from cnn_jax.runs.metadata import Meta, config_of, history_of
from cnn_jax.models import create_model
from cnn_jax.runs.checkpoint import Which, newest_meta, restore
from cnn_jax.training.history import EpochRecord
from cnn_jax.training.loop import evaluate, predict
from cnn_jax.training.sharding import make_mesh, replicate
from cnn_jax.training.state import abstract_train_state
from cnn_jax.runs.workdir import Workdir

Invert = Literal["auto", "yes", "no"]

logger = logging.getLogger("cnn_jax")


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
        dark_background: whether nearly all images it was trained on show something light on a dark ground.
        history: a record for each epoch up to ``state``.
        state: parameters and optimiser state.
    """

    workdir: Path
    config: Config
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    dark_background: bool
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
        batch_size = batch_size_for(self.image_shape, len(images))
        mesh = make_mesh(batch_size)
        params = replicate(self.state.params, mesh)
        probabilities = np.empty((len(images), len(self.class_names)), np.float32)
        for first in range(0, len(images), batch_size):
            part = images[first : first + batch_size]
            # Fill up the last batch, so that the program is compiled only once.
            filled = np.zeros((batch_size, *self.image_shape), np.uint8)
            filled[: len(part)] = part
            logits = predict(params, self.state.apply_fn, replicate(filled, mesh), batch_size=batch_size, mesh=mesh)
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
        if invert not in get_args(Invert):
            raise UsageError(f"invert must be one of {', '.join(get_args(Invert))}, not {invert!r}")
        height, width, channels = self.image_shape
        image = read_image(Path(file), (height, width), channels)
        inverted = self.dark_background and background.is_light(image) if invert == "auto" else invert == "yes"
        return 255 - image if inverted else image

    def export(self, path: str | Path, format: Format) -> Verification:
        """Write the network in a form that other programs read, once what was written is verified.

        Args:
            path: the file, which is not there yet.
            format: ``"stablehlo"``, a program for jax on any device; ``"onnx"``, a model; ``"safetensors"`` or
                ``"pytorch"``, the weights in Flax's names and layouts or in PyTorch's.

        Returns:
            How well the file, read back, agrees with the network on test images of the run's data set; on noise where
            these cannot be had, which is said.

        Raises:
            UsageError: the file cannot be written, or a package is missing.
            CnnJaxError: the file computes something else than the network; it is not kept.
        """
        path = Path(path)
        form = verify.form_of(format)
        verify.check_new(path)
        try:
            images = verify.sample(data.load(self.config).test.images)
        except CnnJaxError as error:
            logger.warning("verifying on noise, for the test images cannot be had: %s", error)
            count = verify.sample_size(self.image_shape)
            images = np.random.default_rng(0).integers(0, 256, (count, *self.image_shape), np.uint8)
        with jax.default_matmul_precision("highest"):  # as in what is exported
            expected = self.predict(images)
        network = Network(self.config.model, self.image_shape, self.class_names, jax.device_get(self.state.params))
        return verify.write(path, form, network, images, expected)

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


def load_run(workdir: str | Path, checkpoint: Which = "newest") -> Run:
    """The run in a run directory, as of its newest checkpoint or that of the best test accuracy.

    Raises:
        UsageError: there is no run, or no checkpoint.
        CnnJaxError: the checkpoints are damaged, or of another version of the package.
    """
    directory = Workdir(Path(workdir))
    directory.check_holds_run()

    def like(meta: Meta) -> TrainState:
        config = config_of(meta, directory.path)
        model = create_model(config.model, len(meta["class_names"]))
        return abstract_train_state(model, tuple(meta["image_shape"]), config.learning_rate)

    state, meta = restore(directory.checkpoints, like, checkpoint)
    return make_run(directory, config_of(meta, directory.path), meta, history_of(meta), state)


def load_config(workdir: str | Path) -> Config:
    """The settings of the run in a run directory: of ``config.yaml``, or of the newest checkpoint if that is lost.

    Raises:
        UsageError: there is no run, or ``config.yaml`` does not hold valid settings.
        CnnJaxError: it is lost, and so are the checkpoints.
    """
    directory = Workdir(Path(workdir))
    directory.check_holds_run()
    try:
        return directory.config()
    except FileNotFoundError:
        return config_of(newest_meta(directory.checkpoints), directory.path)


def make_run(directory: Workdir, config: Config, meta: Meta, history: Sequence[EpochRecord], state: TrainState) -> Run:
    """The run of these parts; ``meta`` is what its checkpoints hold."""
    return Run(
        workdir=directory.path,
        config=config,
        image_shape=tuple(meta["image_shape"]),
        class_names=tuple(meta["class_names"]),
        dark_background=meta["dark_background"],
        history=tuple(history),
        state=state,
    )


def _describe(image_shape: tuple[int, int, int], class_names: tuple[str, ...]) -> str:
    names = ", ".join(reprlib.repr(name)[1:-1] for name in class_names[:3])
    return f"{'x'.join(map(str, image_shape))} images of {len(class_names)} classes ({names}, ...)"
