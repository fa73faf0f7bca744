"""Sockets of ours in the runtime directory, and who is at the other end."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from pathlib import Path
from typing import Any

_CREDENTIALS = struct.Struct("3i")


class Credentials:
    """unix(7), SO_PEERCRED: of who connected."""

    __slots__ = ("pid", "uid")

    def __init__(self, transport_socket: Any) -> None:
        """Of an accepted connection. Raises OSError."""
        with socket.socket(fileno=os.dup(transport_socket.fileno())) as own:  # uvloop's has no getsockopt
            data = own.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self.pid, self.uid, _ = _CREDENTIALS.unpack(data)

    @property
    def is_ours(self) -> bool:
        return self.uid in (0, os.geteuid())


class PrivateListener:
    """Owns a unix socket, 0600, that listens, and its path. It takes the place of a predecessor's at once."""

    def __init__(self, path: Path, backlog: int = 1024) -> None:
        """Raises OSError."""
        self._path = path
        temporary = path.with_name(f"{path.name}.{os.urandom(2).hex()}")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            os.fchmod(self.socket.fileno(), 0o600)  # before bind it is what the path will have, less the umask
            self.socket.bind(str(temporary))
            try:
                os.chmod(temporary, 0o600)
                self.socket.listen(backlog)
                self._inode = os.stat(temporary).st_ino
                os.rename(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
        except BaseException:
            self.socket.close()
            raise

    def close(self) -> None:
        """May be called again."""
        self.socket.close()
        with contextlib.suppress(OSError):  # removed, or a successor's
            if os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)
