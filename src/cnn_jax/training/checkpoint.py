"""Checkpoints of a training on its way; the only room that knows Orbax.

Each is a directory named by its step. When Orbax has written it, the sums of its files are added as ``sha256sums``, in
the form that the command of that name checks; a checkpoint without it was not finished, and one whose files do not
agree with it is damaged, which is found out before Orbax reads any of it.
"""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from cnn_jax.errors import CnnJaxError, UsageError

Which = Literal["newest", "best"]

SUMS = "sha256sums"

UNSCORED = -1.0
"""The test accuracy noted for a checkpoint inside an epoch, so that it is the best of none."""

MOST_PACKED = 100
"""How many times larger than its files a state may be; parameters that began at random do not get that much smaller."""

logger = logging.getLogger("cnn_jax")


class Checkpoint(NamedTuple):
    """A state, and whatever else was saved with it as JSON."""

    state: TrainState
    meta: dict[str, Any]


def restore(directory: Path, like: Callable[[dict[str, Any]], TrainState], which: Which = "newest") -> Checkpoint:
    """The newest checkpoint, or that of the best test accuracy; where that one is damaged, the next, with a warning.

    Args:
        directory: of the checkpoints.
        like: from a checkpoint's meta, the state to be expected, or its shapes and dtypes.
        which: the newest, or the best.

    Raises:
        UsageError: there is no checkpoint.
        CnnJaxError: none is whole, or what they hold is not this package's.
    """
    finished = [path for path in _checkpoints(directory) if (path / SUMS).is_file()]
    whole = [path for path in finished if _is_whole(path)]
    for path in finished:
        if path not in whole:
            logger.warning("the checkpoint %s is damaged and left out", path)
    if not whole:
        if finished:
            raise CnnJaxError(f"every checkpoint in {directory} is damaged: train the run anew")
        raise UsageError(f"{directory} holds no checkpoint: train the run first, or name another")
    # The sums tell an accident, not malice: what is in the files may be anything, and what Orbax makes of it too.
    try:
        metas = {path: json.loads((path / "meta" / "metadata").read_text(encoding="utf-8")) for path in whole}
        scores = {path: metas[path]["test_accuracy"] if which == "best" else 0 for path in whole}
        path = max(whole, key=lambda path: (scores[path], _step(path)))
        state = like(metas[path])
        if misfit := _misfit(path, state):
            raise CnnJaxError(f"{directory} holds checkpoints that are not this package's ({misfit})")
        template = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), _arrays(state))
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore(path.absolute() / "state", template)
        if arrays["step"] != _step(path):
            raise CnnJaxError(f"{path} holds another step than it is named by: train the run anew")
        return Checkpoint(state.replace(**jax.device_put(arrays)), metas[path])
    except CnnJaxError:
        raise
    except Exception as error:
        raise CnnJaxError(f"{directory} holds checkpoints that are not this package's ({_cause(error)})") from error


class CheckpointWriter:
    """Writes a run's checkpoints, keeping the newest two and the one of the best test accuracy.

    A context manager: leaving it waits for what is still being written.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep.AnyPreservationPolicy(
                [keep.LatestN(2), keep.BestN(n=1, get_metric_fn=_test_accuracy)]
            ),
            best_fn=_test_accuracy,  # Orbax writes metrics down only where it is given this too
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,  # the sums are to be written when Orbax is done: both in our own thread
        )
        with self._reporting():
            for path in _checkpoints(directory):
                if not _is_whole(path):  # out of the way, so that its step can be saved again
                    path.rename(path.with_name(f"damaged-{path.name}-{time.time_ns()}"))
            self._manager = ocp.CheckpointManager(directory.absolute(), options=options)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._manager.close()

    def save(self, state: TrainState, meta: dict[str, Any], test_accuracy: float = UNSCORED) -> None:
        """Begin to write a checkpoint; the state may be reused as soon as this returns.

        A step that has a checkpoint already keeps it.

        Args:
            state: saved whole, under the number of its step.
            meta: saved with it.
            test_accuracy: by which the best checkpoint is chosen.

        Raises:
            CnnJaxError: the checkpoint before could not be written.
        """
        self.wait()
        step = int(state.step)
        if step == self._manager.latest_step():
            return
        # Copies: on a CPU what jax.device_get returns is the device's own memory, which the next step reuses.
        arrays = jax.tree.map(np.array, _arrays(state))
        meta = {**meta, "test_accuracy": test_accuracy}
        self._writing = self._thread.submit(self._write, step, arrays, meta)

    def _write(self, step: int, arrays: dict[str, Any], meta: dict[str, Any]) -> None:
        items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta))
        _reserve(self._directory, 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)) + 2**18)
        self._manager.save(step, args=items, metrics=meta)
        path = self._directory / str(step)
        unfinished = path / f"{SUMS}.tmp"
        unfinished.write_text("".join(f"{sha256}  {name}\n" for name, sha256 in _sums(path).items()), encoding="utf-8")
        unfinished.replace(path / SUMS)

    def wait(self) -> None:
        """Wait for what is being written.

        Raises:
            CnnJaxError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        with self._reporting():
            writing.result()

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        # A full disk, a vanished directory, a file that is not Orbax's: it and what it stands on raise what they like.
        except Exception as error:
            raise CnnJaxError(
                f"cannot write a checkpoint to {self._directory} ({_cause(error)}): mend that, and go on with --resume"
            ) from error


def _reserve(directory: Path, size: int) -> None:
    """Raise OSError unless there is room for ``size`` bytes: when Orbax runs out of it, its threads print at length."""
    if shutil.disk_usage(directory).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _checkpoints(directory: Path) -> Sequence[Path]:
    return [path for path in directory.iterdir() if path.name.isdecimal()] if directory.is_dir() else []


def _step(path: Path) -> int:
    return int(path.name)


def _arrays(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _misfit(path: Path, state: TrainState) -> str | None:
    """How the arrays of a checkpoint differ from those expected, if they do: told before memory is taken for any."""
    leaves = jax.tree.leaves_with_path(_arrays(state))
    expected = {jax.tree_util.keystr(key, simple=True, separator="."): leaf for key, leaf in leaves}
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in expected.values())
    if size > MOST_PACKED * sum(file.stat().st_size for file in path.rglob("*") if file.is_file()):
        return f"{size} bytes are expected, and its files are too small for them"
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        saved = {leaf.name: leaf for leaf in jax.tree.leaves(handler.metadata(path.absolute() / "state").tree)}
    if saved.keys() != expected.keys():
        return "other arrays than are expected"
    for name, leaf in expected.items():
        # A chunk is unpacked as a whole, so none may be larger than its array.
        chunk = math.prod(saved[name].storage.chunk_shape)
        if (saved[name].shape, saved[name].dtype) != (leaf.shape, leaf.dtype) or chunk > max(1, math.prod(leaf.shape)):
            return f"{name} is not {leaf.dtype}{list(leaf.shape)}"
    return None


def _test_accuracy(metrics: dict[str, Any]) -> float:
    return metrics["test_accuracy"]


def _sums(path: Path) -> dict[str, str]:
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith(SUMS))
    return {str(file.relative_to(path)): _sha256(file) for file in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:  # not read as a whole: what is no checkpoint of ours may have any size
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(path: Path) -> bool:
    try:
        lines = (path / SUMS).read_text(encoding="utf-8").splitlines()
        return {name: sha256 for sha256, name in (line.split("  ", 1) for line in lines)} == _sums(path)
    except (OSError, ValueError):
        return False


def _cause(error: BaseException) -> str:
    # Tensorstore wraps the system's few words in many of its own.
    message = re.search(r"([^:]+) \[os_error_code", str(error)) or [None, getattr(error, "strerror", None)]
    return (message[1] or type(error).__name__).strip()
