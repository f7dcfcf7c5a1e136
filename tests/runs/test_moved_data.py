"""A run is resumed after its folder of images was moved, with the images it was trained on and no others."""

import dataclasses
import shutil

import numpy as np
import pytest
from helpers import assert_same_outcome
from PIL import Image

from cnn_jax.config import Config
from cnn_jax.errors import UsageError
from cnn_jax.runs.fit import fit, resume
from cnn_jax.runs.run import load_config, load_run


def put_images(root):
    rng = np.random.default_rng(0)
    for name in ("top", "bottom"):
        (root / name).mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 100, (16, 16), np.uint8)
            pixels[:8] += 100 * (name == "top")
            Image.fromarray(pixels).save(root / name / f"{number}.png")


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory):
    """The directory of the images, and of a run of two epochs."""
    directory = tmp_path_factory.mktemp("original")
    put_images(directory / "images")
    config = Config(dataset=f"folder:{directory / 'images'}", epochs=2, batch_size=4)
    return directory / "images", fit(config, directory / "run", report=False).workdir


@pytest.fixture
def moved(two_epochs, tmp_path):
    """A folder of images and a run of one epoch, both moved after training."""
    before = tmp_path / "before"
    shutil.copytree(two_epochs[0], before / "images")
    config = dataclasses.replace(load_config(two_epochs[1]), dataset=f"folder:{before / 'images'}", epochs=1)
    fit(config, before / "run", report=False)
    before.rename(tmp_path / "after")
    return tmp_path / "after" / "images", tmp_path / "after" / "run"


def test_a_moved_folder_is_resumed_with_its_new_path(two_epochs, moved):
    images, workdir = moved
    with pytest.raises(UsageError) as caught:
        resume(workdir, epochs=2, report=False)
    old = images.parents[1] / "before" / "images"
    assert str(caught.value) == (
        f"cannot read the folder {old}: No such file or directory; check the path, and give that of a moved folder "
        "with --dataset folder:PATH"
    )
    resume(workdir, dataset=f"folder:{images}", epochs=2, report=False)
    assert_same_outcome(workdir, two_epochs[1])
    assert load_run(workdir).config.dataset == load_config(workdir).dataset == f"folder:{images}"
    assert len(resume(workdir, report=False).history) == 2  # without the path, which is now known


def test_other_images_are_refused(moved):
    images, workdir = moved
    (images / "top" / "0.png").rename(images / "bottom" / "6.png")
    with pytest.raises(UsageError, match=r"^the dataset changed since the run in .* was trained"):
        resume(workdir, dataset=f"folder:{images}", report=False)


def test_another_kind_of_dataset_is_refused(moved):
    images, workdir = moved
    with pytest.raises(UsageError, match=f"dataset was folder:{images.parents[1]}/before/images and is now digits"):
        resume(workdir, dataset="digits", report=False)
