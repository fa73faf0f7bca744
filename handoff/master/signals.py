"""Signals as bytes in a socket: handlers do nothing, the loop reads (signal.set_wakeup_fd)."""

from __future__ import annotations

import contextlib
import signal
import socket
from types import FrameType

HANDLED = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGQUIT,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGCHLD,
)


def _ignore(_signum: int, _frame: FrameType | None) -> None:
    """The wakeup fd carries the signal's number; there is nothing left to do here."""


class SignalSocket:
    """Installs the handlers, and gives them back at `close`."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _ignore) for number in HANDLED}

    def fileno(self) -> int:
        return self._reader.fileno()

    def read(self) -> list[signal.Signals]:
        """The signals that came, in their order."""
        with contextlib.suppress(BlockingIOError):
            return [signal.Signals(number) for number in self._reader.recv(4096)]
        return []

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        self._reader.close()
        self._writer.close()
