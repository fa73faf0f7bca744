"""For programs that serve by themselves: what `main(worker)` gets.

`async def main(worker)` gets an `AsyncWorker`; `def main(worker)` gets a `Worker`, which blocks. Both know who they
are and what is bound, say when they are ready, and are told when to drain. The process ends when `main` returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import signal
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any

from handoff.core.messages import Boot, Opened, Ready
from handoff.counters import CONNECTIONS
from handoff.worker.accepting import stop_accepting
from handoff.worker.context import Claims
from handoff.worker.link import Link


class _Identity:
    """What both kinds of worker know."""

    def __init__(self, boot: Boot, link: Link, claims: Claims, counters: memoryview) -> None:
        self.name: str = boot.settings.name
        """The service's name."""
        self.generation: int = boot.generation
        self.label: str = boot.label
        """The operator's name for this version; may be empty."""
        self.slot: int = boot.slot
        """A stable number, from 0: the replacement of a worker has the same."""
        self._boot = boot
        self._link = link
        self._claims = claims
        self._counters = counters
        self._is_ready = False

    @property
    def listeners(self) -> Mapping[str, socket.socket]:
        """Listening, non-blocking sockets by name. Looking one up claims it; what is not claimed when the worker
        says that it is ready is closed in this process. Borrowed: never `shutdown` one, all workers share it."""
        return self._claims

    @property
    def draining(self) -> bool:
        """Take nothing new, finish what exists, and return from `main`."""
        self._link.read()
        return self._link.is_draining

    @property
    def drain_seconds(self) -> float | None:
        """Seconds left for the drain; None while serving."""
        deadline = self._link.drain_deadline
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    def _say_ready(self) -> None:
        assert not self._is_ready, "ready() is for once"
        self._is_ready = True
        unserved = self._claims.close_unclaimed()
        self._link.send(Ready(interface="handoff", unserved=unserved))

    def _leave(self, number: int) -> None:
        """The first TERM drains; one during a drain ends the worker at once."""
        if self._link.is_draining:
            raise SystemExit(0)
        name = signal.Signals(number).name
        self._link.leave(f"the worker was sent {name}", self._boot.settings.drain_timeout_seconds)


class Worker(_Identity):
    """For a blocking program, typically a loop on `selectors`."""

    def __init__(self, boot: Boot, link: Link, claims: Claims, counters: memoryview) -> None:
        super().__init__(boot, link, claims, counters)
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._epoll = select.epoll()
        self._epoll.register(link.fileno(), select.EPOLLIN)
        self._epoll.register(self._wake_reader, select.EPOLLIN)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)

    def fileno(self) -> int:
        """Readable when the master has something to say: register the worker in a selector, then call `wait(0)`."""
        return self._epoll.fileno()

    def ready(self) -> bool:
        """Say that everything works, and wait for the commit. True: accept from now on. False: return from `main`,
        this generation will not be live."""
        self._say_ready()
        while not self._link.is_open and not self.draining:
            self._poll(None)
        if self._link.is_draining:
            return False
        self._link.send(Opened())
        return True

    def wait(self, timeout: float | None = None) -> bool:
        """Block until a drain is asked for, or for `timeout` seconds. Returns `draining`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.draining:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                self._poll(0)
                break
            self._poll(left)
        return self.draining

    def _poll(self, timeout: float | None) -> None:
        self._epoll.poll(timeout)
        with contextlib.suppress(BlockingIOError):
            self._wake_reader.recv(4096)
        if self._link.is_orphan:
            with contextlib.suppress(OSError):
                self._epoll.unregister(self._link.fileno())
        self._link.read()

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        self._leave(number)
        with contextlib.suppress(BlockingIOError):
            self._wake_writer.send(b"\0")


class AsyncWorker(_Identity):
    """For a program on asyncio; `await worker.serve(protocol_factory)` is all that most need."""

    def __init__(self, boot: Boot, link: Link, claims: Claims, counters: memoryview) -> None:
        super().__init__(boot, link, claims, counters)
        self._changed = asyncio.Event()
        self._transports: set[asyncio.BaseTransport] = set()
        loop = asyncio.get_running_loop()
        link.on_change = self._link_changed
        loop.add_reader(link.fileno(), link.read)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._leave, number)

    def _link_changed(self) -> None:
        self._changed.set()
        if self._link.is_orphan:  # the end of the channel stays readable for ever
            asyncio.get_running_loop().remove_reader(self._link.fileno())

    async def ready(self) -> bool:
        """Say that everything works, and wait for the commit. True: accept from now on. False: return from `main`,
        this generation will not be live."""
        self._say_ready()
        await self._until(lambda: self._link.is_open or self._link.is_draining)
        if self._link.is_draining:
            return False
        self._link.send(Opened())
        return True

    async def drained(self) -> None:
        """Wait until a drain is asked for."""
        await self._until(lambda: self._link.is_draining)

    async def serve(
        self, protocol_factory: Callable[[], asyncio.Protocol], listeners: Iterable[str] | None = None
    ) -> None:
        """Say ready, accept on the named listeners (default: all) after the commit, and at a drain wait, under its
        deadline, until every connection is closed; what is left then is aborted.

        The protocol's instances need a `__dict__`: their connection_made and connection_lost are watched.
        """
        sockets = {name: self.listeners[name] for name in (listeners if listeners is not None else list(self._claims))}
        if not await self.ready():
            return

        def watched() -> asyncio.Protocol:
            return self._watched(protocol_factory())

        loop = asyncio.get_running_loop()
        backlog = self._boot.settings.backlog
        servers = [await loop.create_server(watched, sock=listener, backlog=backlog) for listener in sockets.values()]
        await self.drained()
        ending = [sockets[name] for name in self._link.ending_listeners if name in sockets]
        await stop_accepting(servers, ending, watched)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.drain_seconds):
                await self._until(lambda: not self._transports)
        for transport in list(self._transports):
            getattr(transport, "abort", transport.close)()
        await asyncio.sleep(0)  # connection_lost of what was aborted is called in the next turn

    def _watched(self, protocol: asyncio.Protocol) -> asyncio.Protocol:
        """The same protocol, its two ends reported to us; the data path is untouched."""
        watched: Any = protocol
        made, lost = protocol.connection_made, protocol.connection_lost
        transports: list[asyncio.BaseTransport] = []

        def connection_made(transport: asyncio.BaseTransport) -> None:
            transports.append(transport)
            self._transports.add(transport)
            self._counters[CONNECTIONS] = len(self._transports)
            made(transport)

        def connection_lost(error: Exception | None) -> None:
            self._transports.difference_update(transports)
            self._counters[CONNECTIONS] = len(self._transports)
            if self._link.is_draining:
                self._changed.set()
            lost(error)

        watched.connection_made, watched.connection_lost = connection_made, connection_lost
        return protocol

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()
            self._changed.clear()
