"""What all connections of one worker share: uvicorn's server state, and whether a drain is on."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from uvicorn.server import ServerState

from handoff.counters import CONNECTIONS, IN_PROGRESS, REQUESTS
from handoff.worker.mover import Mover

if TYPE_CHECKING:
    from handoff.worker.protocol import HTTPProtocol


class WorkerServerState(ServerState):
    """One writer, the event loop's thread. `counters` is this worker's row of the shared page."""

    def __init__(self, counters: memoryview) -> None:
        super().__init__()
        self.counters = counters
        self.mover = Mover(counters)
        self.leave: Callable[[HTTPProtocol], None] | None = None
        """While draining: what a connection does that comes late."""
        self.hands_websockets_over = False
        self.crowded_from = sys.maxsize
        """The number of a connection's fd from which on `on_crowded` is to be called."""
        self.on_crowded: Callable[[], None] = lambda: None
        self.is_draining = False
        self.linger_seconds = 0.0
        self.emptied = asyncio.Event()
        """Set, while draining, whenever the last connection has gone."""

    def connection_made(self) -> None:
        self.counters[CONNECTIONS] += 1

    def connection_lost(self) -> None:
        self.counters[CONNECTIONS] -= 1
        if self.is_draining and not self.connections:
            self.emptied.set()

    def publish(self) -> None:
        self.counters[REQUESTS] = self.total_requests
        self.counters[IN_PROGRESS] = len(self.tasks)


def address(client: tuple[str, int] | None) -> str:
    """Of a client, for people."""
    return f"{client[0]}:{client[1]}" if client else "unix"
