"""Downloading files: all of them, verified, or none."""

import contextlib
import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Protocol

from cnn_jax import files
from cnn_jax.errors import CnnJaxError, UsageError

CONNECT_TIMEOUT = 5.0
"""Time for a server to start answering, in seconds."""

STALL_TIMEOUT = 15.0
"""Time in which at least ``PIECE`` bytes must arrive, in seconds."""

PIECE = 1 << 14
"""Number of bytes received at a time."""

HTTPS = {
    # The same bucket: S3's website endpoint, which tensorflow-datasets lists, does not support HTTPS.
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/": "https://fashion-mnist.s3.eu-central-1.amazonaws.com/",
    "http://codh.rois.ac.jp/": "https://codh.rois.ac.jp/",
}
"""HTTPS equivalents of URL prefixes in tensorflow-datasets."""


class UrlInfo(Protocol):
    """What is known about a file, such as tensorflow-datasets' ``UrlInfo``.

    Attributes:
        size: its size in bytes, or if only the beginning of the digest is known, an upper bound.
        checksum: the SHA-256 digest, or its beginning, in hexadecimal.
    """

    size: int
    checksum: str


class DownloadError(CnnJaxError):
    """A file could not be downloaded.

    Attributes:
        cause: the URL and the reason, without the remedy in the full message.
    """

    def __init__(self, url: str, reason: str, remedy: str) -> None:
        self.cause = f"{url}: {reason}"
        super().__init__(f"cannot download {self.cause}; {remedy}")


def fetch(
    url_infos: Mapping[str, UrlInfo],
    directory: Path,
    subdirectory: str,
    *,
    remedy: str | None = None,
    https: Mapping[str, str] = HTTPS,
    connect_timeout: float = CONNECT_TIMEOUT,
    stall_timeout: float = STALL_TIMEOUT,
) -> None:
    """Download files into ``directory/subdirectory``, each under the last component of its URL.

    They are written to a temporary directory, verified, and then renamed, so that there are never incomplete files and
    several processes can download the same files at once.

    Args:
        url_infos: the expected size and SHA-256 digest of each file, by URL.
        directory: created if it does not exist.
        subdirectory: created when all files are complete.
        remedy: what error messages say to do; by default that for a dataset.
        https: the URL prefixes to try first, by the prefix that they replace.
        connect_timeout: time for a server to start answering, in seconds.
        stall_timeout: time in which at least ``PIECE`` bytes must arrive, in seconds.

    Raises:
        DownloadError: a server cannot be reached, does not have the file, or stops sending.
        CnnJaxError: a server sent another file than expected.
        UsageError: the directory cannot be written to.
    """
    what_to_do = remedy or f"put the files into {directory}, or choose --dataset digits"
    with contextlib.ExitStack() as stack:
        # All servers are contacted before anything is written.
        transfers = []
        for url, info in url_infos.items():
            transfer = _started(url, info, what_to_do, https, (connect_timeout, stall_timeout))
            stack.callback(transfer.stop)
            transfers.append(transfer)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            temporary = stack.enter_context(files.temporary_directory(directory))
            advance = stack.enter_context(_bar(sum(transfer.size for transfer in transfers)))
            for transfer in transfers:
                _write(transfer, temporary, what_to_do, stall_timeout, advance)
            (directory / subdirectory).mkdir(exist_ok=True)
            for transfer in transfers:
                (temporary / transfer.name).replace(directory / subdirectory / transfer.name)
            files.sync(directory / subdirectory)
        except OSError as error:
            raise UsageError(
                f"cannot write to the data directory {directory}: {error.strerror}; "
                f"{remedy or 'use another one with --data-dir'}"
            ) from None


class _Transfer:
    """A download in a thread.

    The thread makes timeouts possible: those of requests do not include name resolution, apply to each of a host's
    addresses, and start again with every byte.

    Attributes:
        url: the URL of the file.
        name: the last component of the URL.
        size: the expected size in bytes, at most; of a larger file, a single byte more is received.
        sha256: the expected digest, or its beginning, in hexadecimal.
    """

    def __init__(self, url: str, info: UrlInfo, timeouts: tuple[float, float]) -> None:
        self.url = url
        self.name = PurePosixPath(url).name
        self.size = int(info.size)
        self.sha256 = info.checksum
        self._timeouts = tuple(2 * seconds for seconds in timeouts)  # ends the thread of an abandoned download
        self._received: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
        self._stopped = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def wait(self, seconds: float) -> bytes:
        """The next bytes: empty at the start, when the server has answered, and at the end.

        Raises:
            queue.Empty: there are none after this time.
            Exception: the download failed.
        """
        received = self._received.get(timeout=max(0.0, seconds))
        if isinstance(received, Exception):
            raise received
        return received

    def stop(self) -> None:
        """Make the thread end when it receives the next bytes."""
        self._stopped.set()

    def _run(self) -> None:
        try:
            for piece in self._pieces():
                self._received.put(piece)
                if self._stopped.is_set():
                    break
        except Exception as error:  # of requests, urllib3 or the system, raised again by wait()
            self._received.put(error)

    def _pieces(self) -> Iterator[bytes]:
        import requests

        # Without compression in transit, which could make the content a thousand times larger.
        headers = {"Accept-Encoding": "identity"}
        with requests.get(self.url, stream=True, timeout=self._timeouts, headers=headers) as response:
            response.raise_for_status()
            yield b""
            remaining = self.size + 1
            while remaining and (piece := response.raw.read(min(PIECE, remaining), decode_content=False)):
                remaining -= len(piece)
                yield piece
            yield b""


def _started(
    url: str, info: UrlInfo, remedy: str, https: Mapping[str, str], timeouts: tuple[float, float]
) -> _Transfer:
    """A download that the server has started to answer, over HTTPS if possible: the digest is verified in any case."""
    connect_timeout, _ = timeouts
    alternatives = [address + url.removeprefix(prefix) for prefix, address in https.items() if url.startswith(prefix)]
    for address in (*alternatives, url):
        transfer = _Transfer(address, info, timeouts)
        try:
            transfer.wait(connect_timeout)
        except Exception as error:
            transfer.stop()
            reason = _reason(error, connect_timeout)
        else:
            return transfer
    raise DownloadError(url, reason, remedy)


def _write(
    transfer: _Transfer, temporary: Path, remedy: str, stall_timeout: float, advance: Callable[[int], None]
) -> None:
    """Write a download to a file and verify it."""
    sha256 = hashlib.sha256()
    received = 0
    with (temporary / transfer.name).open("xb") as file:
        for piece in _received(transfer, remedy, stall_timeout):
            file.write(piece)
            sha256.update(piece)
            received += len(piece)
            advance(len(piece))
    if received > transfer.size or not sha256.hexdigest().startswith(transfer.sha256):
        raise CnnJaxError(
            f"{transfer.url} sent another file than expected (its size or SHA-256 digest differs); "
            f"try again later, or {remedy}"
        )
    files.sync(temporary / transfer.name)


def _received(transfer: _Transfer, remedy: str, stall_timeout: float) -> Iterator[bytes]:
    """The content of a download, in pieces.

    Raises:
        DownloadError: fewer than ``PIECE`` bytes arrived in ``stall_timeout`` seconds, or the connection was lost.
    """
    deadline, expected = time.monotonic() + stall_timeout, PIECE
    while True:
        try:
            piece = transfer.wait(deadline - time.monotonic())
        except queue.Empty:
            raise DownloadError(transfer.url, f"stalled for {stall_timeout:g} seconds", remedy) from None
        except Exception:
            raise DownloadError(transfer.url, "connection lost", remedy) from None
        if not piece:
            return
        yield piece
        expected -= len(piece)
        if expected <= 0:
            deadline, expected = time.monotonic() + stall_timeout, PIECE


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """A function that advances a progress bar by a number of bytes; the bar is shown on a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:  # a disabled bar prints a line break before rich 14
        yield lambda num_bytes: None
        return
    columns = (TextColumn("downloading"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as progress:
        task = progress.add_task("", total=total)
        yield lambda num_bytes: progress.advance(task, num_bytes)


def _reason(error: Exception, connect_timeout: float) -> str:
    """Why a server did not start to send a file, more briefly than in the messages of requests."""
    from requests import exceptions

    match error:
        case queue.Empty() | exceptions.Timeout():
            return f"no answer within {connect_timeout:g} seconds"
        case exceptions.HTTPError():
            return f"HTTP status {error.response.status_code}"
        case exceptions.ProxyError():
            return "no connection to the proxy"
        case exceptions.SSLError():
            return "the server's certificate is invalid"
        case exceptions.ConnectionError():
            return "no connection"
        case _:
            return " ".join(str(error).split())
