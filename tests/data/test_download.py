import hashlib
import itertools
import socket
import subprocess
import sys
import threading
import time

import pytest

from cnn_jax.data import download
from cnn_jax.data.download import DownloadError, fetch
from cnn_jax.errors import CnnJaxError
from cnn_jax.files import temporary_directory


def expected(url, body=b"content"):
    from tensorflow_datasets.core.download.checksums import UrlInfo

    return {url: UrlInfo(size=len(body), checksum=hashlib.sha256(body).hexdigest(), filename="file.gz")}


def test_fetch(server, tmp_path):
    server.bodies["/some/file.gz"] = b"content"
    fetch(expected(f"{server.url}/some/file.gz"), tmp_path, "set")
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} == {"set", "set/file.gz"}
    assert (tmp_path / "set" / "file.gz").read_bytes() == b"content"


@pytest.mark.parametrize("status", [404, 500, 503])
def test_http_errors_are_not_retried(server, tmp_path, status):
    server.bodies["/file.gz"] = status
    with pytest.raises(DownloadError, match=f"/file.gz: HTTP status {status};"):
        fetch(expected(f"{server.url}/file.gz"), tmp_path / "new", "set")
    assert server.asked == ["/file.gz"]
    assert not (tmp_path / "new").exists()


def test_server_that_is_down_fails_fast(closed_url, tmp_path):
    start = time.monotonic()
    with pytest.raises(DownloadError, match=r"/file.gz: no connection;"):
        fetch(expected(f"{closed_url}/file.gz"), tmp_path, "set")
    assert time.monotonic() - start < 3


def test_server_that_never_answers(no_proxy, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/file.gz"
        start = time.monotonic()
        with pytest.raises(DownloadError, match=r"/file.gz: no answer within 0.2 seconds;"):
            fetch(expected(url), tmp_path, "set", connect_timeout=0.2)
        assert time.monotonic() - start < 2


def test_timeout_of_name_resolution(server, tmp_path, monkeypatch):
    look_up = socket.getaddrinfo

    def slow(*arguments, **options):
        time.sleep(1.5)
        return look_up(*arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    start = time.monotonic()
    with pytest.raises(DownloadError, match="no answer within"):
        fetch(expected(f"{server.url}/file.gz"), tmp_path, "set", connect_timeout=0.2)
    assert time.monotonic() - start < 1


def stalling():
    yield b"con"
    time.sleep(1.5)
    yield b"tent"


def dripping():
    while True:
        yield b"x"
        time.sleep(0.02)


@pytest.mark.parametrize("pieces", [stalling, dripping])
def test_server_that_stalls(server, tmp_path, pieces):
    server.bodies["/file.gz"] = pieces()
    start = time.monotonic()
    with pytest.raises(DownloadError, match=r"/file.gz: stalled for 0.3 seconds; put the files into"):
        fetch(expected(f"{server.url}/file.gz", bytes(download.PIECE)), tmp_path, "set", stall_timeout=0.3)
    assert time.monotonic() - start < 1
    assert list(tmp_path.iterdir()) == []


def test_slow_but_steady(server, tmp_path):
    def steady():
        for _ in range(5):
            yield bytes(download.PIECE)
            time.sleep(0.1)

    server.bodies["/file.gz"] = steady()
    fetch(expected(f"{server.url}/file.gz", bytes(5 * download.PIECE)), tmp_path, "set", stall_timeout=0.3)
    assert (tmp_path / "set" / "file.gz").stat().st_size == 5 * download.PIECE


def test_no_more_is_received_than_expected(server, tmp_path):
    server.bodies["/file.gz"] = itertools.repeat(bytes(1 << 16))
    with pytest.raises(CnnJaxError, match="sent another file than expected"):
        fetch(expected(f"{server.url}/file.gz"), tmp_path, "set")
    until = time.monotonic() + 5
    while not server.sent and time.monotonic() < until:
        time.sleep(0.01)
    (sent,) = server.sent
    assert sent < 1 << 24  # buffers of the operating system
    assert list(tmp_path.iterdir()) == []


def test_lost_connection(no_proxy, tmp_path):
    def serve(listening):
        connection, _ = listening.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\ncon")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        with pytest.raises(DownloadError, match=r"/file.gz: connection lost;"):
            fetch(expected(f"http://127.0.0.1:{listening.getsockname()[1]}/file.gz"), tmp_path, "set")
        thread.join()
    assert list(tmp_path.iterdir()) == []


def test_https_is_tried_first(server, closed_url, tmp_path):
    server.bodies["/first/file.gz"] = server.bodies["/second/file.gz"] = b"content"
    url_infos = expected(f"{server.url}/second/file.gz")
    fetch(url_infos, tmp_path, "set", https={f"{server.url}/second/": f"{server.url}/first/"})
    fetch(url_infos, tmp_path, "set", https={f"{server.url}/second/": f"{closed_url}/first/"})
    assert server.asked == ["/first/file.gz", "/second/file.gz"]


def test_temporary_files_of_a_killed_process_are_removed(server, tmp_path):
    server.bodies["/file.gz"] = b"content"
    (tmp_path / ".cnn_jax-0123456789abcdef").mkdir()
    (tmp_path / ".cnn_jax-0123456789abcdef" / "file.gz").write_bytes(b"con")
    fetch(expected(f"{server.url}/file.gz"), tmp_path, "set")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_temporary_files_of_a_running_process_are_kept(server, tmp_path):
    server.bodies["/file.gz"] = b"content"
    with temporary_directory(tmp_path):  # holds the lock, as another process would
        (tmp_path / ".cnn_jax-fedcba9876543210").mkdir()
        fetch(expected(f"{server.url}/file.gz"), tmp_path, "set")
        assert (tmp_path / ".cnn_jax-fedcba9876543210").is_dir()


def test_unknown_host(no_proxy, tmp_path, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(DownloadError, match=r"http://host.invalid/file.gz: no connection;"):
        fetch(expected("http://host.invalid/file.gz"), tmp_path, "set")


def test_through_a_proxy(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", server.url)
    monkeypatch.setenv("http_proxy", server.url)
    url = "http://host.invalid/file.gz"
    server.bodies[url] = b"content"
    fetch(expected(url), tmp_path, "set")
    assert (tmp_path / "set" / "file.gz").read_bytes() == b"content"


@pytest.mark.parametrize("sent", [b"", b"CONTENT", b"content and more", b"<html>Log in to the network</html>"])
def test_downloads_are_verified(server, tmp_path, sent):
    server.bodies["/good.gz"] = b"good"
    server.bodies["/bad.gz"] = sent
    url_infos = expected(f"{server.url}/good.gz", b"good") | expected(f"{server.url}/bad.gz", b"content")
    with pytest.raises(CnnJaxError, match=r"/bad.gz sent another file than expected") as caught:
        fetch(url_infos, tmp_path, "set")
    assert not isinstance(caught.value, DownloadError)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_at_once(server, tmp_path):
    body = bytes(range(256)) * 4000
    server.bodies["/file.gz"] = body
    script = (
        "import pathlib, sys\n"
        "from tensorflow_datasets.core.download.checksums import UrlInfo\n"
        "from cnn_jax.data.download import fetch\n"
        "url, sha256, directory = sys.argv[1:]\n"
        f"fetch({{url: UrlInfo({len(body)}, sha256, 'file.gz')}}, pathlib.Path(directory), 'set')\n"
    )
    sha256 = hashlib.sha256(body).hexdigest()
    command = [sys.executable, "-c", script, f"{server.url}/file.gz", sha256, str(tmp_path)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} == {"set", "set/file.gz"}
    assert (tmp_path / "set" / "file.gz").read_bytes() == body
