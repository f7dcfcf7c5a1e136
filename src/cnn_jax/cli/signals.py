"""Ctrl-C and other signals that ask a process to stop."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Self

from cnn_jax.cli.streams import STDERR, write_to_stderr
from cnn_jax.files import remove_own_temporaries

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a request to terminate, and a closed terminal or connection."""

SHOW_CURSOR = b"\x1b[?25h"
"""The escape sequence that shows the cursor, which the progress bar hides."""


@contextlib.contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the stop signals inside this context; ignored signals stay ignored.

    Shells ignore Ctrl-C in background processes, and ``nohup`` ignores SIGHUP.
    """
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    before = {number: earlier for number, earlier in before.items() if earlier != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def stop_at_once(number: int, frame: FrameType | None) -> None:
    """Exit with a message and the exit status that a shell reports.

    This raises no exception because jax's callbacks would swallow it or be left in an inconsistent state.
    """
    remove_own_temporaries()
    write_to_stderr((SHOW_CURSOR if os.isatty(STDERR) else b"") + b"interrupted\n")
    os._exit(128 + number)


class StopSignals:
    """Inside this context, a stop signal makes ``received`` true instead of ending the process.

    A signal before the first call of ``received``, when there is nothing to save, ends the process, as does a second.
    """

    def __enter__(self) -> Self:
        self._signal: int | None = None
        self._asked = False
        self._handling = handling(self._receive)
        self._handling.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._handling.__exit__(None, None, None)

    def received(self) -> bool:
        """Whether a stop signal was received."""
        self._asked = True
        return self._signal is not None

    @property
    def exit_status(self) -> int:
        """The exit status that a shell reports for the signal, or for SIGTERM if another process received one."""
        return 128 + (self._signal or signal.SIGTERM)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None or not self._asked:
            stop_at_once(number, frame)  # nothing to wait for
        self._signal = number
        write_to_stderr(b"stopping after this chunk; interrupt again to stop immediately\n")
