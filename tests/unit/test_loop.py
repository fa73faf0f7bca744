"""The master's loop: a fixed order inside a turn, and files that come and go while it runs."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from handoff.master.loop import Loop, Order


@pytest.fixture
def loop() -> Iterator[Loop]:
    found = Loop()
    yield found
    found.close()


class Pipe:
    """A pipe whose reader is watched. Owns both ends."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def fileno(self) -> int:
        return self.reader

    def poke(self) -> None:
        os.write(self.writer, b"x")

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


@pytest.fixture
def pipes() -> Iterator[list[Pipe]]:
    found = [Pipe() for _ in range(4)]
    yield found
    for pipe in found:
        pipe.close()


def test_a_turn_looks_at_channels_then_exits_then_control_then_signals(loop: Loop, pipes: list[Pipe]) -> None:
    seen: list[Order] = []
    orders = [Order.SIGNAL, Order.CONTROL, Order.CHANNEL, Order.EXIT]
    for pipe, order in zip(pipes, orders, strict=True):
        loop.watch(pipe, order, lambda order=order: seen.append(order))  # type: ignore[misc]
        pipe.poke()
    loop.turn(0)
    assert seen == [Order.CHANNEL, Order.EXIT, Order.CONTROL, Order.SIGNAL]


def test_nothing_that_is_ready_is_nothing_called(loop: Loop, pipes: list[Pipe]) -> None:
    seen: list[int] = []
    loop.watch(pipes[0], Order.CHANNEL, lambda: seen.append(1))
    loop.turn(0)
    assert seen == []


def test_who_is_forgotten_during_a_turn_is_not_called_any_more(loop: Loop, pipes: list[Pipe]) -> None:
    seen: list[str] = []

    def first() -> None:
        seen.append("channel")
        loop.forget(pipes[1])

    loop.watch(pipes[0], Order.CHANNEL, first)
    loop.watch(pipes[1], Order.EXIT, lambda: seen.append("forgotten"))
    for pipe in pipes[:2]:
        pipe.poke()
    loop.turn(0)
    assert seen == ["channel"]


def test_an_fd_that_is_used_again_inside_a_turn_does_not_get_the_event_of_its_predecessor(loop: Loop) -> None:
    first, second = Pipe(), Pipe()
    seen: list[str] = []
    number = second.reader

    def swap() -> None:
        seen.append("swapped")
        loop.forget(second)
        os.close(second.reader)
        second.reader = os.dup2(first.reader, number)  # the same number, another file
        loop.watch(number, Order.EXIT, lambda: seen.append("successor"))

    loop.watch(first, Order.CHANNEL, swap)
    loop.watch(second, Order.EXIT, lambda: seen.append("predecessor"))
    first.poke()
    second.poke()
    loop.turn(0)
    assert seen == ["swapped"]
    loop.forget(first)
    loop.turn(0)
    assert seen == ["swapped", "successor"], "its own event comes in the next turn"
    first.close()
    second.close()


def test_who_joins_during_a_turn_is_called_in_the_next(loop: Loop, pipes: list[Pipe]) -> None:
    seen: list[str] = []
    pipes[1].poke()
    loop.watch(
        pipes[0], Order.CHANNEL, lambda: loop.watch(pipes[1], Order.EXIT, lambda: seen.append("joined"), writable=False)
    )
    pipes[0].poke()
    loop.turn(0)
    assert seen == []
    loop.forget(pipes[0])
    loop.turn(0)
    assert seen == ["joined"]


def test_a_watch_replaces_the_one_before(loop: Loop, pipes: list[Pipe]) -> None:
    seen: list[str] = []
    loop.watch(pipes[0], Order.CHANNEL, lambda: seen.append("old"))
    loop.watch(pipes[0].reader, Order.CHANNEL, lambda: seen.append("new"))
    pipes[0].poke()
    loop.turn(0)
    assert seen == ["new"]


def test_writable_is_told_only_to_who_asks(loop: Loop) -> None:
    ours, theirs = socket.socketpair()
    seen: list[str] = []
    with ours, theirs:
        loop.watch(ours, Order.CONTROL, lambda: seen.append("called"))
        loop.turn(0)
        assert seen == []
        loop.watch(ours, Order.CONTROL, lambda: seen.append("called"), writable=True)
        loop.turn(0)
        assert seen == ["called"]
        loop.forget(ours)


def test_forgetting_what_is_not_watched_is_a_bug_of_the_caller(loop: Loop, pipes: list[Pipe]) -> None:
    with pytest.raises(KeyError):
        loop.forget(pipes[0])
