"""WebSockets that move between two workers' servers, with what is cut, queued, or closing at that moment."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from uvicorn.config import Config
from websockets.client import ClientProtocol
from websockets.frames import CloseCode, Frame, Opcode
from websockets.uri import parse_uri

from handoff.core.messages import ReceiverInfo, Receivers
from handoff.core.moves import MAXIMUM_DATA_BYTES, WEBSOCKET, AnyState, WebSocketState
from handoff.counters import ADOPTED, CONNECTIONS, FIELDS, MOVED, REFUSED
from handoff.mailbox import mailbox_pair
from handoff.worker import websocket
from handoff.worker.adopter import Adopter, socket_of
from handoff.worker.protocol import HTTPProtocol
from handoff.worker.state import WorkerServerState
from handoff.worker.websocket import WebSocketProtocol
from tests.unit.test_moving import LOOPS

DEADLINE_SECONDS = 30.0
Run = Callable[[Callable[["Pair"], Coroutine[Any, Any, None]]], None]


class Server:
    """What one worker has for WebSockets, without its process."""

    def __init__(self, application: Any) -> None:
        self.counters = memoryview(bytearray(FIELDS * 8)).cast("Q")
        self.state = WorkerServerState(self.counters)
        self.state.hands_websockets_over = True
        self.writer, self.reader = mailbox_pair()
        self.adopter = Adopter(self.reader, self._adopt, self.counters)
        self.adopter.start()
        self._adopting: set[asyncio.Task[Any]] = set()
        self._config = Config(
            application,
            http=HTTPProtocol,
            ws=WebSocketProtocol,
            interface="asgi3",
            lifespan="off",
            access_log=False,
            log_config=None,
            proxy_headers=False,
        )
        self._config.load()

    def make(self) -> HTTPProtocol:
        return HTTPProtocol(self._config, self.state, {})

    def _adopt(self, state: AnyState, data: bytes, fds: list[int]) -> None:
        assert isinstance(state, WebSocketState)
        protocol = WebSocketProtocol(self._config, self.state, {}, adopted=(state, data))
        connection = socket_of(state, fds)
        task = asyncio.ensure_future(asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, connection))
        self._adopting.add(task)
        task.add_done_callback(self._adopting.discard)

    def gives_to(self, other: Server) -> None:
        info = ReceiverInfo(mailbox=1, row=0, adopts=(WEBSOCKET,), is_new=True)
        self.state.mover.update(Receivers(receivers=(info,), fds=1), [os.dup(other.writer.fileno())])

    def move_all(self) -> None:
        for connection in list(self.state.connections):
            assert isinstance(connection, WebSocketProtocol)
            connection.begin_move()

    def close(self) -> None:
        self.adopter.stop()
        self.state.mover.update(Receivers(receivers=()), [])
        self.writer.close()
        self.reader.close()


class Pair:
    """Two servers that give to each other, and one client of the first."""

    def __init__(self) -> None:
        self.connects: list[str] = []
        self.disconnects: list[int] = []
        self.fails: bool | None = None
        self.one, self.two = Server(self.application), Server(self.application)
        self.one.gives_to(self.two)
        self.two.gives_to(self.one)
        self.client = ClientProtocol(parse_uri("ws://test/room"))
        self._connection: socket.socket | None = None

    async def application(self, scope: Any, receive: Any, send: Any) -> None:
        state = scope["extensions"]["handoff"]["state"]
        self.connects.append((await receive())["type"])
        if len(self.connects) > 1 and self.fails is not None:
            if self.fails:
                raise ValueError("mine")
            return
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            state["count"] = state.get("count", 0) + 1
            await send({"type": "websocket.send", "text": f"{state['count']}: {message['text']}"})
        self.disconnects.append(message["code"])

    async def open(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._connection = socket.create_connection(listener.getsockname())
            served, _ = listener.accept()
        for end in (self._connection, served):
            end.setblocking(False)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().connect_accepted_socket(self.one.make, served)
        self.client.send_request(self.client.connect())
        await self.flush()
        await self.until(lambda: self.client.handshake_exc is None and bool(self.connects))
        await self.hear()
        assert self.client.handshake_exc is None

    async def write(self, data: bytes) -> None:
        assert self._connection is not None
        await asyncio.get_running_loop().sock_sendall(self._connection, data)

    async def flush(self) -> None:
        await self.write(b"".join(self.client.data_to_send()))

    async def hear(self) -> list[Any]:
        """What comes next, whole frames."""
        assert self._connection is not None
        while True:
            data = await asyncio.get_running_loop().sock_recv(self._connection, 65536)
            if data:
                self.client.receive_data(data)
            else:
                self.client.receive_eof()
            if (events := self.client.events_received()) or not data:
                return events

    async def hear_text(self) -> str:
        [frame] = await self.hear()
        assert isinstance(frame, Frame)
        assert frame.opcode is Opcode.TEXT
        return bytes(frame.data).decode()

    def written(self, send: Callable[[], None]) -> bytes:
        """The bytes of what the client would send now."""
        send()
        return b"".join(self.client.data_to_send())

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)

    async def move(self) -> None:
        """To the other server, and wait until its application has taken over."""
        source, target = (self.one, self.two) if self.one.state.connections else (self.two, self.one)
        before = len(self.connects)
        source.move_all()
        await self.until(lambda: bool(target.state.connections) and len(self.connects) > before)

    def close(self) -> None:
        self.one.close()
        self.two.close()
        if self._connection is not None:
            self._connection.close()


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Run:
    async def bounded(scenario: Callable[[Pair], Coroutine[Any, Any, None]]) -> None:
        pair = Pair()
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                await pair.open()
                await scenario(pair)
                assert pair.one.counters[REFUSED] == pair.two.counters[REFUSED] == 0
        finally:
            for server in (pair.one, pair.two):
                for connection in list(server.state.connections):
                    connection.transport.abort()
            async with asyncio.timeout(DEADLINE_SECONDS):
                await pair.until(lambda: not (pair.one.state.connections or pair.two.state.connections))
            pair.close()

    def run(scenario: Callable[[Pair], Coroutine[Any, Any, None]]) -> None:
        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            runner.run(bounded(scenario))

    return run


def test_a_frame_cut_at_every_byte_arrives_whole_after_the_move(run: Run) -> None:
    async def scenario(pair: Pair) -> None:
        size = len(pair.written(lambda: pair.client.send_text(b"hello")))
        assert size == 11
        await pair.write(pair.written(lambda: pair.client.send_text(b"hello")))
        assert await pair.hear_text() == "1: hello"
        for cut in range(size + 1):
            frame = pair.written(lambda: pair.client.send_text(b"hello"))
            await pair.write(frame[:cut])
            if cut == size:
                assert await pair.hear_text() == f"{cut + 2}: hello"
            await pair.move()
            await pair.write(frame[cut:])
            if cut < size:
                assert await pair.hear_text() == f"{cut + 2}: hello"
        assert pair.one.counters[MOVED] + pair.two.counters[MOVED] == size + 1
        assert pair.one.counters[ADOPTED] + pair.two.counters[ADOPTED] == size + 1
        assert set(pair.connects) == {"websocket.connect"}
        assert set(pair.disconnects) == {1012}

    run(scenario)


def test_a_frame_too_large_for_a_letter_is_waited_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "MAXIMUM_BEGUN_BYTES", 20)

    async def scenario(pair: Pair) -> None:
        for cut in (20, 21):
            frame = pair.written(lambda: pair.client.send_text(b"x" * 100))
            await pair.write(frame[:cut])
            source = pair.one if pair.one.state.connections else pair.two
            await pair.until(lambda source=source, cut=cut: begun_bytes(source) == cut)  # type: ignore[misc]
            source.move_all()
            for _ in range(20):
                await asyncio.sleep(0)
            assert len(pair.disconnects) == 1, "the first time it moves, the second time it waits"
            await pair.write(frame[cut:])
            assert (await pair.hear_text()).endswith("x" * 100)
            await pair.until(lambda source=source: not source.state.connections)  # type: ignore[misc]
        assert pair.disconnects == [1012, 1012]

    run(scenario)


def begun_bytes(server: Server) -> int:
    (one,) = server.state.connections
    assert isinstance(one, WebSocketProtocol)
    assert one._splitter is not None
    return one._splitter.rest_bytes


def test_a_frame_that_may_move_and_what_comes_with_it_fit_a_letter() -> None:
    """The request (its head is in one read of the HTTP protocol), what waits for an accept, and one more read."""
    read_bytes = 256 * 1024
    assert websocket.MAXIMUM_BEGUN_BYTES + websocket.MAXIMUM_HELD_BYTES + 2 * read_bytes < MAXIMUM_DATA_BYTES


def test_pings_before_during_and_after_a_move_are_answered_in_order(run: Run) -> None:
    async def scenario(pair: Pair) -> None:
        for number in range(6):
            ping = pair.written(lambda number=number: pair.client.send_ping(b"%d" % number))  # type: ignore[misc]
            text = pair.written(lambda: pair.client.send_text(b"x"))
            await pair.write(ping[:number])
            await pair.move()
            await pair.write(ping[number:] + text)
            frames: list[Any] = []
            while len(frames) < 2:
                frames += await pair.hear()
            assert [frame.opcode for frame in frames] == [Opcode.PONG, Opcode.TEXT]
            assert bytes(frames[0].data) == b"%d" % number

    run(scenario)


@pytest.mark.parametrize("cut", range(9))
def test_a_close_that_comes_while_the_connection_moves_is_answered(run: Run, cut: int) -> None:
    async def scenario(pair: Pair) -> None:
        close = pair.written(lambda: pair.client.send_close(CloseCode.NORMAL_CLOSURE))
        await pair.write(close[:cut])
        source = pair.one
        source.move_all()
        await pair.write(close[cut:])
        [frame] = await pair.hear()
        assert frame.opcode is Opcode.CLOSE
        await pair.until(lambda: not pair.one.state.connections and not pair.two.state.connections)
        assert pair.disconnects[-1] == 1000
        assert pair.one.counters[CONNECTIONS] == pair.two.counters[CONNECTIONS] == 0

    run(scenario)


def test_many_messages_in_one_write_are_answered_once_each_over_moves(run: Run) -> None:
    async def scenario(pair: Pair) -> None:
        expected = 0
        for _ in range(5):
            frames = b"".join(pair.written(lambda: pair.client.send_text(b"x")) for _ in range(20))
            await pair.write(frames)
            source = pair.one if pair.one.state.connections else pair.two
            source.move_all()
            heard: list[Any] = []
            while len(heard) < 20:
                heard += await pair.hear()
            assert [bytes(frame.data).decode() for frame in heard] == [f"{expected + n}: x" for n in range(1, 21)]
            expected += 20
            connections = source.state.connections
            await pair.until(lambda connections=connections: not connections)  # type: ignore[misc]

    run(scenario)


@pytest.mark.parametrize("fails", [True, False])
def test_an_application_that_does_not_accept_after_the_move_is_a_close_frame(run: Run, fails: bool) -> None:
    async def scenario(pair: Pair) -> None:
        pair.fails = fails
        pair.one.move_all()
        [frame] = await pair.hear()
        assert frame.opcode is Opcode.CLOSE
        assert int.from_bytes(bytes(frame.data)[:2], "big") == 1012
        assert pair.two.counters[REFUSED] == 1
        pair.two.counters[REFUSED] = 0

    run(scenario)
