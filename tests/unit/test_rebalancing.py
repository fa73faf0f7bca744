"""Who is asked to go to a sibling, and when."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any, cast

from handoff.core.messages import ReceiverInfo
from handoff.core.moves import RAW
from handoff.counters import CONNECTIONS, CounterPage, WorkerCounters
from handoff.worker.outbox import Outbox
from handoff.worker.rebalancing import Rebalancing


class Sibling:
    """An outbox with one receiver."""

    def __init__(self, row: int) -> None:
        self.receivers = (ReceiverInfo(mailbox=7, row=row, adopts=(RAW,), is_new=False),)
        self.is_behind = False

    def takes(self, kind: str) -> bool:
        return kind == RAW

    def has_unread(self) -> bool:
        return self.is_behind


class Connection:
    """Leaves at once, or never."""

    def __init__(self, rig: Rig, leaves: bool) -> None:
        self.rig, self.leaves = rig, leaves
        self.asked = self.cancelled = 0

    def begin_move(self, mailbox: int | None = None) -> None:
        assert mailbox == 7
        self.asked += 1
        if self.leaves:
            self.rig.connections.remove(self)
            self.rig.count(-1)

    def cancel_move(self) -> None:
        self.cancelled += 1


class Rig:
    def __init__(self) -> None:
        page = CounterPage()
        self.rows = page.take_row(), page.take_row()
        fds = os.dup(page.fd), os.dup(page.fd)
        os.close(page.fd)
        self.own, self.other = (WorkerCounters(fd, row) for fd, row in zip(fds, self.rows, strict=True))
        self.sibling = Sibling(self.rows[1])
        self.connections: list[Connection] = []
        outbox = cast("Outbox", self.sibling)
        self.rebalancing = Rebalancing(RAW, outbox, self.own, self.rows[0], lambda: self.connections)

    def count(self, change: int) -> None:
        self.own.own[CONNECTIONS] += change
        self.other.own[CONNECTIONS] -= change

    def add(self, number: int, leaves: bool) -> list[Connection]:
        added = [Connection(self, leaves) for _ in range(number)]
        self.connections += added
        self.own.own[CONNECTIONS] += number
        return added

    def turn(self) -> None:
        self.rebalancing._turn()


def run(test: Callable[[Rig], Any]) -> None:
    async def within() -> None:
        rig = Rig()
        test(rig)
        rig.rebalancing.end()

    asyncio.run(within())


def test_so_many_go_that_both_have_as_many() -> None:
    def test(rig: Rig) -> None:
        rig.add(10, leaves=True)
        rig.turn()
        assert (rig.own.own[CONNECTIONS], rig.other.own[CONNECTIONS]) == (5, 5)
        rig.turn()
        assert len(rig.connections) == 5

    run(test)


def test_nobody_is_asked_while_a_sibling_has_not_read_what_it_got() -> None:
    def test(rig: Rig) -> None:
        connections = rig.add(10, leaves=True)
        rig.sibling.is_behind = True
        rig.turn()
        assert not any(one.asked for one in connections)

    run(test)


def test_behind_those_that_never_leave_others_get_their_turn() -> None:
    def test(rig: Rig) -> None:
        staying = rig.add(10, leaves=False)
        rig.add(4, leaves=True)
        for _ in range(3):  # 7 are asked, then 3 of these 10 and 4 others, then nobody is left for a while
            rig.turn()
        assert len(rig.connections) == 10
        assert all(one.asked == one.cancelled == 1 for one in staying)

    run(test)


def test_when_all_have_stayed_they_are_asked_again() -> None:
    def test(rig: Rig) -> None:
        staying = rig.add(2, leaves=False)
        for _ in range(4):  # one, the other, a pause, and the first again
            rig.turn()
        assert sorted(one.asked for one in staying) == [1, 2]

    run(test)


def test_at_the_end_what_was_offered_is_taken_back() -> None:
    def test(rig: Rig) -> None:
        (first, _) = rig.add(2, leaves=False)
        rig.turn()
        rig.rebalancing.end()
        assert (first.asked, first.cancelled) == (1, 1)

    run(test)
