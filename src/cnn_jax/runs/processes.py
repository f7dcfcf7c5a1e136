"""Processes that train a network together, on the devices of several machines, and how they agree.

All processes read the settings and the data, make the same calls in the same order, and compute the same state and the
same scores. Only the first one touches the run directory. The state is replicated, so that nothing is gained if others
write parts of it: a checkpoint does not depend on the number of processes, the machines need not share a file system,
and no process waits for another's files. What only the first process can know, such as a restored state, it sends to
the others.
"""

import pickle
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from cnn_jax.aborts import LOST_PROCESS
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.training.sharding import make_mesh, process_indices, sum_over_processes

Result = TypeVar("Result")

LOST = re.compile(r"Gloo|NCCL|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|coordination service", re.IGNORECASE)
"""What jax's errors contain if another process has ended: it raises errors of various types."""


class LostProcessError(CnnJaxError):
    """Another process ended before the training did."""

    def __init__(self) -> None:
        super().__init__(LOST_PROCESS)


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_index: int | None = None
) -> None:
    """Connect the processes, before jax initializes its devices; those of all processes become visible in each.

    Args:
        coordinator: the ``HOST:PORT`` at which the first process listens; None if the cluster says so, as TPU pods,
            SLURM, Open MPI and Kubernetes do.
        num_processes: the number of processes, or None likewise.
        process_index: the index of this process, counted from 0, or None likewise.

    Raises:
        UsageError: an argument is missing, and there is no cluster to ask.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        jax.distributed.initialize(coordinator, num_processes, process_index)
    except (RuntimeError, ValueError) as error:
        if "defined" in str(error):
            raise UsageError(
                "no TPU pod, SLURM, Open MPI or Kubernetes cluster was found: in each process, pass --coordinator "
                "HOST:PORT, --num-processes N and its own --process-index I"
            ) from None
        reason = str(error).partition("\n")[0][:200]
        raise UsageError(f"the processes cannot be connected ({reason}): check the flags of each") from None
    signal.signal(signal.SIGTERM, handler)  # jax has installed a handler of its own, in C++


def meet() -> None:
    """Wait until all processes have initialized their devices. Raises LostProcessError if one of them ends instead."""
    mesh = make_mesh()
    with Processes(mesh).reporting_loss():
        sum_over_processes(np.int32(1), mesh).block_until_ready()


class Processes:
    """The processes whose devices are in a mesh, all of which call the same methods in the same order.

    With a single process, the methods do nothing but call their arguments.

    Attributes:
        count: the number of processes.
        is_first: whether this is the one that writes and prints.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._indices = process_indices(mesh)
        self._rank = self._indices.index(jax.process_index())
        self.count = len(self._indices)
        self.is_first = self._rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run the body in all processes; if it raises a ``CnnJaxError`` in one of them, raise it in all."""
        error = None
        try:
            yield
        except CnnJaxError as own:
            if self.count == 1:
                raise
            error = own
        if self.count == 1:
            return
        answers = self._gather("" if error is None else f"{error.exit_status}{error}")
        if error is not None:
            raise error
        for index, answer in zip(self._indices, answers, strict=True):
            if answer:
                kind = UsageError if answer.startswith(str(UsageError.exit_status)) else CnnJaxError
                raise kind(f"process {index}: {answer[1:]}")

    def from_first(self, function: Callable[[], Result]) -> Result:
        """Call a function in the first process only, and return its result, or raise its error, in all.

        Processes of a training trust each other, so that the result is pickled.
        """
        if self.count == 1:
            return function()
        content = b""
        with self.together():
            if self.is_first:
                content = pickle.dumps(function())
        size = int(sum_over_processes(np.uint32(len(content)), self._mesh))
        content = np.frombuffer(content, np.uint8) if self.is_first else np.zeros(size, np.uint8)
        return pickle.loads(np.asarray(sum_over_processes(content, self._mesh)).tobytes())

    def check_same(self, what: str, value: str) -> None:
        """Raise UsageError if ``value``, a description or checksum of ``what``, differs between the processes."""
        if self.count == 1:
            return
        first, *others = self._gather(value)
        different = [index for index, other in zip(self._indices[1:], others, strict=True) if other != first]
        if different:
            raise UsageError(
                f"process {different[0]} has other {what} than process {self._indices[0]}: start all with the same"
            )

    def requested_in_any(self, requested: Callable[[], bool]) -> Callable[[], bool]:
        """A function that returns in all processes whether ``requested`` returned True in any of them.

        The answer is that of the previous call, which the devices have computed by now, so that they need not wait.
        """
        if self.count == 1:
            return requested
        total = np.int32(0)

        def any_requested() -> bool:
            nonlocal total
            before, total = total, sum_over_processes(np.int32(requested()), self._mesh)
            return int(before) > 0

        return any_requested

    @contextmanager
    def reporting_loss(self) -> Iterator[None]:
        """Raise LostProcessError for an error of jax that another process has caused by ending.

        On CPUs, this is noticed as soon as the operating system closes the connections of a process.
        """
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if self.count > 1 and LOST.search(str(error)):
                raise LostProcessError from error
            raise

    def _gather(self, text: str) -> list[str]:
        """The texts of all processes, in the order of their indices."""
        content = np.frombuffer(text.encode(errors="surrogatepass"), np.uint8)
        sizes = np.zeros(self.count, np.int32)
        sizes[self._rank] = len(content)
        sizes = np.asarray(sum_over_processes(sizes, self._mesh))
        rows = np.zeros((self.count, max(1, sizes.max())), np.uint8)
        rows[self._rank, : len(content)] = content
        rows = np.asarray(sum_over_processes(rows, self._mesh))
        pairs = zip(rows, sizes, strict=True)
        return [row[:size].tobytes().decode(errors="surrogatepass") for row, size in pairs]
