"""The strict load: clients that never retry, each exchange classified. Runs as a process of its own.

`python -m bench.clients PORT SCENARIO CLIENTS` writes the line "running" when each client has ended its first exchange,
and runs until its standard input is closed, or a limit below is reached; then it writes one JSON line with what it
counted, and after it the columns of the exchanges (see `Record`).
"""

from __future__ import annotations

import array
import asyncio
import json
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, BinaryIO, cast

import uvloop

from bench.apps import hello
from bench.responses import Outcome, ResponseReader, judge_end, judge_response
from bench.statistics_of import Exchange

MAXIMUM_SECONDS = 3600.0
MAXIMUM_EXCHANGES = 10_000_000
ANSWER_SECONDS = 30.0
CONNECT_SECONDS = 10.0

_SCENARIOS: dict[str, tuple[str, Callable[[int], bytes], bool]] = {
    "new": ("/", hello.hello_body, False),
    "keepalive": ("/", hello.hello_body, True),
    "idle": ("/", hello.hello_body, True),
    "slow": ("/slow?0.7", hello.hello_body, False),
    "streams": ("/stream", hello.stream_body, False),
}
_OUTCOMES = tuple(Outcome)
VERSION_DIGITS = 6


class Record:
    """Exchanges as columns: with millions of objects the garbage collector's pauses would look like the server's."""

    def __init__(self) -> None:
        self.at = array.array("d")
        self.seconds = array.array("d")
        self.outcome = array.array("b")
        self.version = array.array("i")

    def __len__(self) -> int:
        return len(self.at)

    def add(self, one: Exchange) -> None:
        self.at.append(one.at)
        self.seconds.append(one.seconds)
        self.outcome.append(_OUTCOMES.index(one.outcome))
        self.version.append(one.version)

    def write(self, file: BinaryIO) -> None:
        for column in (self.at, self.seconds, self.outcome, self.version):
            file.write(column.tobytes())

    @classmethod
    def read(cls, data: bytes, count: int) -> list[Exchange]:
        """Raises ValueError if `data` does not hold `count` exchanges."""
        record = cls()
        columns: tuple[array.array[Any], ...] = (record.at, record.seconds, record.outcome, record.version)
        if len(data) != count * sum(column.itemsize for column in columns):
            raise ValueError(f"{count} exchanges announced, {len(data)} bytes found")
        place = 0
        for column in columns:
            column.frombytes(data[place : place + count * column.itemsize])
            place += count * column.itemsize
        outcomes = [_OUTCOMES[number] for number in record.outcome]
        return list(map(Exchange, record.at, record.seconds, outcomes, record.version))


def judge(reader: ResponseReader, body_of: Callable[[int], bytes]) -> tuple[Outcome, int]:
    """The outcome of a whole response, and the version that gave it: each version has one right body."""
    digits = bytes(reader.body[:VERSION_DIGITS])
    if reader.is_malformed or reader.status != 200 or not digits.isdigit():
        return judge_response(reader, body_of(0)), -1  # which begins with digits: never equal
    version = int(digits)
    return judge_response(reader, body_of(version)), version


class Connection(asyncio.Protocol):
    """One connection; one exchange at a time."""

    def __init__(self) -> None:
        self.reader = ResponseReader()
        self.waiter: asyncio.Future[Outcome | None] | None = None
        self.transport: asyncio.Transport | None = None
        self.is_over = False
        self.was_reset = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        if self.reader.feed(data):
            self._done(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_over, self.was_reset = True, exc is not None
        if self.waiter is not None and not self.waiter.done():
            self._done(judge_end(self.reader, self.was_reset))

    def _done(self, outcome: Outcome | None) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(outcome)

    async def exchange(self, request: bytes, body_of: Callable[[int], bytes]) -> tuple[Outcome, int]:
        assert self.transport is not None
        if self.is_over:
            return (Outcome.RESET_BEFORE if self.was_reset else Outcome.CLOSED_BEFORE), -1
        self.reader = ResponseReader()
        self.waiter = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                ended = await self.waiter
        except TimeoutError:
            return Outcome.TIMEOUT, -1
        return (ended, -1) if ended else judge(self.reader, body_of)


class Load:
    """All clients of one scenario, in one loop."""

    def __init__(self, port: int, scenario: str, clients: int) -> None:
        path, self._body_of, self._keeps = _SCENARIOS[scenario]
        connection = "" if self._keeps else "Connection: close\r\n"
        self._request = f"GET {path} HTTP/1.1\r\nHost: bench\r\n{connection}\r\n".encode()
        self._port = port
        self._clients = clients
        self._is_idle = scenario == "idle"
        self._stop = asyncio.Event()
        self._not_begun = clients
        self.running = asyncio.Event()
        self.record = Record()
        self.connections_opened = 0
        self.announced_closes = 0
        self.is_at_limit = False

    def stop(self) -> None:
        self._stop.set()

    def stop_at_limit(self) -> None:
        self.is_at_limit = True
        self._stop.set()

    async def run(self) -> None:
        client = self._idle_client if self._is_idle else self._busy_client
        async with asyncio.TaskGroup() as group:
            for _ in range(self._clients):
                group.create_task(client())

    async def _busy_client(self) -> None:
        connection = await self._first()
        while not self._stop.is_set():
            connection = await self._one(connection)
        _close(connection)

    async def _idle_client(self) -> None:
        """One request, then nothing until the end, then one more on the same connection."""
        connection = await self._first()
        await self._stop.wait()
        if connection is not None:
            _close(await self._one(connection))

    async def _first(self) -> Connection | None:
        connection = await self._one(None)
        self._not_begun -= 1
        if not self._not_begun:
            self.running.set()
        return connection

    async def _one(self, connection: Connection | None) -> Connection | None:
        """One exchange; returns the connection if the next may use it."""
        began = time.monotonic()
        version = -1
        try:
            if connection is None:
                connection = await self._connect()
            outcome, version = await connection.exchange(self._request, self._body_of)
        except ConnectionRefusedError:
            outcome = Outcome.REFUSED
        except TimeoutError:
            outcome = Outcome.TIMEOUT
        except OSError:
            outcome = Outcome.RESET_BEFORE
        self._add(began, outcome, version)
        if outcome is Outcome.OK and connection is not None and self._keeps:
            if not connection.reader.announces_close:
                return connection
            self.announced_closes += 1
        _close(connection)
        if outcome is Outcome.REFUSED:
            await asyncio.sleep(0.01)  # not a retry of the request, which has failed; a closed port must not be spun on
        return None

    def _add(self, began: float, outcome: Outcome, version: int) -> None:
        ended = time.monotonic()
        self.record.add(Exchange(ended, ended - began, outcome, version))
        if len(self.record) >= MAXIMUM_EXCHANGES:
            self.stop_at_limit()

    async def _connect(self) -> Connection:
        self.connections_opened += 1
        async with asyncio.timeout(CONNECT_SECONDS):
            _, connection = await asyncio.get_running_loop().create_connection(
                Connection, "127.0.0.1", self._port, family=socket.AF_INET
            )
        return connection


def _close(connection: Connection | None) -> None:
    if connection is not None and connection.transport is not None:
        connection.transport.close()


async def _main(port: int, scenario: str, clients: int) -> None:
    load = Load(port, scenario, clients)
    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin.fileno(), load.stop)
    loop.call_later(MAXIMUM_SECONDS, load.stop_at_limit)
    async with asyncio.TaskGroup() as group:
        group.create_task(load.run())
        await load.running.wait()
        sys.stdout.buffer.write(b"running\n")
        sys.stdout.buffer.flush()
    counted = {
        "exchanges": len(load.record),
        "connections_opened": load.connections_opened,
        "announced_closes": load.announced_closes,
        "is_at_limit": load.is_at_limit,
    }
    sys.stdout.buffer.write(json.dumps(counted).encode() + b"\n")
    load.record.write(sys.stdout.buffer)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the bench, whose end closes our standard input
    uvloop.run(_main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
