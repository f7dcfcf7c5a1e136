"""Weights by what --init-from names; torchvision's come from a server on 127.0.0.1."""

import hashlib
import http.server
import importlib.util
import os
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from cnn_jax import files
from cnn_jax.config import Config
from cnn_jax.data.download import DownloadError
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.formats.state_dict import flatten, to_state_dict
from cnn_jax.formats.weights import IMAGENET
from cnn_jax.models import create_model
from cnn_jax.runs import pretrained
from cnn_jax.runs.fit import fit
from cnn_jax.runs.pretrained import PUBLISHED, is_published, open_pretrained

SHAPE = (16, 16, 3)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def variables():
    """The shapes of the variables of a small network with torchvision's names."""
    return jax.eval_shape(create_model("resnet18", 4).init, jax.random.key(0), np.zeros((1, *SHAPE), np.float32))


@pytest.fixture
def state_dict(variables):
    torch = pytest.importorskip("torch")
    arrays = {name: np.full(leaf.shape, 0.5, np.float32) for name, leaf in flatten(variables).items()}
    return {name: torch.from_numpy(array.copy()) for name, array in to_state_dict(arrays, {}).items()}


@pytest.fixture
def server(tmp_path, monkeypatch, state_dict):
    """Publishes weights as resnet18; the paths that were asked for are in ``asked``."""
    torch = pytest.importorskip("torch")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=tmp_path / "served")

        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    asked = []
    file = tmp_path / "served" / "weights.pth"
    file.parent.mkdir()
    torch.save(state_dict, file, _use_new_zipfile_serialization=False)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    file = file.rename(file.with_name(f"resnet18-{digest}.pth"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{httpd.server_port}/{file.name}"
        size = file.stat().st_size + 1000
        monkeypatch.setitem(PUBLISHED, "resnet18", pretrained.Published(url, digest, size))
        httpd.asked, httpd.file = asked, file
        yield httpd
        httpd.shutdown()
        thread.join()


def test_they_are_torchvisions_default_weights():
    """Where torchvision is installed; of its file of this name only the text is read."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        pytest.skip("needs torchvision")
    source = (Path(spec.origin).parent / "models" / "resnet.py").read_text()
    for name, published in PUBLISHED.items():
        enum = source[source.index(f"class ResNet{name.removeprefix('resnet')}_Weights") :]
        default = enum[enum.index("DEFAULT = ") :].split()[2]
        weights = enum[enum.index(f"{default} = ") :]
        assert f'url="{published.url}"' in weights.splitlines()[1]
        megabytes = float(weights[weights.index('"_file_size": ') :].split()[1].strip(","))
        assert 0 < published.size / 2**20 - megabytes < 2
        assert len(published.checksum) == 8
        assert f"-{published.checksum}.pth" in published.url


def test_they_are_downloaded_once(server, variables):
    for _ in range(2):
        weights = open_pretrained("torchvision:resnet18")
        assert (weights.source, weights.preprocess) == ("torchvision:resnet18", IMAGENET)
        read = weights.variables("resnet18", variables, SHAPE)
        assert all((array == 0.5).all() for array in jax.tree.leaves(read))
    assert server.asked == [f"/{server.file.name}"]
    cached = files.user_cache() / "weights" / server.file.name
    assert cached.read_bytes() == server.file.read_bytes()
    assert [path.name for path in files.user_cache().iterdir()] == ["weights"]


def test_a_damaged_file_in_the_cache_is_downloaded_again(server):
    open_pretrained("torchvision:resnet18")
    cached = files.user_cache() / "weights" / server.file.name
    os.truncate(cached, 1000)
    open_pretrained("torchvision:resnet18")
    assert cached.read_bytes() == server.file.read_bytes()
    assert len(server.asked) == 2


def test_without_a_connection_it_is_said_what_to_do(server):
    server.file.unlink()
    with pytest.raises(
        DownloadError,
        match=r"cannot download http://127.*/resnet18-.*\.pth: HTTP status 404; download it by hand, and set "
        r"--init-from to the file",
    ):
        open_pretrained("torchvision:resnet18")
    assert not files.user_cache().exists()


@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content + bytes(2000)])
def test_another_file_is_not_kept(server, change):
    server.file.write_bytes(change(server.file.read_bytes()))
    with pytest.raises(CnnJaxError, match=r"sent another file than expected .*; try again later, or download it by"):
        open_pretrained("torchvision:resnet18")
    assert list(files.user_cache().iterdir()) == []


def test_missing_pytorch_is_said_before_the_download(server, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    with pytest.raises(UsageError, match=r"reading the state_dict torchvision:resnet18 needs PyTorch: pip install"):
        open_pretrained("torchvision:resnet18")
    assert server.asked == []


@pytest.mark.parametrize("name", ["resnet", "resnet180", "", "../resnet18"])
def test_unknown_names_are_refused(name):
    with pytest.raises(UsageError, match=r"there are no weights torchvision:.*known: torchvision:resnet18, "):
        open_pretrained(f"torchvision:{name}")


def test_a_path_is_none_of_these_names():
    assert is_published("torchvision:resnet18")
    assert not is_published("./torchvision:resnet18")
    with pytest.raises(UsageError, match="there is no file nowhere"):
        open_pretrained("nowhere")


def test_a_run_gives_its_weights_and_normalization(dataset, tmp_path):
    run = fit(Config(dataset="squares", epochs=1), tmp_path / "run", dataset=dataset, report=False)
    weights = open_pretrained(str(tmp_path / "run"))
    assert weights.preprocess == run.task.preprocess
    variables = weights.variables("cnn", run.state.variables, run.image_shape)
    jax.tree.map(np.testing.assert_array_equal, variables, run.state.variables)
