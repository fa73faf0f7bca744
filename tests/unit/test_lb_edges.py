"""Edge cases of balancers that no other test is about: docs/balancer-edge-cases.md has the list."""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from handoff.core.proxy_protocol import V2_MAXIMUM_BYTES
from lb.control import checker, probes
from lb.core.model import Check, Timeouts
from lb.page import CURRENT
from lb.relay import attempt
from lb.relay.acceptor import ACCEPTED_PER_TURN, Acceptor
from lb.relay.loop import READ, Loop
from lb.relay.relay import Limits
from lb.relay.silence import notice_silence
from lb.relay.targets import numeric_address
from tests.unit.lb_harness import backend as accepting
from tests.unit.lb_harness import controller, endpoints, relay, run
from tests.unit.test_lb_checks import Seen, Task, checker_of
from tests.unit.test_lb_control import config
from tests.unit.test_lb_engine import Rig, endpoint
from tests.unit.test_lb_relay import Rig as OneRelay


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.close()


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Full:
    """A listener whose queue is full: who connects there gets no answer."""

    def __init__(self) -> None:
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(0)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._fillers = [socket.socket() for _ in range(3)]
        for filler in self._fillers:
            filler.setblocking(False)
            assert filler.connect_ex(self._listener.getsockname()) in (0, errno.EINPROGRESS)

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None:
        for one in (self._listener, *self._fillers):
            one.close()


# --- connecting -----------------------------------------------------------------------------------------------------


def test_once_something_was_written_no_other_backend_is_tried(rig: Rig) -> None:
    one, other = rig.backend(), rig.backend()
    rig.serve(endpoint(one, "one"), endpoint(other, "other", backup=True))
    client = rig.client(b"question")
    rig.until(one.look, "it is relayed")
    assert rig.read(one.accepted[0], 8) == b"question"
    reset(one.accepted.pop())
    assert rig.read(client) == b"reset"
    rig.until(lambda: rig.engine.connections == 0, "it has ended")
    assert other.look() == 0


@pytest.mark.parametrize("how", ["fin", "reset"])
def test_a_client_that_leaves_while_its_backend_is_connected_gives_the_place_back(rig: Rig, how: str) -> None:
    with Full() as full:
        rig.serve(endpoint(full.address, maxconn=1), timeouts=Timeouts(connect_seconds=1000.0))
        leaving, waiting = rig.client(), rig.client()
        rig.until(lambda: rig.engine.waiting == 2, "one is being connected, the other waits")
        [target] = rig.engine._targets
        assert target.connections == 1
        leaving.close() if how == "fin" else reset(leaving)
        rig.until(lambda: rig.engine.waiting == 1, "it has left")
        rig.until(lambda: rig.engine.attempts[0].target is target, "its place is the other one's")
        assert target.connections == 1
        assert [line["end"] for line in rig.lines()] == ["CC"]
        waiting.close()
        rig.until(lambda: rig.engine.waiting == 0, "nobody is left")
        assert target.cells[CURRENT] == 0


# --- accepting and the loop -----------------------------------------------------------------------------------------


def test_what_failed_for_one_client_holds_up_no_other_one() -> None:
    answers: list[Any] = [OSError(errno.ECONNABORTED, "gone"), OSError(errno.EPROTO, "gone"), None, BlockingIOError()]
    let_in: list[Any] = []
    ours, theirs = socket.socketpair()

    class Listener:
        family, type, proto = socket.AF_UNIX, socket.SOCK_STREAM, 0

        def _accept(self) -> tuple[int, str]:
            answer = answers.pop(0)
            if answer is not None:
                raise answer
            return theirs.detach(), "peer"

    loop = Loop()
    listener: Any = Listener()
    acceptor = Acceptor(listener, loop, lambda client, peer: let_in.extend((client, peer)))
    acceptor.accept_queued()
    assert let_in[1:] == ["peer"]
    assert (answers, acceptor.pauses) == ([], 0)
    loop.shut_down()
    let_in[0].close()
    ours.close()


def test_in_a_storm_of_clients_so_many_are_let_in_at_each_turn_and_relays_have_theirs(rig: Rig) -> None:
    backend = rig.backend()
    rig.serve(endpoint(backend))
    first = rig.client()
    rig.until(lambda: backend.look() == rig.engine.connections == 1, "it is relayed")
    for _ in range(3 * ACCEPTED_PER_TURN):
        rig.client()
    first.send(b"x")
    rig.loop.turn(0)
    assert rig.engine.connections + rig.engine.waiting == 1 + ACCEPTED_PER_TURN
    assert backend.accepted[0].recv(1) == b"x", "in the same turn"
    rig.until(lambda: backend.look() == 1 + 3 * ACCEPTED_PER_TURN, "all are relayed")


def test_a_hang_up_that_nobody_asked_about_turns_no_loop() -> None:
    rig = OneRelay()
    try:
        while not rig.relay._down.has_pending:  # the client does not read: nothing of the server is waited for
            rig.server.send(b"x" * 100_000)
            rig.step()
        while rig.step():
            pass
        rig.server.reset()
        assert [rig.step(0.05) for _ in range(3)][1:] == [False] * 2, "EPOLLHUP is told once at most"
        rig.client.fin()
        rig.finish(rig.client)
        assert rig.client.ending == "reset"
    finally:
        rig.close()


def test_a_number_means_one_socket_throughout_a_turn() -> None:
    """Both are readable in one batch; the first closes the second, and makes a new one."""
    loop = Loop()
    pairs = [socket.socketpair() for _ in range(2)]
    made: list[socket.socket] = []
    seen: list[int] = []

    def event(own: int, other: int) -> None:
        seen.append(own)
        loop.close(pairs[other][0])
        made.extend(socket.socketpair())

    number_of = [pairs[0][0].fileno(), pairs[1][0].fileno()]
    for own, other in ((0, 1), (1, 0)):
        loop.watch(number_of[own], READ, lambda _, own=own, other=other: event(own, other))  # type: ignore[misc]
        pairs[own][1].send(b"x")
    loop.turn(0)
    assert len(seen) == 1, "who was closed hears nothing"
    assert not {one.fileno() for one in made} & set(number_of), "no number is given again within the turn"
    assert pairs[1 - seen[0]][0].fileno() == -1, "at its end it is closed"
    loop.shut_down()
    for one in (*pairs[0], *pairs[1], *made):
        one.close()


# --- headers, limits, addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_too_long", [True, False])
def test_a_proxy_header_is_bounded_in_size_and_time(
    rig: Rig, is_too_long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "HEADER_SECONDS", 0.05)
    backend = rig.backend()
    rig.serve(endpoint(backend), accept_proxy="accept")
    begin = b"\r\n\r\n\0\r\nQUIT\n\x21\x11" + struct.pack("!H", V2_MAXIMUM_BYTES if is_too_long else 100)
    client = rig.client(begin + b"\0" * (2000 if is_too_long else 10))
    assert rig.read(client) == b"reset"
    assert [line["end"] for line in rig.lines()] == ["PR" if is_too_long else "cR"]
    assert backend.look() == 0


@pytest.mark.parametrize("side", ["client", "server"])
def test_what_comes_from_either_side_puts_the_idle_limit_off(side: str) -> None:
    rig = OneRelay(Limits(1000.0, None))
    try:
        before = rig.relay.due_at
        assert before is not None
        getattr(rig, side).send(b"x")
        while rig.relay.totals == (0, 0):
            rig.step(0.01)
        assert rig.relay.due_at is not None
        assert rig.relay.due_at == rig.loop.now + 1000.0 > before
    finally:
        rig.close()


def test_a_mapped_address_is_one_source_with_its_ipv4_address(rig: Rig) -> None:
    backend = rig.backend()
    rig.serve(endpoint(backend), per_source=1)
    first = rig.client()
    rig.until(lambda: rig.engine.connections == 1, "it is relayed")
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    rig.engine.let_in("shop", theirs, ("::ffff:127.0.0.1", 1, 0, 0))
    rig.loop.turn(0)
    assert rig.engine.connections + rig.engine.waiting == 1
    assert first.fileno() >= 0
    ours.close()


def test_a_zone_goes_to_the_kernel_as_a_number() -> None:
    number = socket.if_nametoindex("lo")
    assert numeric_address("[fe80::1%lo]:80") == (socket.AF_INET6, ("fe80::1", 80, 0, number))
    assert numeric_address("[fe80::1%7]:80") == (socket.AF_INET6, ("fe80::1", 80, 0, 7))


def test_a_zone_that_is_not_there_holds_up_no_other_backend_and_is_looked_for_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = rig.backend()
    away = endpoint("[fe80::1%away0]:80", "away")
    rig.serve(away, endpoint(backend))
    rig.client()
    rig.until(lambda: backend.look() == 1, "it is relayed")
    assert rig.failures == []
    monkeypatch.setattr(socket, "if_nametoindex", {"away0": 7}.__getitem__)
    rig.serve(away, endpoint(backend))
    assert next(one.address for one in rig.engine._targets) == (socket.AF_INET6, ("fe80::1", 80, 0, 7))


def test_small_packets_wait_for_nothing_and_silent_peers_are_noticed(rig: Rig) -> None:
    backend = rig.backend()
    rig.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as those of handoff are
    notice_silence(rig.listener, 100.0)
    rig.serve(endpoint(backend), timeouts=Timeouts(silent_seconds=300.0))
    for target in rig.engine._targets:
        target.is_local = False
    rig.client()
    rig.until(lambda: rig.engine.connections == 1, "it is relayed")
    [one] = rig.engine.relays()
    for sock, seconds in ((one._client, 100), (one._server, 300)):
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == seconds // 2
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == seconds * 1000
    notice_silence(rig.listener, None)
    assert not rig.listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert not rig.listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)


# --- checks ---------------------------------------------------------------------------------------------------------


def test_what_is_known_is_asked_again_at_times_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    all_wait = asyncio.Event()

    async def waited(seconds: float, *_: asyncio.Event) -> None:
        waits.append(seconds)
        if len(waits) == 9:
            all_wait.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(checker, "_wait", waited)

    async def test() -> None:
        async with asyncio.TaskGroup() as tasks:
            asking = checker_of(tasks, Seen())
            check = Check(interval_seconds=1000.0)
            asking.check_only({one: Task(check=check, address=f"127.0.0.1:{one}") for one in "123456789"})
            await all_wait.wait()
            asking.check_only({})
        assert len(set(waits)) == 9, "not all at once"
        assert all(0 <= seconds < 1000 for seconds in waits)
        jitters = [checker._jitter() for _ in range(1000)]
        assert 0.9 <= min(jitters) < 0.95
        assert 1.05 < max(jitters) <= 1.1

    run(test)


def test_no_more_checks_run_at_once_than_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "MAXIMUM_AT_ONCE", 3)
    monkeypatch.setattr(checker.random, "random", lambda: 0.0)  # all of them want to begin now

    async def test() -> None:
        together = most = 0

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal together, most
            together += 1
            most = max(most, together)
            await reader.readuntil(b"\r\n\r\n")
            for _ in range(100):  # time for others
                await asyncio.sleep(0)
            together -= 1
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        async with accepting(handle) as port:
            text = config(*[port] * 12, check='type = "http"\ninterval = "100s"\ntimeout = "30s"')
            async with controller(text, tmp_path) as running, relay(running.directory) as one:
                await one.table(lambda table: all(each.is_eligible for each in endpoints(table).values()))
        assert most == 3

    run(test)
