"""The master's own log: one line for each transition, written so that a stalled reader never blocks the master."""

from __future__ import annotations

import json
import os
import select
import socket
import stat
import time
import traceback
from collections.abc import Mapping
from typing import Literal

MAXIMUM_HELD_LINES = 500
MAXIMUM_LINE_BYTES = 64 * 1024


class MasterLog:
    """Writes to a file descriptor, by default stderr, which it borrows. What cannot be written is dropped and counted.

    O_NONBLOCK would be shared with every worker that inherits the same stderr, so a pipe or terminal is opened anew
    where the kernel allows that, and asked first (poll) where it does not. A regular file never blocks, and is written
    through the fd that the workers share: a second file offset would let them overwrite our lines.
    """

    def __init__(self, format: Literal["text", "json"] = "text", fd: int = 2) -> None:
        self._format = format
        self._fd, self._own, self._socket = _open_without_blocking(fd)
        self._is_file = _is_regular(self._fd)
        self._held: list[bytes] | None = None
        self._is_muted = False
        self.dropped = 0

    # --- what is written --------------------------------------------------------------------------------------------

    def line(self, level: str, message: str, fields: Mapping[str, object] | None = None) -> None:
        if self._is_muted:
            return
        fields = fields or {}
        if self._format == "json":
            record = {"time": _now(), "level": level, "logger": "handoff", "message": message, **fields}
            text = json.dumps(record, default=str)
        else:
            extra = " ".join(f"{key}={value}" for key, value in fields.items() if value not in ("", None))
            text = f"{_now()} {level:<7} handoff {message}{' ' if extra else ''}{extra}"
        data = text.encode(errors="backslashreplace")[:MAXIMUM_LINE_BYTES] + b"\n"
        if self._held is not None and len(self._held) >= MAXIMUM_HELD_LINES:
            self.release()  # so many lines are worth more than brevity
        if self._held is not None:
            self._held.append(data)
        else:
            self._write(data)

    def info(self, message: str, **fields: object) -> None:
        self.line("info", message, fields)

    def warning(self, message: str, **fields: object) -> None:
        self.line("warning", message, fields)

    def failure(self, what: str, error: Exception) -> None:
        """A mistake of ours, with its frames, that was contained."""
        self.line("error", f"{what}: {''.join(traceback.format_exception(error)).strip()}")

    # --- holding back -----------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Keep lines back until `release` or `mute`: an operator's mistake deserves one line, not twenty."""
        self._held = []

    def release(self) -> None:
        held, self._held = self._held or [], None
        for data in held:
            self._write(data)

    def mute(self) -> None:
        """Throw away what was held back, and all that follows: the command itself says the one thing that matters."""
        self._held, self._is_muted = None, True

    # --- writing ----------------------------------------------------------------------------------------------------

    def _write(self, data: bytes) -> None:
        try:
            if self._socket is not None:
                self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                return
            if not self._own and not self._is_file:
                if not _is_writable(self._fd):
                    self.dropped += 1
                    return
                data = data[: select.PIPE_BUF - 1].rstrip(b"\n") + b"\n"  # POLLOUT promises no more room than that
            os.write(self._fd, data)
        except OSError:  # full, or the reader is gone
            self.dropped += 1

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        elif self._own:
            os.close(self._fd)


def _open_without_blocking(fd: int) -> tuple[int, bool, socket.socket | None]:
    """(fd to write to, whether it is ours, or the socket that it is)."""
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISSOCK(mode):
            return fd, True, socket.socket(fileno=os.dup(fd))
        if stat.S_ISREG(mode):
            return fd, False, None
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(f"/proc/self/fd/{fd}", flags), True, None
    except OSError:
        return fd, False, None


def _is_regular(fd: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:
        return False


def _is_writable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return any(event & select.POLLOUT for _, event in poll.poll(0))


def _now() -> str:
    seconds = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(seconds)) + f".{int(seconds * 1000) % 1000:03d}"
