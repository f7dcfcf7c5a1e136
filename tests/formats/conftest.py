"""Networks of random weights, and runs of them on random images: nothing here needs training."""

import math
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.data import Dataset, Split
from cnn_jax.errors import UsageError
from cnn_jax.formats.network import Network
from cnn_jax.formats.state_dict import StateDict, flatten, flattened_layers, to_state_dict
from cnn_jax.formats.weights import open_weights
from cnn_jax.runs.run import Run
from cnn_jax.training.loop import abstract_state, create_task
from cnn_jax.training.state import Params
from cnn_jax.training.task import Normalize

SHAPES = [(16, 16, 1), (21, 30, 3)]
"""The smallest; and one with colors, odd rows and columns before each pool, and 2x4 pixels that are flattened."""


@pytest.fixture(params=SHAPES, ids="{0[0]}x{0[1]}x{0[2]}".format)
def image_shape(request) -> tuple[int, int, int]:
    return request.param


@pytest.fixture(scope="session")
def make_run(tmp_path_factory) -> Callable[..., Run]:
    """Makes a run of a model with random weights and batch statistics, whose probabilities lie apart."""

    def make(image_shape: tuple[int, int, int], num_classes: int = 3, seed: int = 0, model: str = "cnn") -> Run:
        config = Config(dataset="noise", model=model)
        channels = np.arange(image_shape[-1])
        preprocess = Normalize(tuple((0.4 + 0.1 * channels).tolist()), tuple((0.5 + 0.1 * channels).tolist()))
        task = create_task(config, num_classes, preprocess)
        shapes = abstract_state(task, image_shape)
        rng = np.random.default_rng(seed)

        def random(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
            name = path[-1].key if isinstance(path[-1], jax.tree_util.DictKey) else ""
            low, high = (0.5, 1.5) if name in ("scale", "var") else (-0.3, 0.3)
            if name == "kernel" and model != "cnn":
                high = math.sqrt(6 / math.prod(leaf.shape[:-1])) * (1 if leaf.ndim == 4 else 0.1)
                low = -high
            return (low + (high - low) * rng.random(leaf.shape, np.float32)).astype(leaf.dtype)

        state = jax.tree_util.tree_map_with_path(random, shapes)
        classes = tuple(f"class {number}" for number in range(num_classes))
        workdir = tmp_path_factory.mktemp("run")
        return Run(
            workdir=workdir,
            config=config,
            image_shape=image_shape,
            class_names=classes,
            data_sha256="",
            dark_background=False,
            history=(),
            task=task,
            state=jax.device_put(state),
        )

    return make


@pytest.fixture(scope="session")
def network_of() -> Callable[[Run], Network]:
    """Makes the network that a run exports."""

    def make(run: Run) -> Network:
        variables = jax.device_get(run.state.variables)
        return Network(run.config.model, run.task, run.image_shape, run.class_names, variables.pop("params"), variables)

    return make


@pytest.fixture(scope="session")
def in_pytorch() -> Callable[[Network], StateDict]:
    """Converts a network to PyTorch's names and layouts."""

    def convert(network: Network) -> StateDict:
        return to_state_dict(flatten(network.variables), flattened_layers(network.model, network.image_shape))

    return convert


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    """torchvision, also where its compiled operators cannot be loaded: its package for GPUs with PyTorch's for CPUs.

    The networks do not use these operators, but Python functions of the package register with them.
    """
    torch = pytest.importorskip("torch")
    try:
        return pytest.importorskip("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
        return pytest.importorskip("torchvision")


@pytest.fixture
def run(make_run, image_shape) -> Run:
    return make_run(image_shape)


@pytest.fixture
def network(run, network_of) -> Network:
    return network_of(run)


@pytest.fixture
def images(image_shape) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (60, *image_shape), dtype=np.uint8)


@pytest.fixture
def known_data(run, images, monkeypatch) -> None:
    """The run's dataset has those images."""
    split = Split(images, np.zeros(len(images), np.int32))
    monkeypatch.setattr(data, "load", lambda config: Dataset(config.dataset, split, split, run.class_names))


@pytest.fixture
def path(tmp_path) -> Path:
    """Where a file of weights is to be."""
    return tmp_path / "weights"


@pytest.fixture
def read(path, network) -> Callable[[], Params]:
    """Reads the file as weights of the network."""
    return lambda: open_weights(path).variables(network.model, network.variables, network.image_shape)["params"]


@pytest.fixture
def arrays(network) -> dict[str, np.ndarray]:
    """The network's parameters by name."""
    return flatten(network.variables)


@pytest.fixture
def check_message() -> Callable[[str], None]:
    """Fails unless a message is one short line."""

    def check(message: str) -> None:
        assert len(message) < 1000
        assert not any(unicodedata.category(char) in ("Cc", "Zl", "Zp") for char in message)

    return check


@pytest.fixture
def assert_refused(read, check_message) -> Callable[[str], None]:
    """Fails unless the file is refused with a message that matches."""

    def check(pattern: str) -> None:
        with pytest.raises(UsageError, match=pattern) as error:
            read()
        check_message(str(error.value))

    return check
