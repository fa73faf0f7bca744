"""The socket that a worker acks to, as to einhorn: one for each worker, in the service's run directory."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

from handoff.core.dialects import MAXIMUM_ACK_BYTES, read_einhorn_command
from handoff.master.log import MasterLog
from handoff.master.loop import Loop, Order

_PREFIX = "ack-"
_MAXIMUM_CONNECTIONS = 4
"""Of one worker at once; another one takes the place of the oldest."""
_ACCEPTS_PER_TURN = 8
_CREDENTIALS = struct.Struct("3i")


class AckSocket:
    """Listens for one worker. Owns its file, its connections, and closes and removes them.

    Never waits, and never answers: einhorn does not answer an ack either, it closes the connection.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        worker: int,
        loop: Loop,
        log: MasterLog,
        is_ours: Callable[[int], bool],
        on_ack: Callable[[], None],
    ) -> None:
        """`name`: of the file, short. `is_ours` tells whether a pid may speak for the worker. Raises OSError."""
        # No longer than the control socket's name, whose length was checked.
        self.path = str(directory / f"{_PREFIX}{name}")
        self._worker = worker
        self._loop = loop
        self._log = log
        self._is_ours = is_ours
        self._on_ack = on_ack
        self._clients: dict[socket.socket, bytes] = {}
        self._is_watched = False
        self._listener = _listen(self.path)

    def watch(self) -> None:
        self._loop.watch(self._listener, Order.CHANNEL, self._accept, on_failure=self._failed)
        self._is_watched = True

    def hear_last(self) -> None:
        """What was said before the worker ended."""
        if self._is_watched:
            self._accept()
            for client in list(self._clients):
                self._hear(client)

    def close(self) -> None:
        """May be called again."""
        for client in list(self._clients):
            self._drop(client)
        if self._listener.fileno() >= 0:
            if self._is_watched:
                self._loop.forget(self._listener)
            self._listener.close()
            with contextlib.suppress(OSError):  # the directory may be gone
                os.unlink(self.path)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                client, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            sender = _CREDENTIALS.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[0]
            if not self._is_ours(sender):
                self._log.warning("ack of a stranger was ignored", worker=self._worker, sender_pid=sender)
                client.close()
                continue
            client.setblocking(False)
            if len(self._clients) >= _MAXIMUM_CONNECTIONS:
                self._drop(next(iter(self._clients)))
            self._clients[client] = b""
            self._loop.watch(client, Order.CHANNEL, partial(self._hear, client), on_failure=self._failed)

    def _hear(self, client: socket.socket) -> None:
        try:
            data = client.recv(MAXIMUM_ACK_BYTES)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        line, newline, _ = (self._clients[client] + data).partition(b"\n")
        if newline:
            self._drop(client)
            self._said(line)
        elif not data or len(line) > MAXIMUM_ACK_BYTES:
            self._drop(client)
            if line:
                self._log.warning("an ack that is none was ignored", worker=self._worker)
        else:
            self._clients[client] = line

    def _said(self, line: bytes) -> None:
        said = read_einhorn_command(line) if len(line) <= MAXIMUM_ACK_BYTES else None
        if said is None:
            self._log.warning("an ack that is none was ignored", worker=self._worker)
        elif said.command == "worker:ack":
            self._on_ack()

    def _drop(self, client: socket.socket) -> None:
        del self._clients[client]
        self._loop.forget(client)
        client.close()

    def _failed(self, error: Exception) -> None:
        self._log.failure(f"acks of worker {self._worker}", error)
        self.close()


def remove_stale(directory: Path) -> None:
    """What a master that was killed left behind. The caller holds the lock of the service."""
    for path in directory.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            path.unlink()


def _listen(path: str) -> socket.socket:
    """The caller owns it, and the file, which nobody else may connect to. Raises OSError."""
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(found.fileno(), 0o600)  # before the bind: the file never has another mode
        found.bind(path)
        found.listen(_MAXIMUM_CONNECTIONS)
    except OSError:
        found.close()
        raise
    return found
