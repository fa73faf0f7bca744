"""Signals wake the loop through a socket (signal.set_wakeup_fd); the handlers only remember which ones came.

A byte that does not fit the socket is dropped by Python, and the signal is still remembered.
"""

from __future__ import annotations

import contextlib
import os
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
)
UNUSED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)
"""They mean something to other servers, and would end us, with nothing put away."""


def undo_inherited() -> None:
    """What a parent may have left us: signals that are blocked, and SIGCHLD ignored, with which nobody could tell how a
    child ended (waitpid(2), ECHILD). Both outlive an exec."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


class SignalSocket:
    """Installs the handlers, and gives them back at `close`."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._came: list[signal.Signals] = []
        # As PID 1 we collect strangers, too; every other child has a pidfd.
        handled = (*HANDLED, *UNUSED, *((signal.SIGCHLD,) if os.getpid() == 1 else ()))
        self._before = {number: signal.signal(number, self._remember) for number in handled}

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        found = signal.Signals(number)
        if found is not signal.SIGCHLD or found not in self._came:
            self._came.append(found)

    def fileno(self) -> int:
        return self._reader.fileno()

    def read(self) -> list[signal.Signals]:
        """The signals that came, in their order."""
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(4096)
        came, self._came = self._came, []
        return came

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        self._reader.close()
        self._writer.close()
