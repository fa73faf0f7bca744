"""Accepting from the sockets of other slots, as long as nobody else does."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Sequence

from handoff.core.messages import AlsoAccept
from handoff.worker.accepting import Server, stop_accepting


class ForeignSlots:
    """What this worker accepts from beside its own listeners. Owns those sockets."""

    def __init__(self, serve: Callable[[str, socket.socket], Awaitable[Server | None]]) -> None:
        """`serve`: accept from a socket of the listener of this name; None: nobody here serves that."""
        self._serve = serve
        self._servers: dict[tuple[str, int], tuple[socket.socket, Server]] = {}
        self._last: asyncio.Future[None] | None = None
        self._is_closed = False

    def update(self, message: AlsoAccept, fds: Sequence[int]) -> None:
        """Accept from these sockets and no others; the fds are ours, one for each that is new."""
        task = asyncio.ensure_future(self._update(self._last, message, list(fds)))
        self._last = task

    async def _update(self, last: asyncio.Future[None] | None, message: AlsoAccept, fds: list[int]) -> None:
        if last is not None:  # in order; one that failed must not take the later ones along
            await asyncio.wait({last})
        new = iter(fds)
        for info in message.sockets:
            if info.is_new:
                fd = next(new)
                if self._is_closed:
                    os.close(fd)
                    continue
                listener = socket.socket(fileno=fd)
                listener.setblocking(False)
                server = await self._serve(info.name, listener)
                if server is None:
                    listener.close()
                else:
                    self._servers[info.name, info.slot] = (listener, server)
        wanted = {(info.name, info.slot) for info in message.sockets}
        gone = [self._servers.pop(key)[1] for key in list(self._servers) if key not in wanted]
        if gone:
            await stop_accepting(gone)

    async def close(self) -> list[tuple[str, socket.socket, Server]]:
        """Nothing new from now on: the name of each listener, a socket of it, and its server, which is to be closed."""
        self._is_closed = True
        if self._last is not None:
            await self._last
        found = [(name, listener, server) for (name, _), (listener, server) in self._servers.items()]
        self._servers.clear()
        return found
