import logging
import subprocess
import sys
from pathlib import Path

import pytest

from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.data.mnist import PARTS
from cnn_jax.errors import CnnJaxError, UsageError


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for variable in ("CNN_JAX_DATA_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)


def load(name, directory):
    return data.load(Config(dataset=name, data_dir=str(directory)))


def test_the_path_of_a_folder_is_suggested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    with pytest.raises(UsageError, match="unknown dataset 'photos'; did you mean 'folder:photos'"):
        data.load(Config(dataset="photos", image_size=(8, 8)))


def test_data_dir(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert data.data_dir(Config()) == Path("/home/somebody/.cache/cnn_jax")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert data.data_dir(Config()) == Path("/cache/cnn_jax")
    monkeypatch.setenv("CNN_JAX_DATA_DIR", "/named/in/environment")
    assert data.data_dir(Config()) == Path("/named/in/environment")
    assert data.data_dir(Config(data_dir="~/given")) == Path("/home/somebody/given")


def test_by_name(fakes, tmp_path):
    for name in ("mnist", "kmnist", "fashion_mnist"):
        fakes.put(name, tmp_path / name)
        assert load(name, tmp_path).name == name
    assert load("digits", tmp_path).name == "digits"
    with pytest.raises(UsageError, match="no dataset 'cifer10'"):
        load("tfds:cifer10", tmp_path)


@pytest.mark.parametrize(
    ("name", "meant"), [("fashion-mnist", "fashion_mnist"), ("mnits", "mnist"), ("digits:", "digits"), ("?", None)]
)
def test_unknown_name(tmp_path, name, meant):
    with pytest.raises(UsageError) as caught:
        load(name, tmp_path)
    message = str(caught.value)
    assert repr(name) in message
    assert (f"did you mean {meant!r}?" in message) == (meant is not None)
    assert message.endswith("datasets: auto, fashion_mnist, mnist, kmnist, digits, tfds:NAME, folder:PATH")


def test_auto_with_files_on_disk(fakes, tmp_path, caplog):
    fakes.put("fashion_mnist", tmp_path)
    assert load("auto", tmp_path).name == "fashion_mnist"
    assert caplog.records == []


def test_auto_downloads(served, tmp_path, caplog):
    assert load("auto", tmp_path).name == "fashion_mnist"
    assert (tmp_path / "fashion_mnist" / f"{PARTS[0]}.gz").is_file()
    assert [record for record in caplog.records if record.name == "cnn_jax"] == []


def test_auto_falls_back_and_says_so(fakes, closed_url, tmp_path, caplog):
    fakes.url = closed_url
    assert load("auto", tmp_path).name == "digits"
    (record,) = (record for record in caplog.records if record.name == "cnn_jax")
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert message.startswith("using scikit-learn's digits: ")
    assert str(tmp_path) in message
    assert f"{closed_url}/fashion_mnist/" in message
    assert "no connection" in message
    assert "\n" not in message


def test_auto_does_not_ignore_damaged_files(fakes, closed_url, tmp_path, caplog):
    fakes.url = closed_url
    (tmp_path / PARTS[0]).write_bytes(b"damaged")
    with pytest.raises(UsageError, match="is damaged or not fashion_mnist's"):
        load("auto", tmp_path)
    assert caplog.records == []


def test_auto_does_not_ignore_a_wrong_download(served, tmp_path, caplog):
    served.bodies[f"/fashion_mnist/{PARTS[1]}.gz"] = b"something else"
    with pytest.raises(CnnJaxError, match="sent another file"):
        load("auto", tmp_path)
    assert [record for record in caplog.records if record.name == "cnn_jax"] == []


def test_import_is_light():
    heavy = ["sklearn", "scipy", "tensorflow_datasets", "requests", "PIL", "jax", "tensorflow"]
    script = f"import sys, cnn_jax.data; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"
