"""How long the devices have nothing to do because the next images are not ready."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import jax


class IdleTime:
    """Measures how long the devices are idle while the host does the work of this context.

    They are idle from the time at which they have computed what they were last given. Another thread waits for that,
    because the host must not: it is to be ahead of the devices.

    Args:
        pending: arrays that the devices may still be computing.
        thread: an executor with a single thread.

    Attributes:
        seconds: the time, after the context was left.
    """

    def __init__(self, pending: Any, thread: ThreadPoolExecutor) -> None:
        self.seconds = 0.0
        self._pending = pending
        self._thread = thread

    def __enter__(self) -> Self:
        self._began = time.perf_counter()
        self._finished = self._thread.submit(_time_of_completion, self._pending)
        return self

    def __exit__(self, *error: object) -> None:
        if self._finished.done():
            self.seconds = time.perf_counter() - max(self._began, self._finished.result())


def _time_of_completion(arrays: Any) -> float:
    jax.block_until_ready(arrays)
    return time.perf_counter()
