"""Relays on real sockets: whatever is sent, read, ended and reset in whatever order, both sides see the same story."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lb.relay.flow import CHUNK_BYTES, LARGE_BYTES
from lb.relay.loop import Loop
from lb.relay.relay import Closed, Limits
from lb.relay.timers import BUCKET_SECONDS, Timers
from tests.unit.fds import open_fds
from tests.unit.relay_rig import Peer, Rig


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


SIZES = [1, 100, CHUNK_BYTES - 1, CHUNK_BYTES, 5 * CHUNK_BYTES, 1_000_000]
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.booleans(), st.sampled_from(SIZES)),
        st.tuples(st.sampled_from(["urgent", "flood"]), st.booleans(), st.just(0)),
        st.tuples(st.just("read"), st.booleans(), st.sampled_from([1, 1000, 300_000, 3_000_000])),
        st.tuples(st.sampled_from(["fin", "reset"]), st.booleans(), st.just(0)),
        st.tuples(st.just("step"), st.booleans(), st.integers(1, 5)),
        st.tuples(st.just("move"), st.booleans(), st.just(0)),
    ),
    max_size=40,
)


@given(actions=ACTIONS, first=st.sampled_from([b"", b"PROXY header\r\n"]), buffer_bytes=st.sampled_from([0, 32768]))
@settings(max_examples=100, deadline=None)
def test_any_order_of_bytes_ends_resets_and_moves_is_passed_on(
    actions: list[tuple[str, bool, int]], first: bytes, buffer_bytes: int
) -> None:
    rig = Rig(first=first, buffer_bytes=buffer_bytes)
    try:
        for name, is_client, number in actions:
            act(rig, name, rig.client if is_client else rig.server, number)
        for peer in (rig.client, rig.server):
            peer.fin()
        rig.finish(rig.client, rig.server)
        check(rig.client, rig.server, b"")
        check(rig.server, rig.client, first)
    finally:
        rig.close()


def act(rig: Rig, name: str, peer: Peer, number: int) -> None:
    match name:
        case "send":
            peer.send(os.urandom(number))
        case "urgent":
            peer.send_urgent()
        case "flood":  # so much that the direction becomes bulk, if it can
            for _ in range(8):
                peer.send(os.urandom(5 * CHUNK_BYTES))
                rig.step()
                (rig.server if peer is rig.client else rig.client).read(1 << 20)
        case "read":
            peer.read(number)
        case "fin":
            peer.fin()
        case "reset":
            rig.reset(peer)
        case "move":
            rig.move()
        case _:
            for _ in range(number):
                rig.step()


def check(reader: Peer, writer: Peer, first: bytes) -> None:
    """What the reader saw is what the writer sent, with the writer's ending. `first`: what goes ahead of it."""
    if reader.has_reset:
        return
    expected = first + bytes(writer.sent)
    assert expected.startswith(bytes(reader.seen))
    if not writer.has_reset:
        assert (reader.ending, len(reader.seen)) == ("fin", len(expected))
        return
    assert len(reader.seen) >= writer.arrived  # of what had not arrived the kernel may drop all
    if not (writer.has_sent_fin and len(reader.seen) == len(expected)):
        assert reader.ending == "reset"  # no clean end


@pytest.mark.parametrize("first", [b"", b"PROXY header\r\n"])
def test_an_urgent_byte_between_data_and_the_end_is_passed_on(first: bytes) -> None:
    """Reading stops before it: what was read is less than there was room for, and yet not all."""
    rig = Rig(first=first)
    try:
        rig.server.send(b"before")
        rig.server.send_urgent()
        rig.server.send(b"after")
        rig.server.fin()
        rig.client.fin()
        rig.finish(rig.client)
        assert bytes(rig.client.seen) == b"beforeUafter"
    finally:
        rig.close()


@pytest.mark.parametrize("data", [b"", b"request"])
@pytest.mark.parametrize("first", [b"", b"PROXY header\r\n"])
@pytest.mark.parametrize("is_client", [True, False])
def test_a_reset_right_behind_an_end_is_seen(data: bytes, first: bytes, is_client: bool) -> None:
    """Both are told in one event, and then no more."""
    rig = Rig(first=first)
    try:
        for _ in range(3):
            rig.step()
        peer = rig.client if is_client else rig.server
        peer.send(data)
        peer.fin()
        peer.reset()
        rig.until(lambda: rig.closed is not None)
        assert rig.closed is not None
        assert (rig.closed.cause, rig.closed.side) == ("reset", "client" if is_client else "server")
    finally:
        rig.close()


def test_a_deadline_is_exact_after_a_time_in_which_nothing_was_due(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.3]
    monkeypatch.setattr("lb.relay.loop.monotonic", lambda: clock[0])
    loop = Loop()
    loop.timers.call_at(clock[0] + 3600, lambda: None)
    for _ in range(100):
        clock[0] += 0.1
        loop.turn(0)
    fired: list[float] = []
    due_at = clock[0] + 0.2
    loop.timers.call_at(due_at, lambda: fired.append(clock[0]))
    while not fired:
        clock[0] += 0.005
        loop.turn(0)
    assert fired[0] - due_at < 2 * BUCKET_SECONDS
    loop.shut_down()
    with pytest.raises(ValueError, match="closed epoll"):
        loop.watch(0, 1, lambda _: None)


def test_what_comes_while_a_large_chunk_is_passed_on_is_not_forgotten(rig: Rig) -> None:
    """Data is told once, until a chunk was large: then what is left of it must be told again."""
    data = os.urandom(3 * CHUNK_BYTES)
    rig.client.send(data)
    rig.until(lambda: rig.server.read(len(data)) or len(rig.server.seen) == len(data))
    assert bytes(rig.server.seen) == data


def test_small_exchanges_after_a_large_chunk_are_passed_on_to_their_end(rig: Rig) -> None:
    sent = os.urandom(LARGE_BYTES)
    rig.server.send(sent)
    rig.until(lambda: rig.client.read(1 << 20) or len(rig.client.seen) == len(sent))
    for number in range(20):
        part = b"%d" % number * 10
        rig.server.send(part)
        sent += part
        rig.until(lambda: rig.client.read(1 << 20) or bytes(rig.client.seen) == sent)  # noqa: B023  # at once
    assert not rig.relay._down.is_quick
    rig.server.fin()
    rig.client.fin()
    rig.finish(rig.client, rig.server)
    assert rig.closed == Closed("end", rig.closed.side if rig.closed else "", 0, len(sent))


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
