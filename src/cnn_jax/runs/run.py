"""A trained network, and what can be done with it: predict, evaluate, export."""

import logging
import reprlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import jax
import numpy as np
from scipy.special import softmax

from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.data import Dataset, background
from cnn_jax.data.image import read_image
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.formats import Format, verify
from cnn_jax.formats.network import Network
from cnn_jax.formats.verify import Verification
from cnn_jax.runs.checkpoint import Which, newest_metadata, restore
from cnn_jax.runs.metadata import RunMetadata
from cnn_jax.runs.workdir import Workdir
from cnn_jax.training.evaluation import batch_size_for, predict_logits, score
from cnn_jax.training.history import EpochRecord
from cnn_jax.training.loop import abstract_state
from cnn_jax.training.sharding import make_mesh
from cnn_jax.training.state import Params, TrainState
from cnn_jax.training.task import Task

Invert = Literal["auto", "yes", "no"]

logger = logging.getLogger("cnn_jax")


@dataclass(frozen=True)
class Evaluation:
    """A network's results on ``N`` test examples.

    Attributes:
        loss: mean cross-entropy.
        accuracy: fraction of the examples correctly classified.
        labels: int32 ``[N]``, the true classes.
        predictions: int32 ``[N]``, the predicted classes.
        logits: float32 ``[N, classes]``, the network's output.
    """

    loss: float
    accuracy: float
    labels: np.ndarray
    predictions: np.ndarray
    logits: np.ndarray

    @property
    def probabilities(self) -> np.ndarray:
        """The probability of each class, float32 ``[N, classes]``."""
        return softmax(self.logits, axis=-1)


@dataclass(frozen=True)
class Run:
    """A trained network and its training history.

    Attributes:
        workdir: the run directory.
        config: the settings, with the dataset's resolved name.
        image_shape: ``(H, W, C)`` of the images it was trained on.
        class_names: one name per logit.
        data_sha256: the ``sha256`` of the dataset it was trained on.
        dark_background: whether nearly all training images are light on a dark background.
        history: a record for each epoch up to ``state``.
        task: the model, optimizer, loss and preprocessing.
        state: the parameters, the model's other collections, and the optimizer's state.
    """

    workdir: Path
    config: Config
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    data_sha256: str
    dark_background: bool
    history: tuple[EpochRecord, ...]
    task: Task
    state: TrainState

    @classmethod
    def of(cls, directory: Workdir, metadata: RunMetadata, task: Task, state: TrainState) -> Self:
        """Create a run from the metadata and state of a checkpoint."""
        return cls(
            workdir=directory.path,
            config=metadata.config,
            image_shape=metadata.image_shape,
            class_names=metadata.class_names,
            data_sha256=metadata.data_sha256,
            dark_background=metadata.dark_background,
            history=metadata.history,
            task=task,
            state=state,
        )

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Compute the probability of each class for each image.

        Args:
            images: uint8 ``[N, H, W, C]``, prepared as in training; ``prepare`` reads and prepares a file.

        Returns:
            float32 ``[N, classes]``, the classes in the order of ``class_names``.

        Raises:
            UsageError: images of another shape or dtype.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise UsageError(f"images must be uint8 [N, {expected}], not {images.dtype} {list(images.shape)}")
        batch_size = batch_size_for(self.image_shape, len(images))
        mesh = make_mesh(jax.local_devices()[:batch_size])
        logits = predict_logits(self.task, self.state.variables, images, batch_size=batch_size, mesh=mesh)
        return softmax(logits, axis=-1)

    def prepare(self, file: str | Path, invert: Invert = "auto") -> np.ndarray:
        """Read an image file and convert it to the network's input.

        Args:
            file: an image in one of the formats of ``cnn_jax.data.image.read_image``; resized as ``config.fit`` says
                and converted to the color channels of the training images.
            invert: whether to invert light and dark; ``"auto"`` does so for an image on a light background if the
                training images had a dark one.

        Returns:
            uint8 ``[H, W, C]``.

        Raises:
            UsageError: the file cannot be read as an image, or ``invert`` is not one of its values.
        """
        if invert not in get_args(Invert):
            raise UsageError(f"invert must be one of {', '.join(get_args(Invert))}, not {invert!r}")
        height, width, channels = self.image_shape
        image = read_image(Path(file), (height, width), channels, self.config.fit)
        inverted = self.dark_background and background.is_light(image) if invert == "auto" else invert == "yes"
        return 255 - image if inverted else image

    def export(self, path: str | Path, format: Format) -> Verification:
        """Export the network to a file, after verifying the file on test images.

        Args:
            path: the file to write, which must not exist.
            format: ``"stablehlo"``, a program for jax on any device; ``"onnx"``, a model; ``"safetensors"`` or
                ``"pytorch"``, the weights with Flax's or PyTorch's names and layouts.

        Returns:
            How well the file agrees with the network on test images of the run's dataset, or, if the dataset cannot be
            loaded, on random noise, with a warning.

        Raises:
            UsageError: the path exists or is not writable, or a package is missing.
            CnnJaxError: the file could not be written, or its probabilities differ from the network's.
        """
        path = Path(path)
        module = verify.format_module(format, self.config.model)
        verify.check_new(path)
        try:
            images = verify.sample(data.load(self.config).test.images)
        except CnnJaxError as error:
            logger.warning("verifying on random noise, because the test images cannot be loaded: %s", error)
            count = verify.sample_size(self.image_shape)
            images = np.random.default_rng(0).integers(0, 256, (count, *self.image_shape), np.uint8)
        # In float32, as the exported program.
        expected = replace(self, task=replace(self.task, precision="float32")).predict(images)
        variables = jax.device_get(self.state.variables)
        network = Network(
            self.config.model, self.task, self.image_shape, self.class_names, variables.pop("params"), variables
        )
        return verify.write(path, module, network, images, expected)

    def evaluate(self, dataset: Dataset) -> Evaluation:
        """Score the network on the test split of a dataset.

        Args:
            dataset: images of the network's input shape; its classes, in any order, must be among the network's.

        Returns:
            The results, with the classes in the order of ``class_names`` of the run.

        Raises:
            UsageError: the image shape or the classes do not match.
        """
        test = self.aligned(dataset).test
        batch_size = self.config.batch_size
        mesh = make_mesh(jax.local_devices())
        logits = predict_logits(self.task, self.state.variables, test.images, batch_size=batch_size, mesh=mesh)
        loss, accuracy = score(logits, test.labels)
        return Evaluation(loss, accuracy, test.labels, logits.argmax(axis=-1).astype(np.int32), logits)

    def aligned(self, dataset: Dataset) -> Dataset:
        """A dataset with the network's classes: the same images, with labels in the order of ``class_names``.

        Args:
            dataset: as in ``evaluate``.

        Raises:
            UsageError: the image shape or the classes do not match.
        """
        if dataset.image_shape != self.image_shape or not set(dataset.class_names) <= set(self.class_names):
            raise UsageError(
                f"the dataset does not match the run in {self.workdir}: the network was trained on "
                f"{_describe(self.image_shape, self.class_names)}, and {dataset.name} has "
                f"{_describe(dataset.image_shape, dataset.class_names)}"
            )
        classes = np.array([self.class_names.index(name) for name in dataset.class_names], np.int32)
        splits = {name: replace(split, labels=classes[split.labels]) for name, split in dataset.splits.items()}
        return replace(dataset, class_names=self.class_names, **splits)


def count_parameters(params: Params) -> int:
    """The number of parameters of a network, not counting its other collections such as batch statistics."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def load_run(workdir: str | Path, checkpoint: Which = "newest") -> Run:
    """Load a trained network from a run directory.

    Args:
        workdir: the run directory.
        checkpoint: ``"newest"``, or ``"best"`` for the one with the best accuracy on the validation split, or on the
            test split if there is no validation split.

    Raises:
        UsageError: not a run directory, or it has no checkpoint.
        CnnJaxError: the checkpoints are damaged, or were written by another version of the package.
    """
    directory = Workdir(Path(workdir))
    directory.check_holds_run()

    def target(values: dict[str, Any]) -> TrainState:
        metadata = RunMetadata.from_json(values, directory.path)
        return abstract_state(metadata.create_task(), metadata.image_shape)

    state, values = restore(directory.checkpoints, target, checkpoint)
    metadata = RunMetadata.from_json(values, directory.path)
    return Run.of(directory, metadata, metadata.create_task(), state)


def load_config(workdir: str | Path) -> Config:
    """Load the settings of a run from ``config.yaml``, or from the newest checkpoint if that file is missing.

    Raises:
        UsageError: not a run directory, or ``config.yaml`` does not contain valid settings.
        CnnJaxError: ``config.yaml`` is missing, and the checkpoints are damaged.
    """
    directory = Workdir(Path(workdir))
    directory.check_holds_run()
    try:
        return directory.config()
    except FileNotFoundError:
        return RunMetadata.from_json(newest_metadata(directory.checkpoints), directory.path).config


def _describe(image_shape: tuple[int, int, int], class_names: tuple[str, ...]) -> str:
    names = ", ".join([reprlib.repr(name)[1:-1] for name in class_names[:3]] + ["..."] * (len(class_names) > 3))
    return f"{'x'.join(map(str, image_shape))} images of {len(class_names)} classes ({names})"
