"""Relays whose peers reset while nothing is read of them, send urgent bytes, or are slow after one side has ended."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from lb.relay.flow import CHUNK_BYTES, LARGE_BYTES
from lb.relay.relay import Closed, Limits
from tests.unit.fds import open_fds
from tests.unit.relay_rig import Peer, Rig

BLOCK = b"x" * 200_000


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(Limits(idle_seconds=3600.0, fin_seconds=0.05))
    yield made
    made.close()


def fill(rig: Rig, *writers: Peer, size: int = 5 * CHUNK_BYTES) -> None:
    """Until these cannot send more, since nobody reads."""
    quiet = 0
    while quiet < 20:
        before = [len(one.sent) for one in writers]
        for one in writers:
            one.send(os.urandom(size))
        rig.step(0.002)
        quiet = quiet + 1 if before == [len(one.sent) for one in writers] else 0


def until_closed(rig: Rig) -> None:
    rig.until(lambda: rig.closed is not None)


def make_bulk(rig: Rig, is_up: bool) -> None:
    writer, reader = (rig.client, rig.server) if is_up else (rig.server, rig.client)
    while not (rig.relay._up if is_up else rig.relay._down).is_bulk:
        writer.send(BLOCK)
        rig.step()
        reader.read(1 << 20)
        assert len(writer.sent) < 500_000_000, "never bulk"
    rig.until(lambda: reader.read(1 << 20) or len(reader.seen) == len(writer.sent))


@pytest.mark.parametrize("is_up", [True, False])
def test_an_urgent_byte_in_a_bulk_direction_is_one_among_the_others(rig: Rig, is_up: bool) -> None:
    make_bulk(rig, is_up)
    writer, reader = (rig.client, rig.server) if is_up else (rig.server, rig.client)
    for _ in range(3):
        writer.send(b"before")
        writer.send_urgent()
        writer.send(b"after")
        rig.until(lambda: reader.read(1 << 20) or len(reader.seen) == len(writer.sent))
        assert not rig.step(), "nothing turns while nothing comes"
    writer.send_urgent()
    writer.send(BLOCK)
    writer.fin()
    rig.until(lambda: reader.read(1 << 20) or bool(reader.ending))
    assert reader.ending == "fin"
    assert reader.seen == writer.sent


def test_a_direction_has_one_pipe_however_its_bytes_come(rig: Rig) -> None:
    make_bulk(rig, is_up=True)
    before = open_fds()
    for block in (b"x", BLOCK, b"x", BLOCK):
        for _ in range(8):
            rig.client.send_urgent()
            rig.client.send(block)
            rig.until(lambda: rig.server.read(1 << 20) or len(rig.server.seen) == len(rig.client.sent))
    assert open_fds() == before


def test_what_is_taken_in_small_pieces_is_whole() -> None:
    rig = Rig(buffer_bytes=8192)
    try:
        fill(rig, rig.client, size=LARGE_BYTES // 4)
        assert rig.relay._up.has_pending
        assert not rig.relay._up.is_bulk
        rig.client.fin()
        rig.server.fin()
        while rig.server.ending != "fin":
            rig.server.read(CHUNK_BYTES // 8)
            rig.step()
        assert rig.server.seen == rig.client.sent
    finally:
        rig.close()


@pytest.mark.parametrize("is_urgent", [True, False])
@pytest.mark.parametrize("is_up", [True, False])
def test_a_reset_of_a_bulk_direction_is_no_end(rig: Rig, is_up: bool, is_urgent: bool) -> None:
    make_bulk(rig, is_up)
    writer, reader = (rig.client, rig.server) if is_up else (rig.server, rig.client)
    writer.send(BLOCK)
    if is_urgent:
        rig.until(lambda: reader.read(1 << 20) or len(reader.seen) == len(writer.sent))
        writer.send_urgent()
        writer.send(b"after")
    rig.reset(writer)
    rig.finish(reader)
    assert len(reader.seen) >= writer.arrived
    assert reader.ending == "reset"


@pytest.mark.parametrize("is_client", [True, False])
@pytest.mark.parametrize("is_both", [True, False])
def test_a_reset_is_passed_on_to_one_that_reads_nothing(rig: Rig, is_client: bool, is_both: bool) -> None:
    gone, other = (rig.client, rig.server) if is_client else (rig.server, rig.client)
    fill(rig, *((gone, other) if is_both else (gone,)))
    rig.reset(gone)
    until_closed(rig)
    assert rig.closed is not None
    assert (rig.closed.cause, rig.closed.side) == ("reset", "client" if is_client else "server")
    rig.until(lambda: other.read(1 << 20) or bool(other.ending))
    assert other.ending == "reset"


@pytest.mark.parametrize("is_client", [True, False])
def test_what_came_before_that_reset_is_delivered_while_it_is_taken(rig: Rig, is_client: bool) -> None:
    gone, other = (rig.client, rig.server) if is_client else (rig.server, rig.client)
    fill(rig, gone)
    rig.reset(gone)
    rig.finish(other)
    assert len(other.seen) >= gone.arrived
    assert other.ending == "reset"


@pytest.mark.parametrize("is_client", [True, False])
def test_a_reset_after_a_fin_is_passed_on_although_nobody_sends(is_client: bool) -> None:
    rig = Rig(Limits(idle_seconds=3600.0, fin_seconds=3600.0))
    try:
        gone, other = (rig.client, rig.server) if is_client else (rig.server, rig.client)
        gone.send(b"question")
        gone.fin()
        rig.until(lambda: other.read(100) or bool(other.ending))
        assert (bytes(other.seen), other.ending) == (b"question", "fin")
        gone.reset()
        until_closed(rig)
        other.send(b"too late")
        assert other.is_refused
        assert rig.closed == Closed("reset", "client" if is_client else "server", *((8, 0) if is_client else (0, 8)))
    finally:
        rig.close()


def test_after_one_side_has_ended_the_other_has_that_time_again_with_all_it_sends() -> None:
    rig = Rig(Limits(idle_seconds=3600.0, fin_seconds=1800.0))
    try:
        rig.client.fin()
        rig.until(lambda: rig.server.read(100) or bool(rig.server.ending))
        due_at = rig.relay.due_at
        assert due_at is not None
        rig.step(0.01)
        rig.server.send(b"slowly")
        rig.until(lambda: rig.client.read(100) or rig.client.seen == b"slowly")
        assert rig.relay.due_at is not None
        assert due_at < rig.relay.due_at == rig.loop.now + 1800.0
    finally:
        rig.close()
