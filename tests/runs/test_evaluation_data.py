"""The data to evaluate a run on: each folder is loaded once, and nothing is downloaded to look for training images."""

import logging
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from PIL import Image

from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.data import folder, mnist, tfds
from cnn_jax.errors import UsageError
from cnn_jax.runs import evaluation_data
from cnn_jax.runs.fit import fit


def put(root, split, names):
    """Write images as files of a folder of classes, and a file among them that is not an image."""
    for index, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
        (root / names[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(root / names[label] / f"{index}.png")
    (root / names[0] / "notes.txt").touch()


@pytest.fixture(scope="module")
def original(dataset, tmp_path_factory):
    """A run trained on a folder without splits, and the folder."""
    root = tmp_path_factory.mktemp("original")
    put(root / "photos", dataset.train, dataset.class_names)
    config = Config(epochs=1, batch_size=10, dataset=f"folder:{root / 'photos'}", validation_fraction=0.2)
    return fit(replace(config, skip_unreadable=True), root / "run", report=False), root / "photos"


@pytest.fixture
def loads(monkeypatch):
    """How often each folder is loaded."""
    loads = Counter()

    def counted(load, path, config):
        loads[path] += 1
        return load(path, config)

    for name in ("load", "load_unsplit"):
        monkeypatch.setattr(folder, name, partial(counted, getattr(folder, name)))
    return loads


def messages(caplog, name):
    """What was logged about a folder."""
    return [record.getMessage() for record in caplog.records if str(name) in record.getMessage()]


def test_a_folder_that_has_moved_is_loaded_once(original, tmp_path, loads, caplog):
    run, photos = original
    moved = shutil.copytree(photos, tmp_path / "moved")
    caplog.set_level(logging.INFO, "cnn_jax")
    found, dataset = evaluation_data.load(run, f"folder:{moved}")
    assert found.config == replace(run.config, dataset=f"folder:{moved}")
    assert dataset.sha256 == data.load(run.config).sha256
    assert loads == {str(moved): 1, str(photos): 1}  # that of the line above
    assert [message.split()[0] for message in messages(caplog, moved)] == ["skipped", f"folder:{moved}"]


@pytest.mark.parametrize("image_size", [None, (20, 24)])
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_a_moved_folder_is_found_with_every_size_and_channel(original, tmp_path, image_size, channels):
    """Whether these settings or the images themselves determined the network's input, their pixels are the same."""
    run, photos = original
    config = replace(run.config, image_size=image_size, channels=channels)
    trained_on = data.load(config)
    run = replace(run, config=config, image_shape=trained_on.image_shape, data_sha256=trained_on.sha256)
    moved = shutil.copytree(photos, tmp_path / "moved")
    assert evaluation_data.load(run, f"folder:{moved}")[0].config.dataset == f"folder:{moved}"


def test_all_images_of_another_folder_without_splits_are_scored(original, dataset, tmp_path, loads, caplog):
    """It is loaded twice, with and without held-out images, and the run's own once, to look for training images."""
    run, photos = original
    put(tmp_path / "photos", dataset.test, dataset.class_names)
    found, other = evaluation_data.load(run, f"folder:{tmp_path / 'photos'}")
    assert found is run
    assert loads == {str(tmp_path / "photos"): 2, str(photos): 1}
    for path in (tmp_path / "photos", photos):
        assert [message.split()[0] for message in messages(caplog, path)] == ["skipped"]
    expected = run.aligned(folder.load_unsplit(str(tmp_path / "photos"), run.config)).test
    for field in ("images", "labels", "files"):
        np.testing.assert_array_equal(getattr(other.test, field), getattr(expected, field))


def test_another_folder_with_splits_is_loaded_once(original, dataset, tmp_path, loads):
    run, photos = original
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        put(tmp_path / name, split, dataset.class_names)
    _, other = evaluation_data.load(run, f"folder:{tmp_path}")
    assert loads == {str(tmp_path): 1, str(photos): 1}
    assert sorted(map(bytes, other.test.images)) == sorted(map(bytes, dataset.test.images))


@pytest.mark.parametrize("splits", [False, True])
def test_a_folder_that_cannot_be_split_like_the_runs_own(original, dataset, tmp_path, caplog, splits):
    """There are too few different images. It is loaded again, but its warnings are not repeated."""
    run, _ = original
    first = [np.flatnonzero(dataset.test.labels == label)[0] for label in range(3)]
    for root in [tmp_path / "train", tmp_path / "test"] if splits else [tmp_path]:
        put(root, dataset.test.subset(np.array(2 * first)), dataset.class_names)
    _, other = evaluation_data.load(run, f"folder:{tmp_path}")
    assert len(other.test) == 6
    assert [message.split()[0] for message in messages(caplog, tmp_path)] == ["skipped"]


def test_messages_of_a_later_call_are_logged_again(original, caplog):
    run, photos = original
    for _ in range(2):
        evaluation_data.load(run)
    assert [message.split()[0] for message in messages(caplog, photos)] == 2 * ["skipped"]


def test_skip_unreadable_is_for_folders_only(original):
    run, _ = original
    with pytest.raises(UsageError, match="--skip-unreadable applies to folder:PATH only, not to digits"):
        evaluation_data.load(run, "digits", skip_unreadable=True)
    with pytest.raises(UsageError, match=r"does not match the run in .*, and digits has"):
        evaluation_data.load(run, "digits")


@pytest.fixture
def no_download(monkeypatch):
    monkeypatch.setattr(mnist, "fetch", lambda *args, **options: pytest.fail("downloaded"))
    monkeypatch.setattr(tfds, "_prepare", lambda *args: pytest.fail("prepared"))


@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist", "tfds:cifar10"])
def test_training_images_are_not_downloaded(original, dataset, tmp_path, caplog, no_download, name):
    """Not even one file of several that is missing."""
    for part in mnist.PARTS[1:]:
        (tmp_path / f"{part}.gz").touch()
    put(tmp_path / "photos", dataset.test, dataset.class_names)
    run = replace(original[0], config=replace(original[0].config, dataset=name, data_dir=str(tmp_path)))
    _, other = evaluation_data.load(run, f"folder:{tmp_path / 'photos'}", skip_unreadable=True)
    assert len(other.test) == 23
    assert caplog.messages[-1] == (
        f"not checked whether the network was trained on test images: {name} is not in {tmp_path}"
    )


def test_training_images_on_disk_are_compared(original, dataset, tmp_path, caplog, no_download, monkeypatch):
    for part in mnist.PARTS:
        (tmp_path / f"{part}.gz").touch()
    put(tmp_path / "photos", dataset.train, dataset.class_names)
    monkeypatch.setattr(mnist, "load", lambda name, directory: replace(dataset, name=name))
    run = replace(original[0], config=replace(Config(), dataset="mnist", data_dir=str(tmp_path)))
    evaluation_data.load(run, f"folder:{tmp_path / 'photos'}", skip_unreadable=True)
    assert caplog.messages[-1].startswith("47 of the 47 test images are among the run's training images")


def test_shared_images_are_counted_by_their_pixels():
    images = np.arange(4, dtype=np.uint8).repeat(6).reshape(4, 1, 2, 3)
    others = images[[3, 1, 1]].copy()
    assert evaluation_data.count_shared(images, others) == 2
    assert evaluation_data.count_shared(images[[1, 1, 0]], others) == 2
    assert evaluation_data.count_shared(images[:1], others) == 0
