"""The connection to the controller: its tables come in, what was seen of backends goes out.

Without a controller the relay worker goes on with the table it has, and tries again and again to connect.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from pathlib import Path

from lb.core.table import Table
from lb.core.wire import (
    SOCKET_NAME,
    BadFrame,
    Draining,
    Failed,
    Frames,
    FromRelay,
    Hello,
    Recovered,
    Taken,
    decode_table,
    frame,
)
from lb.relay.loop import READ, WRITE, Loop

FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 0.05, 1.0
MAXIMUM_UNSENT_BYTES = 1024 * 1024
"""A controller that does not read is as good as none."""

_LOG = logging.getLogger("handoff.lb")


class Link:
    """Owns its socket. `on_table` takes a table that is newer; `on_older` hears that a controller of an older
    generation has made a table. When they return, the controller is told."""

    def __init__(
        self,
        loop: Loop,
        directory: Path,
        hello: Hello,
        table: Table,
        on_table: Callable[[Table], None],
        on_older: Callable[[], None],
    ) -> None:
        self._loop, self._path, self._hello = loop, str(directory / SOCKET_NAME), hello
        self._on_table, self._on_older = on_table, on_older
        self._newest = table.generation, table.revision
        self._socket: socket.socket | None = None
        self._frames = Frames()
        self._unsent = b""
        self._retry_seconds = FIRST_RETRY_SECONDS
        self._is_draining = False
        self._is_closed = False

    def open(self) -> None:
        self._connect()

    def failed(self, identity: str, reason: str) -> None:
        self._say(Failed(identity=identity, reason=reason))

    def recovered(self, identity: str) -> None:
        self._say(Recovered(identity=identity))

    def draining(self) -> None:
        self._is_draining = True
        self._say(Draining())

    def close(self) -> None:
        self._is_closed = True
        self._disconnect()

    # --- within -----------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        if self._is_closed or self._socket is not None:
            return
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            made.connect(self._path)
        except OSError:  # not there, nobody listens, or its queue is full
            made.close()
            self._retry_later()
            return
        self._socket, self._frames, self._unsent = made, Frames(), b""
        self._loop.watch(made.fileno(), READ, self._event)
        self._say(self._hello)
        if self._is_draining:
            self._say(Draining())

    def _retry_later(self) -> None:
        self._loop.timers.call_at(self._loop.now + self._retry_seconds, self._connect)
        self._retry_seconds = min(self._retry_seconds * 2, LAST_RETRY_SECONDS)

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._loop.watch(self._socket.fileno(), 0, self._event)
            self._loop.close(self._socket)
            self._socket = None

    def _say(self, message: FromRelay) -> None:
        if self._socket is None:
            return  # a controller that starts asks the backends itself
        self._unsent += frame(message)
        self._flush()

    def _flush(self) -> None:
        if self._socket is None:
            return
        try:
            sent = self._socket.send(self._unsent)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._lost()
            return
        self._unsent = self._unsent[sent:]
        if len(self._unsent) > MAXIMUM_UNSENT_BYTES:
            self._lost()
            return
        self._loop.watch(self._socket.fileno(), READ | WRITE if self._unsent else READ, self._event)

    def _event(self, mask: int) -> None:
        if self._socket is None:
            return
        if mask & WRITE and self._unsent:
            self._flush()
        if mask & ~WRITE:
            self._read()

    def _read(self) -> None:
        if self._socket is None:
            return
        try:
            data = self._socket.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lost()
            return
        try:
            tables = [decode_table(body) for body in self._frames.feed(data)]
        except BadFrame as error:
            _LOG.warning("the controller sent no table: %s", error)
            self._lost()
            return
        self._retry_seconds = FIRST_RETRY_SECONDS
        for table in tables[-1:]:  # the newest says all
            self._take(table)

    def _take(self, table: Table) -> None:
        number = table.generation, table.revision
        if number > self._newest:
            self._newest = number
            self._on_table(table)
        elif table.generation < self._newest[0]:
            # The controller that ours will take the place of has changed something that outlasts it.
            self._on_older()
        elif number < self._newest:
            return
        self._say(Taken(generation=table.generation, revision=table.revision))

    def _lost(self) -> None:
        self._disconnect()
        self._retry_later()
