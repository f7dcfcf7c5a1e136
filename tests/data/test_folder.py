"""A folder of images as a dataset: what is in it, and errors that do not depend on its layout."""

import contextlib
import hashlib
import io
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from folders import load, numbers, put_split, refusal

from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.errors import UsageError


def test_train_and_test(root, capfd, caplog):
    put_split(root, {"train": {"dog": 2, "cat": 3}, "test": {"dog": 1, "cat": 2}})
    dataset = load(root)
    assert dataset.name == f"folder:{root}"
    assert dataset.class_names == ("cat", "dog")
    assert dataset.image_shape == (4, 3, 1)
    for split in (dataset.train, dataset.test):
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
    labels = dict(zip(numbers(dataset.train), dataset.train.labels.tolist(), strict=True))
    assert labels == {0: 1, 1: 1, 2: 0, 3: 0, 4: 0}
    assert numbers(dataset.test) == [6, 7, 5]
    assert dataset.test.labels.tolist() == [0, 0, 1]
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_the_training_images_of_all_classes_are_mixed(root):
    put_split(root, {"train": {"a": 40, "b": 40}, "test": {"a": 2, "b": 2}})
    dataset = load(root)
    # Steps of 10 examples without --shuffle have both classes, with a probability of 0.98 for random orders.
    assert all(0 < labels.sum() < 10 for labels in dataset.train.labels.reshape(8, 10))
    digests = [hashlib.sha256(path.read_bytes()).digest() for path in sorted(root.glob("train/*/*.png"))]
    assert numbers(dataset.train) == sorted(range(80), key=digests.__getitem__)
    assert dataset.train.labels.tolist() == [number // 40 for number in numbers(dataset.train)]


def test_a_relative_path_becomes_absolute(root, monkeypatch):
    put_split(root, {".": {"a": 2, "b": 2}})
    monkeypatch.chdir(root.parent)
    assert load("pictures").name == load("./pictures/").name == f"folder:{root}"
    monkeypatch.setenv("HOME", str(root.parent))
    assert load("~/pictures").name == f"folder:{root}"


def test_settings_of_folders_only(root, tmp_path):
    for settings in ({"image_size": (4, 4)}, {"channels": 1}, {"skip_unreadable": True}):
        (name,) = settings
        for dataset in ("digits", "auto", "tfds:cifar10", "fashion_mnist"):
            with pytest.raises(
                UsageError,
                match=f"^--{name.replace('_', '-')} applies to folder:PATH only, not to {dataset}: leave it out$",
            ):
                data.load(Config(dataset=dataset, data_dir=str(tmp_path), **settings))


@contextlib.contextmanager
def unprivileged():
    """Run as a user other than root, to whom permissions apply."""
    user = os.geteuid()
    if not user:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_no_permission(own_cache):
    with tempfile.TemporaryDirectory() as name:  # accessible to other users
        root = Path(name)
        root.chmod(0o755)
        put_split(root, {".": {"a": 2, "b": 2}})
        load(root)  # import everything first, as the packages may be readable for root only
        (root / "a" / "001.png").chmod(0)
        with unprivileged():
            assert refusal(root).startswith(f"cannot read {root}/a/001.png: Permission denied; remove it or use")
        for mode in (0o000, 0o444):
            (root / "b").chmod(mode)
            with unprivileged():
                assert "Permission denied" in refusal(root)
        (root / "b").chmod(0o755)


def test_unknown_home_directory():
    assert refusal("~nobody-of-this-name/x").startswith("the home directory in ~nobody-of-this-name/x is unknown: ")


@pytest.mark.parametrize("name", ["folder:", "folder"])
def test_no_path(name):
    with pytest.raises(UsageError, match=rf"unknown dataset '{name}'; did you mean 'folder:PATH'\?; datasets: .*"):
        data.load(Config(dataset=name))


def test_a_progress_bar_on_a_terminal_only(root, monkeypatch, capfd):
    put_split(root, {".": {"a": 2, "b": 2}})
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    load(root)
    for words in ("reading images", "4/4"):
        assert words in terminal.getvalue()
    assert capfd.readouterr().out == ""
