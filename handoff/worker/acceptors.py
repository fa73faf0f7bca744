"""Accepting from a worker's listeners, and what becomes of that when fds get scarce."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from handoff.rights import FD_HEADROOM, has_headroom
from handoff.worker.accepting import Server, stop_accepting

ACCEPTED_PER_TURN = 16
"""Fewer than FD_HEADROOM, which is looked for once in a turn."""
TURNS_OF_ASYNCIO = 4
"""So often it may accept a whole queue before we hear of the first one: protocols are told two turns later, and a turn
passes until we have stopped it. (And without fds it logs every accept of such a turn: 2,048 tracebacks a second.)"""
PAUSE_SECONDS = 0.1
"""Without fds or memory the listener stays readable, and would keep us busy. Its clients wait in the queue."""

Open = Callable[[str, socket.socket], Awaitable[Server]]
"""Makes the event loop's own server of a listener, which that then owns."""
Take = Callable[[str, socket.socket], None]
"""Owns a connection that was accepted just now, non-blocking, from the listener of that name."""


class RawServer:
    """Accepts from a listener and gives each raw connection, non-blocking, to `take`, which owns it.

    As long as fds are scarce it accepts nobody. Owns the listener. Stands in for an asyncio.Server where a drain ends
    them.
    """

    def __init__(self, listener: socket.socket, take: Callable[[socket.socket], None]) -> None:
        self._listener = listener
        self._take = take
        self._is_closed = False
        self._is_told = False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(listener.fileno(), self._accept)

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        return () if self._is_closed else (self._listener,)

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()

    def _accept(self) -> None:
        if not has_headroom(self._listener.fileno()):
            if not self._is_told:
                self._is_told = True
                text = "fds are scarce: new clients wait; raise the limit of open files (RLIMIT_NOFILE)"
                logging.getLogger("uvicorn.error").warning(text)
            self._pause()
            return
        self._is_told = False
        for _ in range(ACCEPTED_PER_TURN):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError, InterruptedError):  # a sibling was quicker, or it left
                return
            except OSError:
                self._pause()
                return
            connection.setblocking(False)
            self._take(connection)

    def _pause(self) -> None:
        self._loop.remove_reader(self._listener.fileno())
        self._loop.call_later(PAUSE_SECONDS, self._resume)

    def _resume(self) -> None:
        if not self._is_closed:
            self._loop.add_reader(self._listener.fileno(), self._accept)


class Acceptors:
    """One worker's servers. Owns the listeners.

    The event loop's own server is the quickest. But in one turn it accepts all who are queued, and when no fd is left
    uvloop closes them unanswered (libuv's uv__emfile_trick; seen: 78 of 100 clients). So from some number of fds on
    this accepts by itself, and pauses while there are too few.
    """

    def __init__(
        self, listeners: Mapping[str, socket.socket], backlog: int, open_server: Open | None, take: Take
    ) -> None:
        """`open_server`: None where `take` is to get every connection raw."""
        self._listeners = dict(listeners)
        self._servers: dict[str, Server] = {}
        self._open_server = open_server
        self._take = take
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        turns = TURNS_OF_ASYNCIO if isinstance(asyncio.get_running_loop(), asyncio.SelectorEventLoop) else 1
        self.crowded_from = max(0, limit - FD_HEADROOM - turns * backlog)
        """The number of a connection's fd from which on `crowded` is to be called."""
        self._is_stopping = False
        self._task: asyncio.Future[None] | None = None

    async def open(self) -> None:
        for name, listener in self._listeners.items():
            self._servers[name] = await self.serve(name, listener)

    async def serve(self, name: str, listener: socket.socket) -> Server:
        """Accept from one listener, which the server owns."""
        if self._open_server is None or self.crowded_from == 0 or self._task is not None:
            return self.serve_raw(name, listener)
        return await self._open_server(name, listener)

    def serve_raw(self, name: str, listener: socket.socket) -> RawServer:
        return RawServer(listener, lambda connection: self._take(name, connection))

    def crowded(self) -> None:
        """Fds get scarce: accept with care from now on."""
        if self._task is None and not self._is_stopping and self._open_server is not None:
            self._task = asyncio.ensure_future(self._be_careful())

    async def _be_careful(self) -> None:
        for name, server in list(self._servers.items()):
            if self._is_stopping:
                return
            try:
                kept = self._listeners[name].dup()  # closing the loop's server closes its listener
            except OSError:
                self._task = None  # to be tried again
                return
            self._listeners[name], self._servers[name] = kept, self.serve_raw(name, kept)
            await stop_accepting([server])

    async def stop(self, ending: Sequence[str], also: Sequence[tuple[str, socket.socket, Server]] = ()) -> None:
        """Accept nobody any more, from the servers in `also` neither; each has the name of a listener.

        From listeners whose names are in `ending`, who is queued is taken first.
        """
        self._is_stopping = True
        served = [(name, listener, self._servers.get(name)) for name, listener in self._listeners.items()]
        await asyncio.gather(*(self._stop_one(one, one[0] in ending) for one in (*served, *also)))

    async def _stop_one(self, served: tuple[str, socket.socket, Server | None], is_ending: bool) -> None:
        name, listener, server = served

        async def let_in(connection: socket.socket) -> None:
            self._take(name, connection)

        await stop_accepting([server] if server is not None else [], [listener] if is_ending else [], let_in)


def fd_of(transport: asyncio.BaseTransport) -> int:
    found: Any = transport.get_extra_info("socket")
    return int(found.fileno())
