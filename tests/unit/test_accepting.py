"""The end of accepting loses nobody: who was accepted reaches its protocol, who is queued at the last end is let in."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, cast

import pytest
import uvloop

from handoff.worker.accepting import stop_accepting

DEADLINE_SECONDS = 20.0
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
COUNT = 50


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    async def bounded(main: Coroutine[Any, Any, None]) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            await main

    def run(main: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            runner.run(bounded(main))

    return run


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=4 * COUNT) as found:
        found.setblocking(False)
        yield found


@pytest.fixture
def connect(listener: socket.socket) -> Iterator[Callable[[int], list[socket.socket]]]:
    """Connect so many clients, which the kernel completes without any accept."""
    clients: list[socket.socket] = []

    def connect(count: int) -> list[socket.socket]:
        new = [socket.create_connection(listener.getsockname(), timeout=DEADLINE_SECONDS) for _ in range(count)]
        clients.extend(new)
        return new

    yield connect
    for client in clients:
        client.close()


class Counted(asyncio.Protocol):
    def __init__(self, made: list[asyncio.Transport]) -> None:
        self._made = made

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._made.append(cast("asyncio.Transport", transport))
        self._made[-1].write(b"hello")


def letting_in(made: list[Any]) -> Callable[[socket.socket], Awaitable[Any]]:
    loop = asyncio.get_running_loop()
    return lambda connection: loop.connect_accepted_socket(lambda: Counted(made), connection)


async def hang_up(made: list[asyncio.Transport]) -> None:
    for transport in made:
        transport.close()
    await asyncio.sleep(0)


def test_queued_clients_of_a_listener_that_ends_are_let_in(run: Any, listener: socket.socket, connect: Any) -> None:
    made: list[asyncio.Transport] = []

    async def main() -> None:
        clients = connect(COUNT)
        await stop_accepting([], [listener], letting_in(made))
        assert len(made) == COUNT
        await hang_up(made)
        assert [await asyncio.to_thread(client.recv, 100) for client in clients] == [b"hello"] * COUNT

    run(main())


def test_queued_clients_of_a_listener_that_stays_are_left_for_the_others(
    run: Any, listener: socket.socket, connect: Any
) -> None:
    made: list[asyncio.Transport] = []

    async def main() -> None:
        connect(COUNT)
        await stop_accepting([], [], letting_in(made))
        assert made == []
        for _ in range(COUNT):
            listener.accept()[0].close()

    run(main())


def test_clients_accepted_right_before_the_end_reach_their_protocol(
    run: Any, listener: socket.socket, connect: Any
) -> None:
    made: list[asyncio.Transport] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Counted(made), sock=listener, backlog=4 * COUNT)
        clients = connect(COUNT)
        keeper = listener.dup()  # as the other workers of the service have it: who is not accepted stays queued
        keeper.setblocking(False)
        await asyncio.sleep(0)  # the loop accepts some of them in this turn; their transports are not made yet
        await stop_accepting([server])
        with keeper:
            assert len(made) + accept_all(keeper) == len(clients), "somebody was accepted and has no protocol"
        await hang_up(made)

    run(main())


def test_clients_accepted_in_the_turn_in_which_the_drain_comes_reach_their_protocol(
    run: Any, listener: socket.socket, connect: Any
) -> None:
    """asyncio silently drops an accepted client whose task starts after the server was closed."""
    made: list[asyncio.Transport] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Counted(made), sock=listener, backlog=4 * COUNT)
        ours, theirs = socket.socketpair()
        drain = asyncio.Event()

        def hear() -> None:
            ours.recv(1)
            drain.set()

        keeper = listener.dup()
        with ours, theirs, keeper:
            keeper.setblocking(False)
            loop.add_reader(ours, hear)
            theirs.send(b"x")  # first the drain, then the clients: the loop learns of both in one turn, in this order
            clients = connect(COUNT)
            await drain.wait()
            await stop_accepting([server])
            assert len(made) + accept_all(keeper) == len(clients), "somebody was accepted and has no protocol"
            loop.remove_reader(ours)
        await hang_up(made)

    run(main())


def accept_all(listener: socket.socket) -> int:
    """Accept and close who is queued; how many these were."""
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            listener.accept()[0].close()
            count += 1
    return count


def test_a_serving_listener_that_ends_lets_in_everybody(run: Any, listener: socket.socket, connect: Any) -> None:
    made: list[asyncio.Transport] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Counted(made), sock=listener, backlog=4 * COUNT)
        connect(COUNT)
        await stop_accepting([server], [listener], letting_in(made))
        assert len(made) == COUNT
        await hang_up(made)

    run(main())


def test_a_client_that_went_away_while_queued_harms_no_other(run: Any, listener: socket.socket, connect: Any) -> None:
    made: list[asyncio.Transport] = []

    async def main() -> None:
        gone, stays = connect(2)
        gone.close()
        await stop_accepting([], [listener], letting_in(made))
        assert await asyncio.to_thread(stays.recv, 100) == b"hello"
        await hang_up(made)

    run(main())


def test_nothing_is_accepted_after_the_end(run: Any, listener: socket.socket, connect: Any) -> None:
    made: list[asyncio.Transport] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with listener.dup():
            server = await loop.create_server(lambda: Counted(made), sock=listener, backlog=4 * COUNT)
            address = listener.getsockname()
            await stop_accepting([server])
            with socket.create_connection(address, timeout=DEADLINE_SECONDS):
                for _ in range(20):
                    await asyncio.sleep(0)
        assert made == []

    run(main())
