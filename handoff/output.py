"""Writing to an output that others share, standard error as a rule, without ever waiting for its reader."""

from __future__ import annotations

import os
import select
import socket
import stat

WHOLE_BYTES = select.PIPE_BUF
"""Up to so much is written whole, or not at all, and nothing that others write comes between: pipe(7)."""


class Output:
    """Borrows the fd.

    O_NONBLOCK would be shared with every process that inherits the same output, so a pipe or terminal is opened anew
    where the kernel allows that, and asked first (poll) where it does not. A regular file never blocks, and is written
    through the fd that all share: a second file offset would let them overwrite each other's lines.
    """

    def __init__(self, fd: int) -> None:
        self._fd, self._own, self._socket = _open_without_blocking(fd)
        self._is_file = _is_regular(self._fd)

    def write(self, data: bytes | bytearray) -> bool:
        """False: there is no room for it, or nobody reads any more. Of more than WHOLE_BYTES only a part may go out."""
        try:
            if self._socket is not None:
                self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                return True
            if not self._own and not self._is_file:
                if not _is_writable(self._fd):
                    return False
                if len(data) > WHOLE_BYTES:  # POLLOUT promises no more room than that
                    data = data[: WHOLE_BYTES - 1].rstrip(b"\n") + b"\n"
            os.write(self._fd, data)
        except OSError:
            return False
        return True

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
