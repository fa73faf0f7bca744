"""Connections of a program's own protocol that are asked to move, and what becomes of those that stay."""

from __future__ import annotations

import logging
from typing import Any, cast

import pytest

import handoff
from handoff.worker.mover import Mover
from handoff.worker.raw import RawConnection


class Transport:
    """What asyncio's and uvloop's have in common."""

    def __init__(self) -> None:
        self.protocol: object = None
        self.buffered = 0
        self.limits = (16, 65536)
        self.is_paused = self.is_aborted = False

    def get_extra_info(self, name: str) -> Any:
        return ("127.0.0.1", 1) if name == "peername" else None

    def get_protocol(self) -> object:
        return self.protocol

    def set_protocol(self, protocol: object) -> None:
        self.protocol = protocol

    def is_reading(self) -> bool:
        return not self.is_paused

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False

    def get_write_buffer_size(self) -> int:
        return self.buffered

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self.limits

    def set_write_buffer_limits(self, high: int, low: int = 0) -> None:
        self.limits = (low, high)

    def is_closing(self) -> bool:
        return self.is_aborted

    def abort(self) -> None:
        self.is_aborted = True


class Posted:
    """In place of a mover."""

    def __init__(self) -> None:
        self.connections: list[RawConnection] = []
        self.refused = 0

    def post(self, connection: RawConnection, mailbox: int | None = None) -> bool:
        self.connections.append(connection)
        return True

    def count_refused(self) -> None:
        self.refused += 1


class Known(handoff.Protocol):
    """`answers` of detach, in order."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.attached: list[bytes] = []

    def detach(self) -> bytes | None:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return cast("bytes | None", answer)

    def attach(self, state: bytes) -> None:
        self.attached.append(state)
        if state == b"bad":
            raise ValueError("of another release")


class Rig:
    def __init__(self, *answers: Any) -> None:
        self.protocol, self.transport, self.mover = Known(*answers), Transport(), Posted()
        self.transport.protocol = self.protocol
        transport, mover = cast("Any", self.transport), cast("Mover", self.mover)
        self.connection = RawConnection(self.protocol, transport, "default", mover)


def test_a_connection_whose_protocol_says_not_now_reads_on_and_is_asked_again_when_data_came() -> None:
    rig = Rig(None, b"state")
    rig.connection.begin_move()
    assert rig.transport.is_reading()
    assert rig.mover.connections == []
    rig.protocol.data_received(b"")
    assert rig.mover.connections == [rig.connection]
    assert not rig.transport.is_reading()


def test_who_has_paused_reading_by_itself_stays_paused() -> None:
    rig = Rig(None, None)
    rig.transport.pause_reading()
    rig.connection.begin_move()
    assert not rig.transport.is_reading()
    rig.connection.cancel_move()
    assert not rig.transport.is_reading()


def test_a_connection_on_which_tls_was_begun_is_left_alone() -> None:
    rig = Rig()  # detach would raise
    rig.transport.protocol = tls = object()
    rig.connection.begin_move()
    assert rig.transport.protocol is tls
    assert rig.transport.is_reading()


def test_one_that_begins_tls_while_it_is_asked_is_not_asked_again() -> None:
    rig = Rig(None)
    rig.connection.begin_move()
    rig.transport.protocol = object()
    rig.protocol.data_received(b"")
    assert rig.mover.connections == []
    assert rig.transport.is_reading()


def test_what_was_not_written_is_waited_for_and_who_stays_has_its_own_limits_again() -> None:
    rig = Rig()
    rig.transport.buffered = 1
    rig.connection.begin_move()
    rig.connection.try_move()
    assert rig.transport.limits == (0, 0)
    rig.connection.cancel_move()
    assert rig.transport.limits == (16, 65536)
    assert rig.transport.is_reading()


def test_a_state_that_was_not_taken_is_attached_again() -> None:
    rig = Rig(bytearray(b"state"))
    rig.connection.begin_move()
    rig.connection.cancel_move()
    assert rig.protocol.attached == [b"state"]
    assert rig.transport.is_reading()
    assert rig.connection.letter() is None


def test_a_protocol_that_does_not_take_its_state_back_is_closed_and_counted_once() -> None:
    rig = Rig(b"bad")
    rig.connection.begin_move()
    rig.connection.cancel_move()
    assert rig.transport.is_aborted
    assert rig.mover.refused == 1
    rig.connection.cancel_move()
    assert rig.mover.refused == 1


def test_one_that_was_refused_stays_and_is_not_asked_again() -> None:
    rig = Rig(b"large")
    rig.connection.begin_move()
    rig.connection.refused()
    rig.connection.begin_move()
    assert rig.protocol.attached == [b"large"]
    assert rig.transport.is_reading()
    assert rig.mover.connections == [rig.connection]


@pytest.mark.parametrize("answer", [RuntimeError("no"), "text", 17])
def test_a_detach_that_fails_is_logged_once(answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(answer, answer)
    with caplog.at_level(logging.ERROR):
        rig.connection.begin_move()
        rig.connection.cancel_move()
        rig.connection.begin_move()
    assert [record.getMessage() for record in caplog.records] == ["detach failed; the connection stays"]
    assert rig.transport.is_reading()
    assert rig.mover.connections == []
