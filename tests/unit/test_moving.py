"""Connections that move between two workers' servers, on real loops and real sockets: no client can tell."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import socket
import struct
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvicorn
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.config import Config

from handoff.core.messages import ReceiverInfo, Receivers
from handoff.core.moves import HTTP, AnyState, HTTPState
from handoff.counters import ADOPTED, CONNECTIONS, FIELDS, MOVED, REFUSED, WAITING
from handoff.mailbox import mailbox_pair, send_letters, unread_bytes
from handoff.rights import send_datagram
from handoff.worker.adopter import Adopter, socket_of
from handoff.worker.protocol import HTTPProtocol
from handoff.worker.state import WorkerServerState
from handoff.worker.tested import can_move
from tests.unit.fds import open_fds
from tests.unit.test_unparsed import messages

DEADLINE_SECONDS = 30.0
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


class Server:
    """What one worker has for HTTP, without its process."""

    def __init__(self, application: Any) -> None:
        self.counters = memoryview(bytearray(FIELDS * 8)).cast("Q")
        self.state = WorkerServerState(self.counters)
        self.writer, self.reader = mailbox_pair()
        self.adopter = Adopter(self.reader, self._adopt, self.counters)
        self.adopter.start()
        self.states: list[AnyState] = []
        self._mailbox = 0
        self._config = Config(
            application,
            http=HTTPProtocol,
            interface="asgi3",
            lifespan="off",
            access_log=False,
            log_config=None,
            proxy_headers=False,
        )
        self._config.load()
        self._adopting: set[asyncio.Task[Any]] = set()

    def make(self, adopted: tuple[HTTPState, bytes] | None = None) -> HTTPProtocol:
        return HTTPProtocol(self._config, self.state, {}, adopted=adopted)

    def _adopt(self, state: AnyState, data: bytes, fds: list[int]) -> None:
        connection = socket_of(state, fds)
        self.states.append(state)
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(
            loop.connect_accepted_socket(lambda: self.make((state, data)), connection)  # type: ignore[arg-type]
        )
        self._adopting.add(task)
        task.add_done_callback(self._adopting.discard)

    def gives_to(self, other: Server, adopts: tuple[str, ...] = (HTTP,)) -> None:
        self._mailbox += 1
        info = ReceiverInfo(mailbox=self._mailbox, row=0, adopts=adopts, is_new=True)
        self.state.mover.update(Receivers(receivers=(info,), fds=1), [os.dup(other.writer.fileno())])

    def move_all(self) -> None:
        for connection in list(self.state.connections):
            assert isinstance(connection, HTTPProtocol)
            connection.begin_move()

    def close(self) -> None:
        self.adopter.stop()
        self.state.mover.update(Receivers(receivers=()), [])
        self.writer.close()
        self.reader.close()


class Bench:
    """Two servers that give to each other, and an application that can be held up."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.has_started = asyncio.Event()
        self.scopes: list[Any] = []
        self.one, self.two = Server(self.application), Server(self.application)
        self.one.gives_to(self.two)
        self.two.gives_to(self.one)

    async def application(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        self.has_started.set()
        body, more = b"", True
        while more and scope["method"] == "POST":
            message = await receive()
            assert message["type"] == "http.request"
            body, more = body + message.get("body", b""), message.get("more_body", False)
        await self.gate.wait()
        answer = f"{scope['method']} {scope['path']} {hashlib.sha256(body).hexdigest()}".encode()
        if scope["path"] == "/large":
            answer *= 200_000  # more than the kernel buffers
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(answer))]}
        )
        await send({"type": "http.response.body", "body": answer})

    async def connect(self) -> socket.socket:
        """A client of server one."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            served, _ = listener.accept()
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        served.setblocking(False)
        await asyncio.get_running_loop().connect_accepted_socket(self.one.make, served)
        return client

    async def answers(self, client: socket.socket, count: int) -> bytes:
        """So many responses, and not a byte more."""
        data = b""
        while (rest := skip_responses(data, count)) is None:
            chunk = await asyncio.get_running_loop().sock_recv(client, 1_000_000)
            assert chunk, f"the connection ended after {data!r}"
            data += chunk
        assert not rest, f"more than was asked for: {rest!r}"
        return data

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)

    def nothing_is_under_way(self) -> bool:
        servers = (self.one, self.two)
        moved, adopted = (sum(one.counters[field] for one in servers) for field in (MOVED, ADOPTED))
        return moved == adopted and not any(one.counters[WAITING] for one in servers)

    def close(self) -> None:
        for server in (self.one, self.two):
            for connection in list(server.state.connections):
                connection.transport.abort()  # type: ignore[union-attr]
            server.close()


def skip_responses(data: bytes, count: int) -> bytes | None:
    """What follows so many responses; None when they are not complete."""
    for _ in range(count):
        head, found, data = data.partition(b"\r\n\r\n")
        if not found:
            return None
        assert head.startswith(b"HTTP/1.1 200 "), head
        assert b"connection: close" not in head.lower(), "a client could tell"
        size = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        if len(data) < size:
            return None
        data = data[size:]
    return data


Scenario = Callable[[Bench], Coroutine[Any, Any, None]]
Run = Callable[[Scenario], None]


async def bounded(scenario: Scenario) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        bench = Bench()
        try:
            await scenario(bench)
            await bench.until(bench.nothing_is_under_way)
        finally:
            bench.close()
            await bench.until(lambda: not (bench.one.state.connections or bench.two.state.connections))
        for server in (bench.one, bench.two):
            assert server.counters[CONNECTIONS] == 0
            assert server.counters[WAITING] == 0
            assert server.counters[REFUSED] == 0
        assert bench.one.counters[MOVED] + bench.two.counters[MOVED] == (
            bench.one.counters[ADOPTED] + bench.two.counters[ADOPTED]
        )


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Run:
    def run(scenario: Scenario) -> None:
        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            runner.run(bounded(scenario))

    return run


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode()


# --- byte by byte ---------------------------------------------------------------------------------------------------


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[bytes], list[int], list[bool]]:
    """Requests, where their bytes are cut, and after which of the pieces the connection moves."""
    requests = draw(st.lists(messages(), min_size=1, max_size=5))
    total = sum(map(len, requests))
    cuts = sorted(draw(st.sets(st.integers(1, total), max_size=12)) | {total})
    return requests, cuts, draw(st.lists(st.booleans(), min_size=len(cuts), max_size=len(cuts)))


@pytest.mark.parametrize("loop", LOOPS)
@settings(max_examples=80)
@given(conversations())
def test_a_client_gets_the_bytes_that_it_would_have_got_without_moves(
    loop: str, conversation: tuple[list[bytes], list[int], list[bool]]
) -> None:
    requests, cuts, moves = conversation
    stream = b"".join(requests)

    async def scenario(bench: Bench) -> None:
        with await bench.connect() as still, await bench.connect() as moving:
            still_protocol, moving_protocol = sorted(bench.one.state.connections, key=lambda one: one.client)  # type: ignore[union-attr]
            if still_protocol.client != still.getsockname():  # type: ignore[union-attr]
                still_protocol, moving_protocol = moving_protocol, still_protocol
            still.setblocking(True)
            still.sendall(stream)
            still.setblocking(False)
            expected = await bench.answers(still, len(requests))
            still_protocol.transport.abort()  # type: ignore[union-attr]
            loop = asyncio.get_running_loop()
            begin = 0
            for number, (end, move) in enumerate(zip(cuts, moves, strict=True)):
                await loop.sock_sendall(moving, stream[begin:end])
                begin = end
                for _ in range(number % 4):  # sometimes the bytes arrive before the move, sometimes after it
                    await asyncio.sleep(0)
                if move:
                    bench.one.move_all()
                    bench.two.move_all()
            assert await bench.answers(moving, len(requests)) == expected

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(bounded(scenario))


# --- one thing each -------------------------------------------------------------------------------------------------


def test_an_idle_connection_moves_with_its_address_and_its_deadline(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        with await bench.connect() as client:
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(client, get("/one"))
            await bench.answers(client, 1)
            (before,) = bench.one.state.connections
            before.timeout_keep_alive_task.cancel()  # type: ignore[union-attr]
            before.timeout_keep_alive_task = loop.call_later(10_000, before.timeout_keep_alive_handler)
            bench.two._config.timeout_keep_alive = 100_000
            deadline = before.timeout_keep_alive_task.when()
            bench.one.move_all()
            await bench.until(lambda: bool(bench.two.state.connections))
            (after,) = bench.two.state.connections
            assert not bench.one.state.connections
            assert after.timeout_keep_alive_task.when() == pytest.approx(deadline, abs=1000)  # type: ignore[union-attr]
            await loop.sock_sendall(client, get("/two"))
            await bench.answers(client, 1)
            assert [scope["client"] for scope in bench.scopes] == [client.getsockname()] * 2

    run(scenario)


def test_a_connection_that_sent_nothing_moves_and_has_no_deadline(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        with await bench.connect() as client:
            bench.one.move_all()
            await bench.until(lambda: bool(bench.two.state.connections))
            (after,) = bench.two.state.connections
            assert after.timeout_keep_alive_task is None  # type: ignore[union-attr]
            assert isinstance(bench.two.states[0], HTTPState)
            assert not bench.two.states[0].is_answered
            await asyncio.get_running_loop().sock_sendall(client, get("/"))
            await bench.answers(client, 1)

    run(scenario)


def test_one_connection_moves_a_thousand_times(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        with await bench.connect() as client:
            before = open_fds()
            giver, taker = bench.one, bench.two
            for number in range(1000):
                giver.move_all()
                await bench.until(lambda taker=taker: bool(taker.state.connections))  # type: ignore[misc]
                giver, taker = taker, giver
                if number % 100 == 0:
                    await asyncio.get_running_loop().sock_sendall(client, get("/"))
                    await bench.answers(client, 1)
            await bench.until(lambda: not taker.state.connections)
            assert not open_fds() - before
            assert bench.one.counters[MOVED] + bench.two.counters[MOVED] == 1000

    run(scenario)


def test_a_busy_connection_moves_after_its_response_and_later_requests_are_answered_by_the_other(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        with await bench.connect() as client:
            bench.gate.clear()
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(client, get("/one"))
            await bench.has_started.wait()
            bench.one.move_all()
            await loop.sock_sendall(client, get("/two") + get("/three"))
            for _ in range(20):
                await asyncio.sleep(0)
            assert len(bench.scopes) == 1, "nothing beyond the message in progress is parsed"
            bench.gate.set()
            await bench.answers(client, 3)
            assert bench.one.state.total_requests == 1
            assert bench.two.state.total_requests == 2

    run(scenario)


def test_a_large_response_is_written_to_its_end_before_the_move(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        with await bench.connect() as client:
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(client, get("/large"))
            await bench.until(lambda: bench.one.state.total_requests == 1)
            bench.one.move_all()
            for _ in range(50):
                await asyncio.sleep(0)
            assert bench.one.state.connections, "its bytes are not written yet"
            await bench.answers(client, 1)
            await bench.until(lambda: bool(bench.two.state.connections))
            await loop.sock_sendall(client, get("/after"))
            await bench.answers(client, 1)

    run(scenario)


def test_a_half_closed_client_gets_all_its_answers(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        for moves in (False, True):
            bench.gate.clear()
            bench.has_started.clear()
            with await bench.connect() as client:
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(client, get("/one"))
                await bench.has_started.wait()
                if moves:
                    bench.one.move_all()
                await loop.sock_sendall(client, get("/two"))
                client.shutdown(socket.SHUT_WR)
                for _ in range(20):
                    await asyncio.sleep(0)
                bench.gate.set()
                data = b""
                while chunk := await loop.sock_recv(client, 100_000):
                    data += chunk
                assert (data.count(b"HTTP/1.1 200"), data.count(b"GET /one"), data.count(b"GET /two")) == (2, 1, 1)

    run(scenario)


def test_a_client_that_sends_no_more_is_not_waited_for_without_end(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        bench.gate.clear()
        with await bench.connect() as client:
            loop = asyncio.get_running_loop()
            for connection in bench.one.state.connections:
                connection.timeout_keep_alive = 0.01  # type: ignore[union-attr, assignment]
            await loop.sock_sendall(client, get("/one"))
            await bench.has_started.wait()
            client.shutdown(socket.SHUT_WR)
            await bench.until(lambda: not bench.one.state.connections)
            bench.gate.set()

    run(scenario)


def test_a_client_that_goes_away_in_the_mailbox_is_counted_out(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        client = await bench.connect()
        bench.two.adopter.stop()
        bench.one.move_all()
        await bench.until(lambda: bench.one.counters[MOVED] == 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        bench.two.adopter.start()
        await bench.until(lambda: bench.two.counters[ADOPTED] == 1)
        await bench.until(lambda: not bench.two.state.connections and bench.two.counters[CONNECTIONS] == 0)

    run(scenario)


def test_more_connections_than_a_mailbox_holds_wait_for_room(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        clients = [await bench.connect() for _ in range(400)]
        bench.two.writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel's least: a few datagrams
        bench.two.adopter.stop()
        bench.one.move_all()
        await bench.until(lambda: bench.one.counters[WAITING] > 0)
        bench.two.adopter.start()
        await bench.until(lambda: len(bench.two.state.connections) == 400)
        await bench.until(lambda: not bench.one.state.connections)
        for client in clients:
            client.close()

    run(scenario)


def test_one_that_stays_after_all_is_served_while_others_wait_for_room(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        with await bench.connect() as client:
            last = only(bench.one)
            clients = [await bench.connect() for _ in range(200)]
            bench.two.writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            bench.two.adopter.stop()
            for one in bench.one.state.connections - {last}:  # type: ignore[operator]
                assert isinstance(one, HTTPProtocol)
                one.begin_move()
            last.begin_move()
            while not last._is_posted:  # noqa: ASYNC110
                await asyncio.sleep(0)
            last.cancel_move()
            await bench.until(lambda: bench.one.counters[WAITING] > 0)
            await asyncio.get_running_loop().sock_sendall(client, get("/"))
            await bench.answers(client, 1)
            assert last in bench.one.state.connections
        bench.two.adopter.start()
        await bench.until(lambda: len(bench.two.state.connections) == 200)
        for other in clients:
            other.close()

    run(scenario)


def test_too_many_fds_under_way_are_tried_again_by_a_timer_and_lose_nobody(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ETOOMANYREFS leaves the mailbox writable: nothing but the time tells when it is over (unix(7))."""
    refused = 0

    def send(*arguments: Any) -> None:
        nonlocal refused
        if refused % 3 != 2:
            refused += 1
            raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))
        refused += 1
        send_letters(*arguments)

    monkeypatch.setattr("handoff.worker.outbox.send_letters", send)

    async def scenario(bench: Bench) -> None:
        clients = [await bench.connect() for _ in range(3)]
        bench.one.move_all()
        await bench.until(lambda: len(bench.two.state.connections) == 3 and not bench.one.state.connections)
        assert bench.one.counters[REFUSED] == 0
        for client in clients:
            await asyncio.get_running_loop().sock_sendall(client, get("/"))
            await bench.answers(client, 1)
            client.close()

    run(scenario)


def test_connections_wait_in_the_mailbox_while_their_receiver_has_no_fds(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Received without a free fd they would be gone, without a word."""
    has_room = False
    asked = 0

    def headroom(fd: int) -> bool:
        nonlocal asked
        asked += 1
        return has_room

    monkeypatch.setattr("handoff.worker.adopter.has_headroom", headroom)

    async def scenario(bench: Bench) -> None:
        nonlocal has_room
        with await bench.connect() as client:
            bench.one.move_all()
            await bench.until(lambda: asked == 2)
            assert bench.two.counters[ADOPTED] == 0
            assert unread_bytes(bench.two.writer) > 0
            has_room = True
            await asyncio.get_running_loop().sock_sendall(client, get("/"))
            await bench.answers(client, 1)
            assert bench.two.counters[ADOPTED] == 1

    run(scenario)


def test_a_connection_waits_as_long_as_nobody_takes_its_kind(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        with await bench.connect() as client:
            bench.one.gives_to(bench.two, ("other/1",))
            assert not bench.one.state.mover.outbox.takes(HTTP)
            bench.one.move_all()
            await bench.until(lambda: bench.one.counters[WAITING] == 1)
            bench.one.gives_to(bench.two)
            await bench.until(lambda: bool(bench.two.state.connections))
            await asyncio.get_running_loop().sock_sendall(client, get("/"))
            await bench.answers(client, 1)

    run(scenario)


def test_a_connection_that_was_leaving_and_must_end_here_answers_what_came_meanwhile(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        with await bench.connect() as client:
            bench.gate.clear()
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(client, get("/one"))
            await bench.has_started.wait()
            bench.one.move_all()
            await loop.sock_sendall(client, get("/two"))
            (protocol,) = bench.one.state.connections
            assert isinstance(protocol, HTTPProtocol)
            await bench.until(lambda: bool(protocol._unfed))
            bench.one.state.is_draining = True
            protocol.begin_drain()  # the service stops now
            bench.gate.set()
            data = b""
            while chunk := await loop.sock_recv(client, 100_000):
                data += chunk
            assert (data.count(b"GET /one"), data.count(b"GET /two"), data.count(b"connection: close")) == (1, 1, 1)

    run(scenario)


def test_a_state_of_the_future_is_refused_and_counted(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        head = b'{"state":{"kind":"http/9"},"fds":1,"size":0}'
        with socket.socket() as other:
            send_datagram(bench.two.writer, len(head).to_bytes(4, "big") + head, [other.fileno()])
        await bench.until(lambda: bench.two.counters[REFUSED] == 1)
        assert unread_bytes(bench.two.writer) == 0
        bench.two.counters[REFUSED] = 0  # nothing else may be refused

    run(scenario)


# --- versions of uvicorn --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "expected"), [("0.53.9", False), ("0.54.0", True), ("0.54.9", True), ("0.55.0", False)]
)
def test_moves_are_off_outside_the_tested_versions_with_one_warning(
    version: str, expected: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(uvicorn, "__version__", version)
    assert [can_move(slot) for slot in range(3)] == [expected] * 3
    assert len(caplog.records) == (0 if expected else 1)
    assert all(version in record.getMessage() for record in caplog.records)


# --- what a second look found -----------------------------------------------------------------------------------------


def nobody_takes(bench: Bench) -> None:
    bench.one.gives_to(bench.two, ("other/1",))


def only(server: Server) -> HTTPProtocol:
    [connection] = server.state.connections
    assert isinstance(connection, HTTPProtocol)
    return connection


def test_a_connection_that_waited_for_room_and_got_a_request_meanwhile_answers_it_first(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        with await bench.connect() as client:
            nobody_takes(bench)
            protocol = only(bench.one)
            protocol.begin_move()
            await bench.until(lambda: bench.one.counters[WAITING] == 1)
            protocol.cancel_move()
            bench.gate.clear()
            await asyncio.get_running_loop().sock_sendall(client, get("/slow"))
            await bench.has_started.wait()
            protocol.begin_move()
            bench.one.gives_to(bench.two)  # while the old entry is still in the queue
            for _ in range(20):
                await asyncio.sleep(0)
            bench.gate.set()
            await bench.answers(client, 1)
            await bench.until(lambda: bench.one.counters[MOVED] == 1)

    run(scenario)


def test_a_request_that_came_in_time_is_answered_though_the_deadline_passes_while_it_waits(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        with await bench.connect() as client:
            loop = asyncio.get_running_loop()
            protocol = only(bench.one)
            protocol.timeout_keep_alive = 0.01  # type: ignore[assignment]
            nobody_takes(bench)
            bench.gate.clear()
            await loop.sock_sendall(client, get("/one"))
            await bench.has_started.wait()
            protocol.begin_move()
            bench.gate.set()
            await bench.answers(client, 1)
            await loop.sock_sendall(client, get("/two"))
            await bench.until(lambda: protocol.timeout_keep_alive_task is None)  # it has fired
            bench.one.gives_to(bench.two)
            await bench.answers(client, 1)

    run(scenario)


def test_what_is_kept_of_a_pipelining_client_is_the_head_that_has_begun(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        with await bench.connect() as client:
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(client, b"GET /0 HTTP/1.1\r\nHost: x")
            for _ in range(50):
                await loop.sock_sendall(client, b"\r\nA: " + b"x" * 1000 + b"\r\n\r\nGET /n HTTP/1.1\r\nHost: x")
                await bench.answers(client, 1)
            assert sum(map(len, only(bench.one)._head)) < 2000
            bench.one.move_all()
            await bench.until(lambda: bench.two.counters[ADOPTED] == 1)
            await loop.sock_sendall(client, b"\r\n\r\n")
            await bench.answers(client, 1)

    run(scenario)


def test_datagrams_that_are_no_connections_are_counted_and_the_next_is_taken(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        with await bench.connect() as client:
            bench.two.writer.send(b"")
            read, write = os.pipe()
            send_letters(bench.two.writer, [(HTTPState(), b"", [read])])
            os.close(read)
            os.close(write)
            bench.one.move_all()
            await bench.until(lambda: bench.two.counters[ADOPTED] == 1)
            await asyncio.get_running_loop().sock_sendall(client, get("/after"))
            await bench.answers(client, 1)
            assert bench.two.counters[REFUSED] == 2
            bench.two.counters[REFUSED] = 0

    run(scenario)


def test_one_that_nobody_takes_does_not_keep_the_others(run: Run) -> None:
    class Stranger:
        kind = "other/1"

        def letter(self) -> Any:
            return HTTPState(), b"", (0,)

        def waits(self) -> None:
            waiting.append(self)

    class Broken:
        kind = HTTP

        def letter(self) -> Any:
            raise ValueError("mine")

        def refused(self) -> None:
            refused.append(self)

    refused: list[object] = []
    waiting: list[object] = []

    async def scenario(bench: Bench) -> None:
        with await bench.connect() as client:
            mover = bench.one.state.mover
            mover.post(Stranger())  # type: ignore[arg-type]
            mover.post(Broken())  # type: ignore[arg-type]
            bench.one.move_all()
            await bench.until(lambda: bench.two.counters[ADOPTED] == 1)
            await asyncio.get_running_loop().sock_sendall(client, get("/after"))
            await bench.answers(client, 1)
            assert len(refused) == bench.one.counters[REFUSED] == 1
            bench.one.counters[REFUSED] = 0
            mover.post(Stranger())  # type: ignore[arg-type]
            assert len(waiting) == bench.one.counters[WAITING] == 2
            assert mover.room(HTTP).is_set()
            assert not mover.room(Stranger.kind).is_set()
            mover._queues.clear()
            mover._retry()
            assert bench.one.counters[WAITING] == 0

    run(scenario)
