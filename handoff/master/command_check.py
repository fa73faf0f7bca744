"""The check of a worker that is a command, made by a process of its own: the master waits for nobody."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Collection
from typing import NamedTuple

from handoff.binding import Listener
from handoff.core.dialects import CheckStatus
from handoff.description import bounded_file, content_of
from handoff.master.loop import Loop, Order
from handoff.settings import Settings

_MAXIMUM_REASON_BYTES = 4096
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class Checked(NamedTuple):
    """`is_good` is None where it could not be told; then, and for a bad one, with the reason."""

    is_good: bool | None
    reason: str


class CommandCheck:
    """One check. Owns its process; `close` may be called again."""

    def __init__(
        self,
        loop: Loop,
        pids: Collection[int],
        address: tuple[str, int],
        settings: Settings,
        on_end: Callable[[Checked], None],
    ) -> None:
        """`pids`: of the workers one of which is to answer. Raises OSError."""
        assert settings.check is not None
        self._loop = loop
        self._on_end = on_end
        host, port = address
        words = [",".join(map(str, pids)), host, str(port), settings.check, str(settings.check_timeout_seconds)]
        with contextlib.ExitStack() as undo:
            self._output = bounded_file("check", _MAXIMUM_REASON_BYTES)
            undo.callback(os.close, self._output)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "handoff.check_command", *words],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                process_group=0,
            )
            undo.callback(self._end)
            self._pidfd = os.pidfd_open(self._process.pid)
            undo.pop_all()
        self._is_open = True
        loop.watch(self._pidfd, Order.EXIT, self._ended)

    @property
    def pids(self) -> frozenset[int]:
        """Of its process, as long as that is not reaped."""
        return frozenset({self._process.pid} if self._is_open else ())

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._loop.forget(self._pidfd)
            self._end()
            os.close(self._pidfd)
            os.close(self._output)

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # not reaped yet, so the number is its own
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _ended(self) -> None:
        reason = content_of(self._output).decode(errors="replace")
        self.close()
        status = int(self._process.returncode)
        is_good = status == CheckStatus.GOOD if status in (CheckStatus.GOOD, CheckStatus.BAD) else None
        self._on_end(Checked(is_good, reason or f"the check ended with status {status}"))


def address_of_check(listeners: Collection[Listener]) -> tuple[str, int] | None:
    """Where a command is asked: its first TCP listener. None where it has none."""
    for listener in listeners:
        if listener.socket.type == socket.SOCK_STREAM and listener.socket.family in (socket.AF_INET, socket.AF_INET6):
            host, port = listener.socket.getsockname()[:2]
            return _ANY.get(host, host), port
    return None
