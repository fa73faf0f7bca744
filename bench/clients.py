"""The strict load: clients that never retry, each exchange classified. Runs as a process of its own.

`python -m bench.clients PORT SCENARIO CLIENTS` runs until its standard input is closed (or MAXIMUM_SECONDS), then
writes one JSON line: a list of [at, seconds, outcome], and how often a connection was opened.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import Callable
from typing import cast

import uvloop

from bench.apps import hello
from bench.responses import Outcome, ResponseReader, judge_end, judge_response
from bench.statistics_of import Exchange

MAXIMUM_SECONDS = 1200.0
ANSWER_SECONDS = 30.0
CONNECT_SECONDS = 10.0

_STREAM = b"".join(hello.stream_chunk(number) for number in range(hello.STREAM_CHUNKS))
_SCENARIOS: dict[str, tuple[str, bytes, bool]] = {
    "new": ("/", hello.HELLO, False),
    "keepalive": ("/", hello.HELLO, True),
    "idle": ("/", hello.HELLO, True),
    "slow": ("/slow?0.7", hello.HELLO, False),
    "streams": ("/stream", _STREAM, False),
}


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

    async def exchange(self, request: bytes, expected: bytes) -> Outcome:
        assert self.transport is not None
        if self.is_over:
            return Outcome.RESET_BEFORE if self.was_reset else Outcome.CLOSED_BEFORE
        self.reader = ResponseReader()
        self.waiter = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                ended = await self.waiter
        except TimeoutError:
            return Outcome.TIMEOUT
        return ended or judge_response(self.reader, expected)


class Load:
    """All clients of one scenario, in one loop."""

    def __init__(self, port: int, scenario: str, clients: int) -> None:
        path, self._expected, self._keeps = _SCENARIOS[scenario]
        connection = "" if self._keeps else "Connection: close\r\n"
        self._request = f"GET {path} HTTP/1.1\r\nHost: bench\r\n{connection}\r\n".encode()
        self._port = port
        self._clients = clients
        self._is_idle = scenario == "idle"
        self._stop = asyncio.Event()
        self.exchanges: list[Exchange] = []
        self.connections_opened = 0

    def stop(self) -> None:
        self._stop.set()

    async def run(self) -> None:
        client: Callable[[], object] = self._idle_client if self._is_idle else self._busy_client
        async with asyncio.TaskGroup() as group:
            for _ in range(self._clients):
                group.create_task(client())  # type: ignore[arg-type]

    async def _busy_client(self) -> None:
        connection: Connection | None = None
        while not self._stop.is_set():
            connection = await self._one(connection)
        _close(connection)

    async def _idle_client(self) -> None:
        """One request, then nothing until the end, then one more on the same connection."""
        connection = await self._one(None)
        await self._stop.wait()
        if connection is not None:
            _close(await self._one(connection))

    async def _one(self, connection: Connection | None) -> Connection | None:
        began = time.monotonic()
        try:
            if connection is None:
                connection = await self._connect()
            outcome = await connection.exchange(self._request, self._expected)
        except (ConnectionRefusedError, TimeoutError):
            outcome = Outcome.REFUSED
        except OSError:
            outcome = Outcome.RESET_BEFORE
        ended = time.monotonic()
        self.exchanges.append(Exchange(ended, ended - began, outcome))
        if outcome is Outcome.OK and connection is not None and self._keeps and not connection.reader.announces_close:
            return connection
        _close(connection)
        if outcome is Outcome.REFUSED:
            await asyncio.sleep(0.01)  # not a retry of the request, which has failed; a closed port must not be spun on
        return None

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
    loop.call_later(MAXIMUM_SECONDS, load.stop)
    await load.run()
    result = {
        "exchanges": [[one.at, one.seconds, one.outcome.value] for one in load.exchanges],
        "connections_opened": load.connections_opened,
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    uvloop.run(_main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
