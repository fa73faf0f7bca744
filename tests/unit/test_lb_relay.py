"""Relays on real sockets: whatever is sent, read, ended and reset in whatever order, both sides see the same story."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lb.relay.flow import CHUNK_BYTES
from lb.relay.letters import plain_socket
from lb.relay.loop import Loop
from lb.relay.relay import Closed, Limits, Relay, RelayState
from lb.relay.timers import Timers
from tests.unit.fds import open_fds

DEADLINE_SECONDS = 20.0


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    for one in (ours, theirs):
        one.setblocking(False)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return ours, theirs


@dataclass
class Peer:
    """One end outside of the relay, with what it did and saw."""

    sock: socket.socket
    sent: bytearray = field(default_factory=bytearray)
    seen: bytearray = field(default_factory=bytearray)
    ending: str = ""
    """What it saw at the end: "fin" or "reset"."""
    has_ended: bool = False
    has_sent_fin: bool = False
    has_reset: bool = False

    def send(self, data: bytes) -> None:
        if not self.has_ended:
            with contextlib.suppress(OSError):  # full, or reset by the other side
                self.sent += data[: self.sock.send(data)]

    def read(self, size: int) -> None:
        if self.ending or self.has_reset:
            return
        try:
            data = self.sock.recv(size)
        except BlockingIOError:
            return
        except OSError:
            self.ending = "reset"
            return
        self.seen += data
        if not data:
            self.ending = "fin"

    def fin(self) -> None:
        if not self.has_ended:
            self.has_ended = self.has_sent_fin = True
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        self.has_ended = self.has_reset = True
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


class Rig:
    """A client, a server, and a relay between them, stepped by hand."""

    def __init__(self, limits: Limits | None = None, first: bytes = b"") -> None:
        client, relay_client = tcp_pair()
        server, relay_server = tcp_pair()
        self.client, self.server = Peer(client), Peer(server)
        self.loop = Loop()
        self.closed: Closed | None = None
        self.relay = Relay(
            relay_client,
            relay_server,
            self.loop,
            limits or Limits(),
            lambda _, closed: setattr(self, "closed", closed),
            first,
        )

    def move(self) -> None:
        """To another loop, as it goes to another process. The epoll of the old loop must forget it."""
        if self.closed is not None:
            return
        state, fds = self.relay.state()
        data, fds = msgspec.msgpack.encode(state), tuple(map(os.dup, fds))
        self.relay.let_go()
        assert self.loop.is_idle
        assert self.loop.turn(0) == 0, "no ghosts"
        self.loop.shut_down()
        self.loop = Loop()
        client, server = plain_socket(fds[0]), plain_socket(fds[1])
        moved = msgspec.msgpack.decode(data, type=RelayState), fds[2:]
        self.relay = Relay(client, server, self.loop, self.relay._limits, self.relay._on_close, moved=moved)

    def step(self, timeout: float = 0.0) -> bool:
        return self.loop.turn(timeout) > 0

    def finish(self, *peers: Peer) -> None:
        """Let everything flow, and these peers read, until they have seen an end."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not all(peer.ending or peer.has_reset for peer in peers) or self.closed is None:
            assert time.monotonic() < deadline, (self.client, self.server, self.closed)
            self.step(0.001)
            for peer in peers:
                peer.read(1 << 20)

    def close(self) -> None:
        self.relay.close()
        self.loop.shut_down()
        for peer in (self.client, self.server):
            peer.sock.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.booleans(), st.sampled_from([1, 100, CHUNK_BYTES, 5 * CHUNK_BYTES, 2_000_000])),
        st.tuples(st.just("read"), st.booleans(), st.sampled_from([1, 1000, 300_000])),
        st.tuples(st.sampled_from(["fin", "reset"]), st.booleans(), st.just(0)),
        st.tuples(st.just("step"), st.booleans(), st.integers(1, 5)),
        st.tuples(st.just("move"), st.booleans(), st.just(0)),
    ),
    max_size=40,
)


@given(actions=ACTIONS, first=st.sampled_from([b"", b"PROXY header\r\n"]), is_moved_after=st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_order_of_bytes_ends_resets_and_moves_is_passed_on(
    actions: list[tuple[str, bool, int]], first: bytes, is_moved_after: bool
) -> None:
    rig = Rig(first=first)
    try:
        for name, is_client, number in actions:
            peer = rig.client if is_client else rig.server
            match name:
                case "send":
                    peer.send(os.urandom(number))
                case "read":
                    peer.read(number)
                case "fin":
                    peer.fin()
                case "reset":
                    peer.reset()
                    if is_moved_after:
                        rig.step()
                        rig.move()
                    break
                case "move":
                    rig.move()
                case _:
                    for _ in range(number):
                        rig.step()
        for peer in (rig.client, rig.server):
            peer.fin()
        rig.finish(rig.client, rig.server)
        check(rig.client, rig.server, b"")
        check(rig.server, rig.client, first)
    finally:
        rig.close()


def check(reader: Peer, writer: Peer, first: bytes) -> None:
    """What the reader saw is what the writer sent, with the writer's ending."""
    if reader.has_reset:
        return
    expected = first + bytes(writer.sent)
    assert expected.startswith(bytes(reader.seen))
    if writer.has_reset and not (writer.has_sent_fin and len(reader.seen) == len(expected)):
        assert reader.ending == "reset"  # of what the relay had not taken the kernel may drop the rest; no clean end
    elif writer.has_reset:
        assert reader.ending in ("fin", "reset")
    else:
        assert (reader.ending, len(reader.seen)) == ("fin", len(expected))


def test_half_closed_the_other_direction_goes_on(rig: Rig) -> None:
    rig.client.send(b"request")
    rig.client.fin()
    while rig.server.ending != "fin":
        rig.step(0.01)
        rig.server.read(100)
    assert bytes(rig.server.seen) == b"request"
    rig.server.send(b"answer" * 1000)
    rig.server.fin()
    rig.finish(rig.client)
    assert bytes(rig.client.seen) == b"answer" * 1000
    assert rig.closed == Closed("end", "server", 7, 6000)


def test_what_came_before_a_reset_is_delivered_before_it(rig: Rig) -> None:
    rig.client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    rig.server.send(b"x" * 50_000)
    while rig.relay._down.total < 50_000:
        rig.step(0.01)
    rig.server.reset()
    rig.finish(rig.client)
    assert (len(rig.client.seen), rig.client.ending) == (50_000, "reset")


def test_a_bulk_direction_goes_through_a_pipe_which_is_gone_at_the_end(rig: Rig) -> None:
    before = open_fds()
    block = os.urandom(1_000_000)
    after = 0
    while after < 5_000_000:  # so much through the pipe
        for _ in range(3):
            rig.server.send(block)
        after += 1_000_000 if rig.relay._down.is_bulk else 0
        rig.step()
        rig.client.read(1 << 20)
        assert len(rig.server.sent) < 500_000_000, "never bulk"
    assert not rig.relay._up.is_bulk
    rig.client.fin()
    rig.server.fin()
    rig.finish(rig.client, rig.server)
    assert rig.client.seen == rig.server.sent
    assert not open_fds() - before


def test_a_reader_that_does_not_read_holds_its_writer_back(rig: Rig) -> None:
    quiet = 0
    while quiet < 50:
        before = len(rig.client.sent)
        rig.client.send(b"x" * 1_000_000)
        rig.step(0.001)
        quiet = quiet + 1 if len(rig.client.sent) == before else 0
    total = len(rig.client.sent)
    assert total < 100_000_000
    assert not rig.step()  # nothing turns while nobody reads
    rig.client.fin()
    rig.server.fin()
    rig.finish(rig.client, rig.server)
    assert len(rig.server.seen) == total


@pytest.mark.parametrize(("limits", "cause"), [(Limits(0.05, None), "idle"), (Limits(None, 0.05), "fin")])
def test_limits_cut_both_sides_off(limits: Limits, cause: str) -> None:
    rig = Rig(limits)
    try:
        if cause == "fin":
            rig.client.fin()
        rig.finish(rig.server)
        assert rig.closed is not None
        assert rig.closed.cause == cause
        assert rig.server.ending == ("fin" if cause == "fin" else "reset")
    finally:
        rig.close()


class Timed:
    def __init__(self, due_at: float) -> None:
        self.bucket: int | None = None
        self.due_at: float | None = due_at
        self.called: list[float] = []

    def is_due(self, now: float) -> None:
        self.called.append(now)
        self.due_at = None


def test_timers_look_when_something_is_due_and_not_before() -> None:
    one, timers = Timed(10.0), Timers()
    timers.arm(one)
    assert timers.next_deadline() == pytest.approx(10.0, abs=0.05)
    one.due_at = 20.0
    timers.check(11.0)
    assert one.called == []
    assert timers.next_deadline() == pytest.approx(20.0, abs=0.05)
    timers.check(21.0)
    assert one.called == [21.0]
    assert timers.next_deadline() is None


def test_what_is_armed_for_later_is_looked_at_before_it_can_be_due() -> None:
    one, timers = Timed(102.1), Timers()
    timers.set_now(100.1)
    timers.arm_later(one)
    assert timers.next_deadline() == pytest.approx(102.0, abs=0.05)
    timers.check(102.0)
    assert one.called == []
    timers.check(102.2)
    assert one.called == [102.2]


def test_who_may_be_due_earlier_is_armed_earlier_and_never_later() -> None:
    one, timers = Timed(300.0), Timers()
    timers.set_now(100.0)
    timers.arm(one)
    timers.arm_at(one, 110.0)
    assert timers.next_deadline() == pytest.approx(110.0, abs=1.0)
    timers.arm_at(one, 200.0)
    timers.check(111.0)
    assert one.called == []
    assert timers.next_deadline() == pytest.approx(300.0, abs=1.0)
    timers.forget(one)
    timers.check(301.0)
    assert one.called == []


def test_a_pipe_with_something_in_it_moves(rig: Rig) -> None:
    sent = bytearray()
    while not (rig.relay._up.is_bulk and rig.relay._up.has_pending):  # nobody reads
        size = len(rig.client.sent)
        rig.client.send(os.urandom(1 << 16))
        sent += rig.client.sent[size:]
        rig.step()
    state, fds = rig.relay.state()
    assert state.up.piped > 0
    assert len(fds) == 4
    gc.collect()
    before = open_fds()
    rig.move()
    assert not open_fds() - before, "no fd is left behind"
    rig.client.fin()
    rig.server.fin()
    rig.finish(rig.client, rig.server)
    assert rig.server.seen == sent


def test_limits_are_those_from_before_a_move() -> None:
    rig = Rig(Limits(1000.0, None, 500.0))
    try:
        began_at = rig.relay.began_at
        assert rig.relay.due_at == began_at + 500
        rig.move()
        assert rig.relay.due_at == began_at + 500
        assert rig.loop.timers.next_deadline() is not None
    finally:
        rig.close()
