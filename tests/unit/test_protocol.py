"""The drain of an HTTP connection, on a real loop and a real TCP connection, seen by a client on a raw socket."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop
from uvicorn.config import Config

from handoff.core.messages import Hold
from handoff.counters import CONNECTIONS, FIELDS, IN_PROGRESS, REQUESTS
from handoff.worker import protocol as module
from handoff.worker.protocol import HTTPProtocol, LastCycle
from handoff.worker.state import WorkerServerState
from handoff.worker.websocket import WebSocketProtocol

DEADLINE_SECONDS = 20.0
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
GET = b"GET %s HTTP/1.1\r\nHost: test\r\n\r\n"

Run = Callable[[Callable[["Bench"], Coroutine[Any, Any, None]]], None]


class Bench:
    """One server on the running loop, and an application whose answers wait until they are let go."""

    def __init__(self) -> None:
        self.state = WorkerServerState(memoryview(bytearray(FIELDS * 8)).cast("Q"))
        self.started: dict[str, asyncio.Event] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.answered: list[str] = []
        self.protocols: list[HTTPProtocol] = []
        config = Config(
            self.application,
            http=HTTPProtocol,
            ws=WebSocketProtocol,
            interface="asgi3",
            lifespan="off",
            log_config=None,
        )
        config.load()
        self._config = config

    def make(self) -> HTTPProtocol:
        self.protocols.append(HTTPProtocol(self._config, self.state, {}))
        return self.protocols[-1]

    @property
    def only(self) -> HTTPProtocol:
        (found,) = self.protocols
        return found

    def has_started(self, path: str) -> asyncio.Event:
        return self.started.setdefault(path, asyncio.Event())

    def gate(self, path: str) -> asyncio.Event:
        """Lets the answer of a path /wait…, /stream… or /upload… go."""
        return self.gates.setdefault(path, asyncio.Event())

    async def application(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await self._websocket(receive, send)
            return
        path, body = scope["path"], b""
        self.has_started(path).set()
        if scope["method"] == "POST":
            more = True
            while more:
                message = await receive()
                body, more = body + message.get("body", b""), message.get("more_body", False)
        if path.startswith("/stream"):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"begin ", "more_body": True})
            await self.gate(path).wait()
            self.answered.append(path)
            await send({"type": "http.response.body", "body": b"end"})
            return
        if path.startswith(("/wait", "/early")):
            await self.gate(path).wait()
        answer = path.encode() if scope["method"] == "GET" else b"%s %d" % (path.encode(), len(body))
        if path.startswith(("/large", "/early")):
            answer = b"x" * 300_000
        headers = [(b"content-length", b"%d" % len(answer))]
        self.answered.append(path)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    async def _websocket(self, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        self.has_started("websocket").set()
        while (await receive())["type"] != "websocket.disconnect":
            await send({"type": "websocket.send", "text": "hi"})

    def drain(self, linger_seconds: float = 0.05) -> None:
        self.state.is_draining = True
        self.state.leave = HTTPProtocol.begin_drain
        self.state.linger_seconds = linger_seconds
        for connection in list(self.state.connections):
            connection.begin_drain()  # type: ignore[union-attr]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Turn the loop until something holds that is no event."""
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(self.make, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        reader, writer = await asyncio.open_connection(*address)
        try:
            await self.until(lambda: bool(self.protocols))
            yield Client(reader, writer)
        finally:
            writer.close()
            server.close()
            await self.until(lambda: not self.state.connections)


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> tuple[bool, bytes]:
        """(whether it announces the end, the body) of the next response."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        assert head.startswith(b"http/1.1 200 "), head
        if b"transfer-encoding: chunked" in head:
            body = b""
            while size := int(await self.reader.readline(), 16):
                body += await self.reader.readexactly(size)
                await self.reader.readexactly(2)
            await self.reader.readexactly(2)
        else:
            found = re.search(rb"content-length: (\d+)", head)
            assert found
            body = await self.reader.readexactly(int(found[1]))
        return b"connection: close" in head, body

    async def end(self) -> bytes:
        """Everything up to the end of the connection; a reset raises."""
        return await self.reader.read()


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Run:
    async def bounded(scenario: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            bench = Bench()
            await scenario(bench)
            await bench.until(lambda: not bench.state.tasks)
            bench.state.publish()
            assert bench.state.counters[CONNECTIONS] == 0, "the counter of connections does not return to zero"
            assert bench.state.counters[IN_PROGRESS] == 0

    def run(scenario: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            runner.run(bounded(scenario))

    return run


# --- before a drain -------------------------------------------------------------------------------------------------


def test_before_a_drain_a_connection_is_kept_and_counted(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.client() as client:
            for number in range(3):
                client.send(GET % b"/a")
                assert await client.answer() == (False, b"/a")
                assert bench.state.total_requests == number + 1
            bench.state.publish()
            assert (bench.state.counters[CONNECTIONS], bench.state.counters[REQUESTS]) == (1, 3)
            assert "_start_asgi_task" not in bench.only.__dict__, "something is added to the path of a request"
            assert not isinstance(bench.only.cycle, LastCycle)

    run(scenario)


def test_a_head_without_end_is_answered_400_after_the_answers_that_are_due(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.client() as client:
            client.send(GET % b"/a")
            assert await client.answer() == (False, b"/a")
            client.send(GET % b"/wait" + b"GET /b HTTP/1.1\r\nX-Endless: ")
            await bench.has_started("/wait").wait()
            client.send(b"x" * (module.MAXIMUM_HEAD_BYTES + 1000))
            await bench.until(lambda: bench.only._head_bytes > module.MAXIMUM_HEAD_BYTES)
            bench.gate("/wait").set()
            assert await client.answer() == (False, b"/wait")
            client.send(b"x")
            end = await client.end()
            assert end.startswith(b"HTTP/1.1 400 ")
            assert end.endswith(b"Request head too large.")

    run(scenario)


def test_a_long_head_that_comes_in_pieces_is_served(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.client() as client:
            for _ in range(2):
                client.send(b"GET /a HTTP/1.1\r\nX-Long: " + b"x" * (module.MAXIMUM_HEAD_BYTES - 1000))
                await bench.until(lambda: bench.only._head_bytes > module.MAXIMUM_HEAD_BYTES - 1000)
                client.send(b"\r\n\r\n")
                assert await client.answer() == (False, b"/a")
                bench.only._head_bytes = 0

    run(scenario)


# --- idle -----------------------------------------------------------------------------------------------------------


def test_an_idle_connection_lingers_and_is_then_closed(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.client() as client:
            client.send(GET % b"/a")
            await client.answer()
            bench.drain()
            assert not bench.only.transport.is_closing(), "it may still have a request on the wire"
            assert await client.end() == b""

    run(scenario)


def test_a_request_that_comes_while_an_idle_connection_lingers_is_answered_and_is_the_last(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.client() as client:
            client.send(GET % b"/a")
            await client.answer()
            bench.drain(linger_seconds=DEADLINE_SECONDS)
            client.send(GET % b"/b")
            assert await client.answer() == (True, b"/b")
            assert await client.end() == b""

    run(scenario)


def test_a_request_in_the_kernel_when_the_linger_ends_is_answered(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.client() as client:
            client.send(GET % b"/a")
            await client.answer()
            bench.drain(linger_seconds=DEADLINE_SECONDS)
            raw = client.writer.get_extra_info("socket")
            os.write(raw.fileno(), GET % b"/b")
            bench.only._close_if_idle()  # the loop has not looked at the socket yet
            assert await client.answer() == (True, b"/b")
            assert await client.end() == b""

    run(scenario)


def test_half_a_head_at_the_end_of_the_linger_is_waited_for(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.client() as client:
            client.send(GET % b"/a")
            await client.answer()
            before = bench.only.scope
            client.send(b"GET /b HTT")
            await bench.until(lambda: bench.only.scope is not before)
            bench.drain(linger_seconds=0)
            bench.only._close_if_idle()
            client.send(b"P/1.1\r\nHost: test\r\n\r\n")
            assert await client.answer() == (True, b"/b")
            assert await client.end() == b""

    run(scenario)


# --- never answered -------------------------------------------------------------------------------------------------


def test_a_connection_that_never_got_an_answer_is_waited_for(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.client() as client:
            bench.drain(linger_seconds=0)
            bench.only._close_if_idle()
            assert not bench.only.transport.is_closing()
            client.send(GET % b"/first")
            assert await client.answer() == (True, b"/first")
            assert await client.end() == b""

    run(scenario)


def test_a_connection_made_during_the_drain_gets_one_answer(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        bench.drain()
        async with bench.client() as client:
            client.send(GET % b"/late")
            assert await client.answer() == (True, b"/late")
            assert await client.end() == b""

    run(scenario)


# --- in progress ----------------------------------------------------------------------------------------------------


def test_a_request_in_progress_is_answered_and_announces_the_end(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.client() as client:
            client.send(GET % b"/wait")
            await bench.has_started("/wait").wait()
            bench.drain(linger_seconds=0)
            bench.gate("/wait").set()
            assert await client.answer() == (True, b"/wait")
            assert await client.end() == b""

    run(scenario)


def test_a_response_whose_head_is_sent_ends_whole_and_then_lingers(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.client() as client:
            client.send(GET % b"/stream")
            head = await client.reader.readuntil(b"begin ")
            assert b"connection: close" not in head
            bench.drain(linger_seconds=DEADLINE_SECONDS)
            bench.gate("/stream").set()
            assert await client.reader.readuntil(b"0\r\n\r\n") == b"\r\n3\r\nend\r\n0\r\n\r\n"
            client.send(GET % b"/next")
            assert await client.answer() == (True, b"/next")
            assert await client.end() == b""

    run(scenario)


def test_a_response_whose_head_is_sent_is_closed_after_its_linger(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.client() as client:
            client.send(GET % b"/stream")
            await client.reader.readuntil(b"begin ")
            bench.drain(linger_seconds=0)
            bench.gate("/stream").set()
            assert await client.end() == b"\r\n3\r\nend\r\n0\r\n\r\n"

    run(scenario)


def test_an_upload_in_progress_is_taken_whole(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.client() as client:
            client.send(b"POST /upload HTTP/1.1\r\nHost: test\r\nContent-Length: 200000\r\n\r\n" + b"x" * 100_000)
            await bench.has_started("/upload").wait()
            bench.drain(linger_seconds=0)
            client.send(b"x" * 100_000)
            assert await client.answer() == (True, b"/upload 200000")
            assert await client.end() == b""

    run(scenario)


@pytest.mark.parametrize("paths", [(b"/wait", b"/b", b"/c"), (b"/stream", b"/b", b"/c")])
def test_pipelined_requests_are_all_answered_in_order_and_only_the_last_announces_the_end(
    run: Run, paths: tuple[bytes, ...]
) -> None:
    async def scenario(bench: Bench) -> None:
        first = paths[0].decode()
        async with bench.client() as client:
            client.send(b"".join(GET % path for path in paths))
            await bench.has_started(first).wait()
            await bench.until(lambda: len(bench.only.pipeline) == 2)
            bench.drain(linger_seconds=0)
            bench.gate(first).set()
            announced = [(await client.answer())[0] for _ in paths]
            assert bench.answered == [path.decode() for path in paths]
            assert announced == [False, False, True]
            assert await client.end() == b""

    run(scenario)


def test_a_request_pipelined_after_the_drain_began_is_answered_too(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.client() as client:
            client.send(GET % b"/wait")
            await bench.has_started("/wait").wait()
            bench.drain(linger_seconds=0)
            client.send(GET % b"/b")
            await bench.until(lambda: len(bench.only.pipeline) == 1)
            bench.gate("/wait").set()
            assert await client.answer() == (False, b"/wait")
            assert await client.answer() == (True, b"/b")
            assert await client.end() == b""

    run(scenario)


def test_a_client_that_asked_for_the_end_gets_it_as_always(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.client() as client:
            client.send(b"GET /wait HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
            await bench.has_started("/wait").wait()
            bench.drain()
            bench.gate("/wait").set()
            assert await client.answer() == (True, b"/wait")
            assert await client.end() == b""

    run(scenario)


def test_beginning_a_drain_twice_changes_nothing(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.client() as client:
            client.send(GET % b"/wait")
            await bench.has_started("/wait").wait()
            bench.drain()
            bench.drain()
            bench.gate("/wait").set()
            assert await client.answer() == (True, b"/wait")
            assert await client.end() == b""

    run(scenario)


# --- the end of a connection ----------------------------------------------------------------------------------------


def test_a_client_that_still_sends_reads_the_whole_answer_and_no_reset(run: Run) -> None:
    """An answer before the end of the upload: closing with unread input would reset, and the answer would be lost."""

    async def scenario(bench: Bench) -> None:
        async with bench.client() as client:
            client.send(GET % b"/early")
            await bench.has_started("/early").wait()
            bench.drain()
            bench.gate("/early").set()
            await bench.until(lambda: bool(bench.answered))
            for _ in range(50):
                client.send(b"x" * 10_000)
                await asyncio.sleep(0)
            assert await client.answer() == (True, b"x" * 300_000)
            assert await client.end() == b""

    run(scenario)


def test_a_client_that_never_closes_is_closed_after_a_while(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINGER_CLOSE_SECONDS", 0.01)

    async def scenario(bench: Bench) -> None:
        async with bench.client() as client:
            client.send(GET % b"/a")
            await client.answer()
            bench.drain(linger_seconds=0)
            await bench.state.emptied.wait()
            assert await client.end() == b""

    run(scenario)


def test_a_client_that_is_gone_during_the_drain_is_counted_out(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.client() as client:
            client.send(GET % b"/wait")
            await bench.has_started("/wait").wait()
            bench.drain()
            connection = client.writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
            client.writer.transport.abort()
            await bench.state.emptied.wait()
            bench.gate("/wait").set()

    run(scenario)


def test_cutting_off_ends_the_connection_at_once(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.client() as client:
            client.send(GET % b"/wait")
            await bench.has_started("/wait").wait()
            bench.drain()
            bench.only.cut_off()
            await bench.state.emptied.wait()
            bench.gate("/wait").set()
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await client.answer()

    run(scenario)


# --- what holds a drain ---------------------------------------------------------------------------------------------


def test_what_holds_a_drain_is_told_with_path_and_age(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.client() as client:
            now = bench.only.loop.time()
            fresh = bench.only.hold(now + 5)
            assert fresh is not None
            assert (fresh.kind, fresh.path) == ("connection", "")
            client.send(GET % b"/wait")
            await bench.has_started("/wait").wait()
            bench.only.observe(now)
            held = bench.only.hold(now + 2)
            host, port = client.writer.get_extra_info("sockname")
            assert held == Hold("request", f"{host}:{port}", "/wait", 2.0)
            bench.gate("/wait").set()
            await client.answer()
            assert bench.only.hold(now + 3) is None

    run(scenario)


def test_an_upgraded_connection_is_counted_once_and_runs_on_until_it_is_cut_off(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        async with bench.client() as client:
            client.send(
                b"GET /ws HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
            )
            assert (await client.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
            assert bench.state.counters[CONNECTIONS] == 1
            bench.drain(linger_seconds=0)
            (connection,) = bench.state.connections
            assert isinstance(connection, WebSocketProtocol)
            held = connection.hold(connection.began_at + 3)
            assert held is not None
            assert (held.kind, held.path, held.age_seconds) == ("websocket", "/ws", 3)
            assert not connection.transport.is_closing()
            connection.cut_off()
            assert await client.end() == b"\x88\x02\x03\xf4", "a close frame that says 1012"

    run(scenario)
