"""The processors that a process may use."""

import os
import platform
from contextlib import suppress
from pathlib import Path


def num_processors() -> int:
    """The number of processors that this process may run on, as ``taskset`` sets it; a container's quota is ignored."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str:
    """The name of the CPU as the operating system reports it, or else its architecture."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
