"""Ending to accept, without losing who was accepted last."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Protocol

MAXIMUM_QUEUED = 4096
"""How many queued connections of an ending listener are let in; net.core.somaxconn is not larger by default."""
_TURNS = 8
"""asyncio makes a task of an accepted socket, then a transport, then calls connection_made: four turns of the loop;
uvloop needs one. Seen: without this, 1 of 42,000 connections over 20 reloads was closed unanswered."""

LetIn = Callable[[socket.socket], Awaitable[Any]]
"""Takes an accepted connection, non-blocking, and owns it."""


class Server(Protocol):
    """What is asked of an asyncio.Server, or of what stands in for one."""

    @property
    def sockets(self) -> Sequence[Any]: ...

    def close(self) -> None: ...


async def stop_accepting(
    servers: Iterable[Server],
    ending: Iterable[socket.socket] = (),
    let_in: LetIn | None = None,
) -> None:
    """Close the servers, and return when every connection that they accepted has reached its protocol.

    From the listeners that end with us, who is queued is let in first: closing the last copy would reset them.
    """
    servers = list(servers)
    # asyncio drops an accepted socket, without a word, when its task starts after the server was closed (Server._attach
    # asserts): so first nobody new, then a few turns, then the close. uvloop has no readers there, and no such gap.
    for server in servers:
        for serving in server.sockets:
            asyncio.get_running_loop().remove_reader(serving.fileno())
    await _let_turns_pass()
    if let_in is not None:
        for listener in ending:
            await _accept_queued(listener, let_in)
    for server in servers:
        server.close()
    await _let_turns_pass()


async def _let_turns_pass() -> None:
    for _ in range(_TURNS):
        await asyncio.sleep(0)


async def _accept_queued(listener: socket.socket, let_in: LetIn) -> None:
    for _ in range(MAXIMUM_QUEUED):
        try:
            connection, _ = listener.accept()
        except OSError:  # nobody left, or no fds for more
            return
        connection.setblocking(False)
        with contextlib.suppress(OSError):  # it went away again
            await let_in(connection)
