"""The relay worker's connection to its controller: tables in order, garbage, a controller that comes and goes."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lb.core.table import Route, Table
from lb.core.wire import SOCKET_NAME, Draining, Failed, Frames, FromRelay, Hello, Taken, decode_from_relay, frame
from lb.relay.link import Link
from lb.relay.loop import Loop

DEADLINE_SECONDS = 20.0
HELLO = Hello(pid=1, generation=3, slot=0, row=1)


def table(generation: int, revision: int) -> Table:
    return Table(generation=generation, revision=revision, routes={"shop": Route(service="shop", shares={}, pools={})})


class Rig:
    """A link, and a controller played by hand."""

    def __init__(self, directory: Path) -> None:
        self.loop = Loop()
        self.path = directory / SOCKET_NAME
        self.tables: list[tuple[int, int]] = []
        self.older = 0
        self.link = Link(
            self.loop,
            directory,
            HELLO,
            table(3, 5),
            lambda one: self.tables.append((one.generation, one.revision)),
            self.hear_older,
        )
        self.listener: socket.socket | None = None
        self.peer: socket.socket | None = None
        self.heard: list[FromRelay] = []
        self.frames = Frames()

    def hear_older(self) -> None:
        self.older += 1

    def listen(self) -> None:
        self.path.unlink(missing_ok=True)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen()
        self.listener.setblocking(False)

    def accept(self) -> None:
        assert self.listener is not None

        def accepted() -> bool:
            assert self.listener is not None
            try:
                self.peer, _ = self.listener.accept()
            except BlockingIOError:
                return False
            self.peer.setblocking(False)
            self.frames, self.heard = Frames(), []
            return True

        self.until(accepted, "it connects")

    def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, what
            self.loop.turn(0.01)
            if self.peer is not None:
                with contextlib.suppress(BlockingIOError):
                    self.heard += map(decode_from_relay, self.frames.feed(self.peer.recv(65536)))

    def say(self, *tables: Table) -> None:
        assert self.peer is not None
        self.peer.send(b"".join(map(frame, tables)))

    def hang_up(self) -> None:
        for one in (self.peer, self.listener):
            if one is not None:
                one.close()
        self.peer = self.listener = None

    def close(self) -> None:
        self.link.close()
        self.loop.turn(0)
        self.loop.shut_down()
        self.hang_up()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.close()


def taken(generation: int, revision: int) -> Taken:
    return Taken(generation=generation, revision=revision)


def test_newer_tables_are_taken_and_told_and_older_ones_left(rig: Rig) -> None:
    rig.listen()
    rig.link.open()
    rig.accept()
    rig.until(lambda: rig.heard == [HELLO], "it says hello")
    rig.say(table(3, 5))
    rig.until(lambda: rig.heard[1:] == [taken(3, 5)], "it has that one")
    rig.say(table(3, 6), table(3, 7))
    rig.until(lambda: rig.heard[2:] == [taken(3, 7)], "the newest is enough")
    rig.say(table(2, 9))
    rig.until(lambda: rig.heard[3:] == [taken(2, 9)], "a predecessor is told that it was heard")
    assert (rig.tables, rig.older) == ([(3, 7)], 1)
    rig.say(table(3, 6))
    rig.say(table(4, 1))
    rig.until(lambda: rig.heard[4:] == [taken(4, 1)], "a newer controller's")
    assert (rig.tables, rig.older) == ([(3, 7), (4, 1)], 1)


def test_it_connects_as_soon_as_there_is_a_controller_and_again_to_the_next(rig: Rig) -> None:
    rig.link.open()
    rig.loop.turn(0.01)
    rig.listen()
    rig.accept()
    rig.until(lambda: rig.heard == [HELLO], "it says hello")
    rig.link.draining()
    rig.until(lambda: rig.heard[1:] == [Draining()], "it drains")
    rig.hang_up()
    rig.link.failed("shop/main/a", "connection refused")  # nobody there: not kept
    rig.listen()
    rig.accept()
    rig.until(lambda: rig.heard == [HELLO, Draining()], "the next one hears it as well")
    rig.link.failed("shop/main/a", "connection refused")
    rig.until(lambda: rig.heard[2:] == [Failed(identity="shop/main/a", reason="connection refused")], "and failures")


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", b"\0\0\0\2{}", b"\0\0\0\1\xff"])
def test_garbage_ends_the_connection_and_changes_nothing(rig: Rig, garbage: bytes) -> None:
    rig.listen()
    rig.link.open()
    rig.accept()
    assert rig.peer is not None
    with rig.peer as first:
        first.send(garbage)
        rig.peer = None
        rig.accept()
    rig.until(lambda: rig.heard == [HELLO], "it connects again")
    assert rig.tables == []


def test_a_controller_that_reads_nothing_is_left(rig: Rig) -> None:
    rig.listen()
    rig.link.open()
    rig.accept()
    peer, rig.peer = rig.peer, None
    reason = "x" * 60_000
    for _ in range(60):
        rig.link.failed("shop/main/a", reason)
    rig.accept()
    rig.until(lambda: rig.heard == [HELLO], "it connects again")
    assert peer is not None
    peer.close()
