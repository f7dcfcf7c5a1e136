"""Small datasets in the format of MNIST, a server on 127.0.0.1 with their files, and folders of images."""

import contextlib
import gzip
import hashlib
import http.server
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import numpy as np
import pytest
from folders import cache_files, load, put_split

from cnn_jax.data import folder, mnist
from cnn_jax.data.mnist import FAMILIES, PARTS, Family

COUNTS = (6, 4)
SHAPE = (5, 4, 1)
CLASSES = ("a", "b", "c")


def _idx_bytes(array: np.ndarray, type_code: int = 8) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, type_code, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def idx_bytes() -> Callable[..., bytes]:
    """Encodes an array of unsigned bytes, independently of the code under test."""
    return _idx_bytes


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes requests to this machine without a proxy."""
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def server(no_proxy: None) -> Iterator[SimpleNamespace]:
    """Serves ``bodies`` (by path) and records the paths that were requested in ``asked``.

    A number is answered as that status; an iterator's pieces are sent one by one, until it ends or the client hangs up,
    and how many were is added to ``sent``.
    """
    state = SimpleNamespace(bodies={}, asked=[], sent=[])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state.asked.append(self.path)
            body = state.bodies.get(self.path, 404)
            if isinstance(body, Iterator):
                self.send_pieces(body)
                return
            self.send_response(body if isinstance(body, int) else 200)
            body = b"" if isinstance(body, int) else body
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def send_pieces(self, pieces):
            self.send_response(200)
            self.end_headers()
            sent = 0
            with contextlib.suppress(OSError):
                for piece in pieces:
                    self.wfile.write(piece)
                    sent += len(piece)
            state.sent.append(sent)

        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_):
            pass  # a client that hangs up

    httpd = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{httpd.server_port}"
    yield state
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.fixture
def closed_url(no_proxy: None) -> str:
    """The URL of a server that is down."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{reserved.getsockname()[1]}"


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replaces the datasets of tensorflow-datasets with small ones, with their files at ``fakes.url``.

    ``files[name][part]`` are a file's unpacked bytes, ``arrays[name][part]`` what they hold;
    ``put(name, directory, form)`` writes a family's files in one of the forms they are found in.
    """
    from tensorflow_datasets.core.download.checksums import UrlInfo

    rng = np.random.default_rng(0)
    state = SimpleNamespace(url="http://unused.invalid", arrays={}, files={}, gzipped={})
    for name in FAMILIES:
        shapes = [shape for count in COUNTS for shape in ((count, *SHAPE[:2]), (count,))]
        highest = [256, len(CLASSES), 256, len(CLASSES)]
        state.arrays[name] = {
            part: rng.integers(0, high, shape, np.uint8)
            for part, shape, high in zip(PARTS, shapes, highest, strict=True)
        }
        state.files[name] = {part: _idx_bytes(array) for part, array in state.arrays[name].items()}
        state.gzipped[name] = {part: gzip.compress(body, mtime=0) for part, body in state.files[name].items()}

    def family(name: str, directory: Path) -> Family:
        urls = {part: f"{state.url}/{name}/{part}.gz" for part in PARTS}
        url_infos = {
            url: UrlInfo(
                size=len(state.gzipped[name][part]),
                checksum=hashlib.sha256(state.gzipped[name][part]).hexdigest(),
                filename=PurePosixPath(url).name,
            )
            for part, url in urls.items()
        }
        unpacked = {hashlib.sha256(body).hexdigest(): part for part, body in state.files[name].items()}
        known = {} if name == "kmnist" else unpacked
        return Family(name, CLASSES, SHAPE, COUNTS, urls, url_infos, known)

    def put(name: str, directory: Path, form: str = "gzip") -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for part in PARTS:
            if form == "gzip":
                (directory / f"{part}.gz").write_bytes(state.gzipped[name][part])
            else:
                spelling = part if form == "plain" else part.replace("-idx", ".idx")
                (directory / spelling).write_bytes(state.files[name][part])

    monkeypatch.setattr(mnist, "family", family)
    state.put = put
    return state


@pytest.fixture
def served(fakes: SimpleNamespace, server: SimpleNamespace) -> SimpleNamespace:
    """The server, with the files of all datasets."""
    fakes.url = server.url
    server.bodies = {
        f"/{name}/{part}.gz": body for name, parts in fakes.gzipped.items() for part, body in parts.items()
    }
    return server


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A user's cache of this test only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(own_cache, tmp_path):
    """The path of a folder of images, which does not exist yet."""
    return tmp_path / "pictures"


@pytest.fixture
def decoded(monkeypatch):
    """The files that are decoded after this fixture is set up."""
    paths = []
    read = folder.read_image
    monkeypatch.setattr(folder, "read_image", lambda file, *args: paths.append(file.name) or read(file, *args))
    return paths


@pytest.fixture(scope="module")
def open_events():
    """A list of functions to call with the path of each file before it is opened."""
    functions = []

    def hook(event, args):
        if event == "open" and functions:
            for function in functions:
                function(str(args[0]))

    sys.addaudithook(hook)  # hooks cannot be removed
    return functions


@pytest.fixture
def before_opening(open_events):
    """Calls a function before a file is opened."""
    yield lambda path, action: open_events.append(lambda opened: opened == str(path) and action())
    open_events.clear()


@pytest.fixture
def kept(root):
    """A folder whose images are cached, and the cache file."""
    put_split(root, {"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}})
    load(root)
    (cache,) = cache_files()
    return root, cache
