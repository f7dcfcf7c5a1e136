"""Every example of a folder is paired with the file it was read from."""

import numpy as np
import pytest
from PIL import Image

from cnn_jax import data
from cnn_jax.config import Config


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load a folder of images that each have one gray value, with settings."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda **settings: data.load(Config(dataset=f"folder:{tmp_path / 'images'}", **settings))


def put(folder, values):
    folder.mkdir(parents=True)
    for value in values:
        Image.new("L", (4, 3), value).save(folder / f"{value}.png")


def test_of_splits_held_out_of_the_folder_without_unreadable_files(load, tmp_path):
    put(tmp_path / "images" / "cat", range(40))
    put(tmp_path / "images" / "dog", range(100, 140))
    (tmp_path / "images" / "cat" / "10x.png").write_bytes(b"no image")
    dataset = load(validation_fraction=0.3, skip_unreadable=True)
    found = []
    for split in dataset.splits.values():
        for image, label, file in zip(split.images, split.labels, split.files, strict=True):
            assert file == f"{dataset.class_names[label]}/{image[0, 0, 0]}.png"
            found.append(file)
    assert len(set(found)) == len(found) == 80


def test_of_splits_in_their_own_folders(load, tmp_path):
    for split, start in {"train": 0, "test": 50}.items():
        put(tmp_path / "images" / split / "cat", [start, start + 1])
        put(tmp_path / "images" / split / "dog", [start + 100])
    dataset = load()
    assert dataset.test.files.tolist() == ["test/cat/50.png", "test/cat/51.png", "test/dog/150.png"]
    assert dataset.test.subset(np.array([2, 0])).files.tolist() == ["test/dog/150.png", "test/cat/50.png"]


def test_other_datasets_have_none():
    assert data.load(Config(dataset="digits")).test.files is None
