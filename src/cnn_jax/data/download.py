"""Files fetched from the network: all of them, verified, or none."""

import contextlib
import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from cnn_jax import files
from cnn_jax.errors import CnnJaxError, UsageError

if TYPE_CHECKING:
    from tensorflow_datasets.core.download.checksums import UrlInfo

PATIENCE = 5.0
"""Seconds a server has to answer."""

STALL = 15.0
"""Seconds in which at least ``PIECE`` bytes must arrive."""

PIECE = 1 << 14
"""Bytes that are received at once."""

HTTPS = {
    # The same bucket: by the address of S3's web sites, which the catalogue has, it is not served with encryption.
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/": "https://fashion-mnist.s3.eu-central-1.amazonaws.com/",
    "http://codh.rois.ac.jp/": "https://codh.rois.ac.jp/",
}
"""By the beginning of an address in tensorflow-datasets' catalogue, where the same files are served with encryption."""


class DownloadError(CnnJaxError):
    """A file could not be had from the network.

    Attributes:
        cause: the address and what went wrong there, without the remedy that the full message adds.
    """

    def __init__(self, url: str, reason: str, directory: Path) -> None:
        self.cause = f"{url}: {reason}"
        super().__init__(f"cannot download {self.cause}; put the files into {directory}, or choose --dataset digits")


def fetch(
    url_infos: Mapping[str, "UrlInfo"],
    directory: Path,
    subdirectory: str,
    *,
    https: Mapping[str, str] = HTTPS,
    patience: float = PATIENCE,
    stall: float = STALL,
) -> None:
    """Download files into ``directory/subdirectory``, each under the last part of its address.

    They are collected beside it and moved in whole and verified, so that nobody ever finds half a file there
    and two processes that do this at once leave the same files as one.

    Args:
        url_infos: by address, the size and sha256 sum to be expected.
        directory: made where it does not exist yet.
        subdirectory: made once the files are complete.
        https: by the beginning of an address, the one to try first in its place.
        patience: seconds a server has to answer.
        stall: seconds in which at least ``PIECE`` bytes must arrive.

    Raises:
        DownloadError: no network, no answer, a refusal, or a transfer that stalls; known within seconds.
        CnnJaxError: what the server sent is not the expected file.
        UsageError: the directory cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        # All are asked before anything is written.
        transfers = []
        for url, info in url_infos.items():
            transfer = _started(url, info, directory, https, (patience, stall))
            stack.callback(transfer.stop)
            transfers.append(transfer)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            temporary = stack.enter_context(files.temporary_directory(directory))
            advance = stack.enter_context(_bar(sum(transfer.size for transfer in transfers)))
            for transfer in transfers:
                _write(transfer, temporary, directory, stall, advance)
            (directory / subdirectory).mkdir(exist_ok=True)
            for transfer in transfers:
                (temporary / transfer.name).replace(directory / subdirectory / transfer.name)
            files.sync(directory / subdirectory)
        except OSError as error:
            raise UsageError(
                f"cannot write to the data directory {directory}: {error.strerror}; give another with --data-dir"
            ) from None


class _Transfer:
    """A file that a thread is receiving.

    In a thread because looking up the host's name, and trying its addresses one by one, outlast any time-out that can
    be set, and because the time-out of a connection starts anew with every byte.

    Attributes:
        url: its address.
        name: the last part of the address.
        size: the bytes to be expected; of more, only so many are received as show that there are more.
        sha256: to be expected, in hexadecimal.
    """

    def __init__(self, url: str, info: "UrlInfo", limits: tuple[float, float]) -> None:
        self.url = url
        self.name = PurePosixPath(url).name
        self.size = int(info.size)
        self.sha256 = info.checksum
        self._timeout = tuple(2 * seconds for seconds in limits)  # for the thread to end, after it has been given up
        self._received: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
        self._stopped = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def wait(self, seconds: float) -> bytes:
        """The next bytes: none at first, when the server has answered, and none at the end.

        Raises:
            queue.Empty: there are none after so many seconds.
            Exception: what ended the transfer.
        """
        received = self._received.get(timeout=max(0.0, seconds))
        if isinstance(received, Exception):
            raise received
        return received

    def stop(self) -> None:
        """Let the thread end with the bytes that it receives next."""
        self._stopped.set()

    def _run(self) -> None:
        try:
            for piece in self._pieces():
                self._received.put(piece)
                if self._stopped.is_set():
                    break
        except Exception as error:  # of requests, urllib3 or the system: wait() raises it
            self._received.put(error)

    def _pieces(self) -> Iterator[bytes]:
        import requests

        # As the file is stored: what is unpacked on the way may be a thousand times as much.
        headers = {"Accept-Encoding": "identity"}
        with requests.get(self.url, stream=True, timeout=self._timeout, headers=headers) as response:
            response.raise_for_status()
            yield b""
            left = self.size + 1
            while left and (piece := response.raw.read(min(PIECE, left), decode_content=False)):
                left -= len(piece)
                yield piece
            yield b""


def _started(
    url: str, info: "UrlInfo", directory: Path, https: Mapping[str, str], limits: tuple[float, float]
) -> _Transfer:
    """A transfer that the server has begun to answer, with encryption if it can be had: what counts is the sum."""
    patience, _ = limits
    addresses = [address + url.removeprefix(start) for start, address in https.items() if url.startswith(start)]
    for address in (*addresses, url):
        transfer = _Transfer(address, info, limits)
        try:
            transfer.wait(patience)
        except Exception as error:
            transfer.stop()
            reason = _reason(error, patience)
        else:
            return transfer
    raise DownloadError(url, reason, directory)


def _write(transfer: _Transfer, temporary: Path, directory: Path, stall: float, advance: Callable[[int], None]) -> None:
    """Write what arrives to a file, unless it is not what is expected."""
    sha256 = hashlib.sha256()
    received = 0
    with (temporary / transfer.name).open("xb") as file:
        for piece in _arriving(transfer, directory, stall):
            file.write(piece)
            sha256.update(piece)
            received += len(piece)
            advance(len(piece))
    if (received, sha256.hexdigest()) != (transfer.size, transfer.sha256):
        raise CnnJaxError(
            f"{transfer.url} sent something else than the catalogue's file (size or sha256 differ); "
            f"try again later, or put the files into {directory}"
        )
    files.sync(temporary / transfer.name)


def _arriving(transfer: _Transfer, directory: Path, stall: float) -> Iterator[bytes]:
    """What a transfer brings until its end.

    Raises:
        DownloadError: less than ``PIECE`` bytes within ``stall`` seconds, or the connection broke.
    """
    deadline, due = time.monotonic() + stall, PIECE
    while True:
        try:
            piece = transfer.wait(deadline - time.monotonic())
        except queue.Empty:
            raise DownloadError(transfer.url, f"stalled for {stall:g} seconds", directory) from None
        except Exception:
            raise DownloadError(transfer.url, "the connection broke", directory) from None
        if not piece:
            return
        yield piece
        due -= len(piece)
        if due <= 0:
            deadline, due = time.monotonic() + stall, PIECE


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of bytes that arrived, which a terminal shows on a bar."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("downloading"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=total)
        yield lambda num_bytes: progress.advance(task, num_bytes)


def _reason(error: Exception, patience: float) -> str:
    """Why a server did not begin to send a file, in the few words that requests itself does not find."""
    from requests import exceptions

    match error:
        case queue.Empty() | exceptions.Timeout():
            return f"no answer within {patience:g} seconds"
        case exceptions.HTTPError():
            return f"HTTP status {error.response.status_code}"
        case exceptions.ProxyError():
            return "the proxy does not answer"
        case exceptions.SSLError():
            return "the server's certificate is not accepted"
        case exceptions.ConnectionError():
            return "no connection"
        case _:
            return " ".join(str(error).split())
