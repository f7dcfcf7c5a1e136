"""Files fetched from the network by tensorflow-datasets' download manager: all of them, verified, or none."""

import queue
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from cnn_jax.errors import CnnJaxError, UsageError

if TYPE_CHECKING:
    from tensorflow_datasets.core.download.checksums import UrlInfo

PATIENCE = 5.0
"""Seconds a server has to answer."""


class DownloadError(CnnJaxError):
    """A file could not be had from the network.

    Attributes:
        cause: the address and what went wrong there, without the remedy that the full message adds.
    """

    def __init__(self, url: str, reason: str, directory: Path) -> None:
        self.cause = f"{url}: {reason}"
        super().__init__(f"cannot download {self.cause}; put the files into {directory}, or choose --dataset digits")


def fetch(url_infos: Mapping[str, "UrlInfo"], directory: Path, subdirectory: str) -> None:
    """Download files into ``directory/subdirectory``, each under the last part of its address.

    They are collected beside it and moved in whole and verified, so that nobody ever finds half a file there
    and two processes that do this at once leave the same files as one.

    Args:
        url_infos: by address, the size and sha256 sum to be expected.
        directory: made where it does not exist yet.
        subdirectory: made once the files are complete.

    Raises:
        DownloadError: no network, no answer, or a refusal; known within seconds.
        CnnJaxError: what the server sent is not the expected file.
        UsageError: the directory cannot be written to.
    """
    for url in url_infos:
        if reason := _refusal(url):
            raise DownloadError(url, reason, directory)

    import requests
    import tensorflow_datasets as tfds

    tfds.display_progress_bar(sys.stderr.isatty())
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=directory, ignore_cleanup_errors=True) as beside:
            manager = tfds.download.DownloadManager(
                download_dir=beside, url_infos=dict(url_infos), force_checksums_validation=True
            )
            fetched = {}
            # One at a time: when one fails no other is still being written where the clearing-up goes on.
            for url in url_infos:
                fetched[PurePosixPath(url).name] = Path(manager.download(url))
            (directory / subdirectory).mkdir(exist_ok=True)
            for name, path in fetched.items():
                path.replace(directory / subdirectory / name)
    except tfds.download.download_manager.NonMatchingChecksumError:
        raise CnnJaxError(
            f"{url} sent something else than the catalogue's file (size or sha256 differ); "
            f"try again later, or put the files into {directory}"
        ) from None
    except (requests.RequestException, tfds.download.DownloadError) as error:
        raise DownloadError(url, _reason(error), directory) from None
    except OSError as error:
        raise UsageError(
            f"cannot write to the data directory {directory}: {error.strerror}; give another with --data-dir"
        ) from None


def _refusal(url: str) -> str | None:
    """Why a file is not to be had, or nothing where the server begins to send it.

    Asked beforehand because the download manager knows no time-out and tries again for minutes; asked in a
    thread because looking up the host's name, and trying its addresses one by one, outlast any time-out
    that can be set.
    """
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(_ask(url)), daemon=True).start()
    try:
        return answers.get(timeout=PATIENCE)
    except queue.Empty:
        return _no_answer()


def _ask(url: str) -> str | None:
    import requests

    try:
        with requests.get(url, stream=True, timeout=PATIENCE) as response:
            response.raise_for_status()
    except requests.RequestException as error:
        return _reason(error)
    return None


def _no_answer() -> str:
    return f"no answer within {PATIENCE:g} seconds"


def _reason(error: Exception) -> str:
    """What went wrong, in the few words that requests itself does not find."""
    from requests import exceptions

    match error:
        case exceptions.HTTPError():
            return f"HTTP status {error.response.status_code}"
        case exceptions.Timeout():
            return _no_answer()
        case exceptions.ProxyError():
            return "the proxy does not answer"
        case exceptions.SSLError():
            return "the server's certificate is not accepted"
        case exceptions.ConnectionError():
            return "no connection"
        case _:
            return " ".join(str(error).split())
