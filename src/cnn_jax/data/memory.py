"""How much memory is available, and a limit on what several threads use at the same time."""

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
"""Where Linux says how much memory is available (proc_meminfo(5))."""

CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux says how much memory a container may use (cgroups(7), version 2 and 1); ``max`` if there is no limit."""


def available_memory() -> int:
    """The bytes of memory that can be used without swapping; without Linux, all of the machine's memory."""
    amounts = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError):
        amounts += [int(kilobytes) << 10 for kilobytes in re.findall(r"MemAvailable: +(\d+) kB", MEMINFO.read_text())]
    for path in CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):
            amounts.append(int(path.read_text()))
    return min(amounts)


class MemoryBudget:
    """Blocks threads while the total of the bytes they have reserved would exceed a limit.

    Attributes:
        total: the bytes that can be reserved at the same time.
        peak: the most bytes that have been reserved at the same time.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.peak = 0
        self._reserved = 0
        self._changed = threading.Condition()
        self._next = threading.Lock()

    @contextmanager
    def reserve(self, num_bytes: int) -> Iterator[None]:
        """Wait until a number of bytes is available, and reserve it until the context exits.

        A request larger than the total is granted when nothing else is reserved.
        """
        num_bytes = min(num_bytes, self.total)
        # Requests are granted in order: small ones overtaking a large one could make it wait forever.
        with self._next, self._changed:
            self._changed.wait_for(lambda: self._reserved + num_bytes <= self.total)
            self._reserved += num_bytes
            self.peak = max(self.peak, self._reserved)
        try:
            yield
        finally:
            with self._changed:
                self._reserved -= num_bytes
                self._changed.notify()
