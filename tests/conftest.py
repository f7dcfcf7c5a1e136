"""Small data and quick compilation for all tests."""

import logging
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from cnn_jax.data import Dataset, Split


def pytest_configure() -> None:
    """Use two devices, however many processors there are; called before jax initializes."""
    jax.config.update("jax_num_cpu_devices", 2)
    os.environ["JAX_NUM_CPU_DEVICES"] = "2"
    # In the background and under nohup these are ignored, and so they would be in the processes that tests start.
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Compile without most optimizations, which takes half the time, unless the test is marked ``optimized``.

    Called before the fixtures of the test, so that those of a marked module compile the same way.
    """
    disable = "0" if item.get_closest_marker("optimized") else "1"
    if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") != disable:
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = disable  # for the commands that the test starts
        jax.config.update("jax_disable_most_optimizations", disable == "1")
        jax.clear_caches()  # jit does not recompile when this setting changes


@pytest.fixture(autouse=True)
def default_logging():
    """Undo what commands that run in this process do to the package's logger."""
    logger = logging.getLogger("cnn_jax")
    yield
    logger.setLevel(logging.NOTSET)
    logger.handlers.clear()
    logger.propagate = True


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory):
    """A user's cache for this process, and one of compiled programs for all processes of the session.

    The latter is ``JAX_COMPILATION_CACHE_DIR`` if it is set, so that later sessions find the programs.
    """
    cache, session = tmp_path_factory.mktemp("cache"), tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session = session.parent
    compiled = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or session / "compiled").absolute()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        # jax does not write programs at once: what another process is writing is compiled instead.
        patch.setenv("PYTHONWARNINGS", "ignore:Error reading persistent compilation cache entry")
        for name, value in {
            "jax_compilation_cache_dir": str(compiled),
            "jax_persistent_cache_min_compile_time_secs": 0.0,
        }.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        yield


def make_split(num_examples: int, num_classes: int, seed: int) -> Split:
    """Noise with a bright square whose position is the class."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 100, (num_examples, 16, 16, 1), dtype=np.uint8)
    labels = rng.integers(0, num_classes, num_examples, dtype=np.int32)
    for image, label in zip(images, labels, strict=True):
        image[4 * label : 4 * label + 4, 4:12] = 255
    return Split(images, labels)


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    """Three classes of 16x16 images, 47 to train on and 23 to test on: no multiples of a batch size."""
    return Dataset("squares", make_split(47, 3, seed=0), make_split(23, 3, seed=1), ("top", "middle", "bottom"))
