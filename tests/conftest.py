"""Small data that every test can afford."""

import jax
import numpy as np
import pytest

from cnn_jax.data import Dataset, Split


def pytest_configure() -> None:
    """Two devices, however many processors there are; before jax looks for any."""
    jax.config.update("jax_num_cpu_devices", 2)


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory):
    """A user's cache of the tests' own: what one has compiled, the next and the commands it starts need not."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        for name, value in {
            "jax_compilation_cache_dir": str(cache / "compiled"),
            "jax_persistent_cache_min_compile_time_secs": 0.0,
        }.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        yield


def make_split(num_examples: int, num_classes: int, seed: int) -> Split:
    """Noise with a bright square whose place tells the class, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 100, (num_examples, 16, 16, 1), dtype=np.uint8)
    labels = rng.integers(0, num_classes, num_examples, dtype=np.int32)
    for image, label in zip(images, labels, strict=True):
        image[4 * label : 4 * label + 4, 4:12] = 255
    return Split(images, labels)


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    """Three classes of 16x16 images, 47 to train on and 23 to test on: no multiples of any batch size used."""
    return Dataset("squares", make_split(47, 3, seed=0), make_split(23, 3, seed=1), ("top", "middle", "bottom"))
