"""Checkpoints of training, saved with Orbax; no other module uses Orbax.

Each checkpoint is a directory named after its step. After Orbax has written it, the checksums of its files are added as
``sha256sums``, in the format of the ``sha256sum`` command. A checkpoint without this file is unfinished, and one whose
files do not match it is damaged; this is checked before Orbax reads anything.
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
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from cnn_jax import files
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.training.state import TrainState

Which = Literal["newest", "best"]
Result = TypeVar("Result")

SUMS = "sha256sums"
"""The name of the file with the checksums of a checkpoint."""

UNSCORED = -1.0
"""The accuracy recorded for a checkpoint within an epoch, so that it is never the best."""

DELETED = "deleted"
"""The directory that checkpoints are moved to before they are deleted."""

NAME = re.compile(rf"(0|[1-9][0-9]*)(\.orbax-checkpoint-tmp.*)?|damaged-\d+-\d+|{DELETED}", re.ASCII)
"""The names that this package and Orbax create in the checkpoint directory."""

MAX_METADATA_BYTES = 1 << 26
"""Maximum size of the metadata, and of the checksums, in bytes; a run of 100,000 epochs needs 30 million."""

MAX_FILES = 100
"""Maximum number of inodes a checkpoint needs; that of the model ``cnn`` needs about 40."""

MAX_COMPRESSION = 16
"""Maximum ratio of the size of a state to the size of its files.

Random parameters are hardly compressible; Adam's moments, initially zero, are two thirds of a state.
"""

logger = logging.getLogger("cnn_jax")


class Checkpoint(NamedTuple):
    """A state and its metadata, as JSON."""

    state: TrainState
    metadata: dict[str, Any]


def restore(directory: Path, target: Callable[[dict[str, Any]], TrainState], which: Which = "newest") -> Checkpoint:
    """Restore a checkpoint; if it is damaged, warn and restore the next one.

    If a training process replaces checkpoints meanwhile, this starts again.

    Args:
        directory: the checkpoint directory.
        target: maps a checkpoint's metadata to the expected state, or its shapes and dtypes.
        which: the newest checkpoint, or the one with the best accuracy.

    Raises:
        UsageError: there is no checkpoint.
        CnnJaxError: all checkpoints are damaged, or were not written by this package.
    """

    def read(path: Path) -> Checkpoint:
        metadata = _read_metadata(path)
        state = target(metadata)
        if mismatch := _structure_mismatch(path, state):
            raise _foreign(directory, mismatch)
        template = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), _arrays(state))
        with ocp.StandardCheckpointer(multiprocessing_options=_only_this_process()) as checkpointer:
            arrays = checkpointer.restore(path.absolute() / "state", template)
        if arrays["step"] != _step(path):
            raise CnnJaxError(f"{path} contains the state of another step: start a new run")
        return Checkpoint(state.replace(**jax.device_put(arrays)), metadata)

    checkpoint, damaged = _read_one(directory, which, read)
    for path in damaged:
        if path.exists():
            logger.warning("checkpoint %s is damaged and ignored", path)
    return checkpoint


def newest_metadata(directory: Path) -> dict[str, Any]:
    """Read the metadata of the newest undamaged checkpoint. Raises the same errors as ``restore``."""
    return _read_one(directory, "newest", _read_metadata)[0]


def _read_one(directory: Path, which: Which, read: Callable[[Path], Result]) -> tuple[Result, Sequence[Path]]:
    """Call ``read`` on the first undamaged checkpoint; return its result, and the damaged ones that were skipped."""
    while True:
        finished = _finished(directory)
        try:
            path, damaged = _choose(directory, finished, which)
            return read(path), damaged
        except Exception as error:
            if _finished(directory) != finished:  # they were replaced meanwhile
                continue
            if isinstance(error, CnnJaxError | MemoryError):
                raise
            # Checksums detect accidental damage only: with crafted files, Orbax may raise anything.
            raise _foreign(directory, _cause(error)) from error


def _choose(directory: Path, finished: Sequence[Path], which: Which) -> tuple[Path, Sequence[Path]]:
    """The checkpoint to read, and the damaged ones that were skipped."""
    if not finished:
        raise UsageError(f"{directory} contains no checkpoint: train the run first, or choose another run directory")
    if which == "best":
        damaged = [path for path in finished if not _is_whole(path)]
        whole = [path for path in finished if path not in damaged]
        if whole:
            return max(whole, key=lambda path: (_read_metadata(path)["accuracy"], _step(path))), damaged
    else:
        damaged = []
        for path in sorted(finished, key=_step, reverse=True):
            if _is_whole(path):
                return path, damaged
            damaged.append(path)
    raise CnnJaxError(f"every checkpoint in {directory} is damaged: start a new run")


def _foreign(directory: Path, reason: str) -> CnnJaxError:
    return CnnJaxError(f"the checkpoints in {directory} were not written by this package ({reason})")


def _read_metadata(path: Path) -> dict[str, Any]:
    return json.loads(files.read_bytes(path / "meta" / "metadata", MAX_METADATA_BYTES))


def holds_only_a_start(directory: Path) -> bool:
    """Whether a checkpoint directory is missing, empty, or contains only an unfinished first checkpoint."""
    if not _entries(directory) and not directory.exists():
        return True
    names = [path.name for path in directory.iterdir() if not path.name.startswith(".")]
    return not _finished(directory) and all(re.fullmatch(r"0(\.orbax-checkpoint-tmp.*)?", name) for name in names)


class CheckpointWriter:
    """Writes a run's checkpoints, keeping the newest two and the one with the best accuracy.

    A context manager: leaving it waits until the last checkpoint is written.

    Args:
        directory: the checkpoint directory, created if it does not exist.

    Raises:
        CnnJaxError: the directory cannot be written.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep.AnyPreservationPolicy([keep.LatestN(2), keep.BestN(n=1, get_metric_fn=_accuracy)]),
            best_fn=_accuracy,  # without this, Orbax does not save metrics
            cleanup_tmp_directories=True,
            todelete_subdir=DELETED,  # renamed atomically, so that no reader finds half a checkpoint
            # Our own thread, because checksums are added after the checkpoint's last file: Orbax calls
            # AsyncOptions.post_finalization_callback before it writes that file and renames the checkpoint.
            enable_async_checkpointing=False,
            multiprocessing_options=_only_this_process(),
            create=False,
        )
        with self._reporting():
            _set_damaged_aside(directory)
            directory.mkdir(parents=True, exist_ok=True)
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

    def save(self, state: TrainState, metadata: dict[str, Any], accuracy: float | None) -> None:
        """Start writing a checkpoint; the state's memory may be reused as soon as this returns.

        If the state's step already has a checkpoint, this does nothing.

        Args:
            state: the state to save.
            metadata: saved with the state as JSON.
            accuracy: the accuracy by which the best checkpoint is chosen; None if this one is not a candidate.

        Raises:
            CnnJaxError: the previous checkpoint could not be written.
        """
        self.wait()
        step = int(state.step)
        if step == self._manager.latest_step():
            return
        # Copies, because on a CPU jax.device_get returns a view of the device's memory, which the next step reuses.
        arrays = jax.tree.map(np.array, _arrays(state))
        score = {"accuracy": UNSCORED if accuracy is None else accuracy}
        self._writing = self._thread.submit(self._write, step, arrays, metadata | score, score)

    def _write(self, step: int, arrays: dict[str, Any], metadata: dict[str, Any], score: dict[str, float]) -> None:
        if not self._directory.is_dir():  # Orbax would not report it
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._directory))
        items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(metadata))
        _check_free_space(self._directory, 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)) + 2**18)
        if not self._manager.save(step, args=items, metrics=score):  # Orbax skips steps before those that it finds
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self._directory))
        path = self._directory / str(step)
        _sync_tree(path)
        with files.replacing(path / SUMS) as sums:
            sums.write_text("".join(f"{sha256}  {name}\n" for name, sha256 in _sums(path).items()), encoding="utf-8")
        files.sync(self._directory)
        shutil.rmtree(self._directory / DELETED, ignore_errors=True)

    def wait(self) -> None:
        """Wait until the last checkpoint is written.

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
        # On a full disk or a missing directory, for example, Orbax and TensorStore may raise any exception.
        except Exception as error:
            raise CnnJaxError(
                f"cannot write a checkpoint to {self._directory} ({_cause(error)}): fix this, then rerun with --resume"
            ) from error


def _only_this_process() -> ocp.options.MultiprocessingOptions:
    """Options with which Orbax does not wait for the other processes of a training."""
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process_{index}"
    )


def _check_free_space(directory: Path, size: int) -> None:
    """Raise OSError unless the disk has ``size`` bytes and enough inodes free.

    If Orbax ran out of space, earlier checkpoints would stay intact, but the retries of its threads take a while.
    """
    disk = os.statvfs(directory)
    # File systems that allocate inodes dynamically report a total of 0.
    if disk.f_bavail * disk.f_frsize < size or (disk.f_files and disk.f_favail < MAX_FILES):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _set_damaged_aside(directory: Path) -> None:
    """Rename damaged and unfinished checkpoints, so that their steps can be saved again.

    Those renamed when the run was last resumed are removed.
    """
    for path in _entries(directory):
        if re.fullmatch(rf"damaged-\d+-\d+|{re.escape(DELETED)}", path.name):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.isdecimal() and not _is_whole(path):
            path.rename(path.with_name(f"damaged-{path.name}-{time.time_ns()}"))


def _entries(directory: Path) -> Sequence[Path]:
    """The checkpoints in a directory, finished or not.

    Raises:
        CnnJaxError: the directory, or an entry with the name of a checkpoint, is a symbolic link or a file.
    """
    try:
        if not stat.S_ISDIR(directory.lstat().st_mode):
            raise CnnJaxError(f"{directory} is not a directory: remove it")
        entries = [path for path in directory.iterdir() if NAME.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    directories = []
    for path in entries:
        with contextlib.suppress(FileNotFoundError):  # a training process replaces checkpoints
            if not stat.S_ISDIR(path.lstat().st_mode):
                raise CnnJaxError(f"{path} is not a checkpoint: remove it")
            directories.append(path)
    return directories


def _finished(directory: Path) -> Sequence[Path]:
    """The finished checkpoints."""
    return [path for path in _entries(directory) if path.name.isdecimal() and (path / SUMS).is_file()]


def _step(path: Path) -> int:
    return int(path.name)


def _arrays(state: TrainState) -> dict[str, Any]:
    """The fields of a state that contain arrays, by name."""
    return {name: tree for name, tree in vars(state).items() if jax.tree.leaves(tree)}


def _structure_mismatch(path: Path, state: TrainState) -> str | None:
    """How the arrays of a checkpoint differ from the expected ones, or None; checked before any memory is allocated."""
    leaves = jax.tree.leaves_with_path(_arrays(state))
    expected = {jax.tree_util.keystr(key, simple=True, separator="."): leaf for key, leaf in leaves}
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in expected.values())
    if size > MAX_COMPRESSION * sum(file.lstat().st_size for file in _files(path)):
        return f"its files are too small for the expected {size} bytes"
    with contextlib.closing(ocp.StandardCheckpointHandler(multiprocessing_options=_only_this_process())) as handler:
        saved = {leaf.name: leaf for leaf in jax.tree.leaves(handler.metadata(path.absolute() / "state").tree)}
    if saved.keys() != expected.keys():
        return "its arrays do not have the expected names"
    for name, leaf in expected.items():
        # A chunk is decompressed as a whole, so none may be larger than its array.
        chunk = math.prod(saved[name].storage.chunk_shape)
        if (saved[name].shape, saved[name].dtype) != (leaf.shape, leaf.dtype) or chunk > max(1, math.prod(leaf.shape)):
            return f"{name} is not {leaf.dtype}{list(leaf.shape)}"
    return None


def _accuracy(metrics: dict[str, Any]) -> float:
    return metrics["accuracy"]


def _files(path: Path) -> Sequence[Path]:
    """The files of a checkpoint, without its checksums.

    Raises:
        OSError: an entry is neither a directory nor a regular file, or a file is sparse. Orbax writes no sparse files,
            and a small one could take any amount of time and memory to read.
    """
    found = []
    for folder, folders, names in os.walk(path, onerror=_raise):
        if links := [name for name in folders if Path(folder, name).is_symlink()]:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(Path(folder, links[0])))
        for file in (Path(folder, name) for name in names):
            if file.parent == path and (file.name == SUMS or files.is_temporary(file)):
                continue
            with files.open_regular(file) as opened:
                size = os.fstat(opened.fileno()).st_size
                if size > 0 and os.lseek(opened.fileno(), 0, os.SEEK_HOLE) < size:
                    raise OSError(errno.EINVAL, "a file with holes", str(file))
            found.append(file)
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _sync_tree(path: Path) -> None:
    """Wait until all files and directories below a path are on the disk."""
    for folder, _, names in os.walk(path):
        for name in names:
            files.sync(Path(folder, name))
        files.sync(Path(folder))


def _sums(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): _sha256(file) for file in _files(path)}


def _sha256(path: Path) -> str:
    with files.open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(path: Path) -> bool:
    try:
        lines = files.read_bytes(path / SUMS, MAX_METADATA_BYTES).decode().splitlines()
        return {name: sha256 for sha256, name in (line.split("  ", 1) for line in lines)} == _sums(path)
    except (OSError, ValueError):
        return False


def _cause(error: BaseException) -> str:
    # TensorStore adds many details to the operating system's message.
    message = re.search(r"([^:]+) \[os_error_code", str(error)) or [None, getattr(error, "strerror", None)]
    return (message[1] or type(error).__name__).strip()
