"""A bound on the memory that several threads take at one time."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class MemoryBudget:
    """Lets threads go on only as long as the sum of the bytes they have reserved stays within a total.

    Attributes:
        total: the bytes that may be reserved at one time.
        peak: the most bytes that have been reserved at one time.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.peak = 0
        self._reserved = 0
        self._changed = threading.Condition()
        self._next = threading.Lock()

    @contextmanager
    def reserve(self, num_bytes: int) -> Iterator[None]:
        """Wait until there is room for a number of bytes, and hold it until the context is left.

        What is larger than the total is let through when nothing else is reserved.
        """
        num_bytes = min(num_bytes, self.total)
        # Whoever waits for much is not overtaken by those that need little, or it might wait until they are all done.
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
