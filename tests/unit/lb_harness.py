"""A controller in this process, with a worker that is none, and relay workers that only talk."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, cast

import msgspec

from handoff import AsyncWorker
from lb.config import parse_config
from lb.control.main import main
from lb.control.resolver import Resolver
from lb.core.model import Balancer
from lb.core.table import Endpoint, Table
from lb.core.wire import PAGE_NAME, SOCKET_NAME, Frames, FromRelay, Hello, Taken, decode_table, frame
from lb.page import Page

SECONDS = 30.0
"""For anything that is waited for."""


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


class FakeWorker:
    def __init__(self, balancer: Balancer, state: Path, generation: int = 1, **listeners: socket.socket) -> None:
        self.generation = generation
        self.arguments = {"balancer": msgspec.to_builtins(balancer), "shown": "lb.toml", "state": str(state)}
        self.listeners = listeners
        self.is_ready = asyncio.Event()
        self.drain = asyncio.Event()

    async def ready(self) -> bool:
        self.is_ready.set()
        return True

    async def drained(self) -> None:
        await self.drain.wait()


class Running:
    """One controller. `kill` ends it as SIGKILL would: nothing is said, nothing written."""

    def __init__(self, worker: FakeWorker, directory: Path, resolver: Resolver | None = None) -> None:
        self.worker = worker
        self.directory = directory
        os.environ["HANDOFF_RUNTIME_DIRECTORY"] = str(directory)
        self.task = asyncio.ensure_future(main(cast("AsyncWorker", worker), resolver))

    async def until_ready(self) -> None:
        waiting = asyncio.ensure_future(self.worker.is_ready.wait())
        async with asyncio.timeout(SECONDS):
            await asyncio.wait([self.task, waiting], return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
            await self.task

    async def end(self) -> None:
        self.worker.drain.set()
        async with asyncio.timeout(SECONDS):
            await self.task


@contextlib.asynccontextmanager
async def controller(
    text: str, tmp_path: Path, generation: int = 1, resolver: Resolver | None = None, **listeners: socket.socket
) -> AsyncIterator[Running]:
    directory = tmp_path / "run"
    directory.mkdir(exist_ok=True)
    worker = FakeWorker(parse_config(text, "lb.toml"), tmp_path / "state", generation, **listeners)
    running = Running(worker, directory, resolver)
    await running.until_ready()
    try:
        yield running
    finally:
        await running.end()


class FakeRelay:
    """Takes what it is sent, and says so unless told not to."""

    def __init__(self, directory: Path, generation: int = 1, slot: int = 0, bound: tuple[str, ...] = ()) -> None:
        self.directory, self.generation, self.slot, self.bound = directory, generation, slot, bound
        self.tables: list[Table] = []
        self.says_taken = True
        self._changed = asyncio.Event()
        self.is_closed = False
        self.page = Page(directory / PAGE_NAME)
        self.row = self.page.take_row()

    async def connect(self) -> None:
        self._reader, self.writer = await asyncio.open_unix_connection(str(self.directory / SOCKET_NAME))
        self.say(Hello(pid=os.getpid(), generation=self.generation, slot=self.slot, row=self.row, bound=self.bound))
        self._task = asyncio.ensure_future(self._read())

    def say(self, message: FromRelay) -> None:
        self.writer.write(frame(message))

    async def _read(self) -> None:
        frames = Frames()
        with contextlib.suppress(ConnectionError):
            while data := await self._reader.read(65536):
                for body in frames.feed(data):
                    self.tables.append(decode_table(body))
                    if self.says_taken:
                        self.take()
                self._notify()
        self.is_closed = True
        self._notify()

    def take(self) -> None:
        self.say(Taken(generation=self.tables[-1].generation, revision=self.tables[-1].revision))

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(SECONDS):
            while not condition():
                await self._changed.wait()

    async def table(self, condition: Callable[[Table], bool]) -> Table:
        """The first table that is so, now or later."""
        await self.until(lambda: bool(self.tables) and condition(self.tables[-1]))
        return self.tables[-1]

    async def close(self) -> None:
        self.writer.close()
        await self._task
        self.page.close()


@contextlib.asynccontextmanager
async def relay(
    directory: Path, generation: int = 1, slot: int = 0, bound: tuple[str, ...] = ()
) -> AsyncIterator[FakeRelay]:
    made = FakeRelay(directory, generation, slot, bound)
    await made.connect()
    try:
        yield made
    finally:
        await made.close()


def endpoints(table: Table, service: str = "shop") -> dict[str, Endpoint]:
    """By POOL/NAME."""
    pools = table.routes[service].pools
    return {f"{pool}/{one.name}": one for pool, members in pools.items() for one in members}


def endpoint(table: Table, name: str, service: str = "shop") -> Endpoint:
    return endpoints(table, service)[name]


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def backend(handler: Handler | None = None, path: Path | None = None, port: int = 0) -> AsyncIterator[int]:
    """A server over TCP, or at that path; its port. Without a handler it accepts, and reads until the end."""
    present: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        present[task] = writer
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            if handler is not None:
                await handler(reader, writer)
            else:
                await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        del present[task]

    if path is None:
        server = await asyncio.start_server(accept, "127.0.0.1", port)
    else:
        server = await asyncio.start_unix_server(accept, str(path))
    try:
        yield server.sockets[0].getsockname()[1] if path is None else 0
    finally:
        server.close()
        for _ in range(10):
            await asyncio.sleep(0)  # what was accepted just now gets its transport, and its task
        for writer in present.values():
            writer.transport.abort()
        while present:
            await asyncio.wait(list(present))


def closed_port() -> int:
    """Nobody listens there."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])
