"""Handing connections over to siblings that have fewer, on an event loop, as long as the worker accepts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Protocol

from handoff.counters import CONNECTIONS, WorkerCounters
from handoff.worker.balance import shares
from handoff.worker.outbox import Outbox

BALANCE_SECONDS = 0.1


class Leaver(Protocol):
    """A connection that may be asked to move."""

    def begin_move(self, mailbox: int | None = None) -> None:
        """Move at the first quiet moment: to this receiver rather than to any."""

    def cancel_move(self) -> None:
        """Stay, if it has not left yet."""


class Rebalancing:
    """One worker's, of connections of one kind. Borrows the outbox and the counters."""

    def __init__(
        self, kind: str, outbox: Outbox, counters: WorkerCounters, row: int, candidates: Callable[[], Iterable[Leaver]]
    ) -> None:
        """`candidates`: who may move now, the first ones first. It is asked only where somebody has to."""
        self._kind, self._outbox, self._candidates = kind, outbox, candidates
        self._counters, self._row = counters, row
        self._offered: list[Leaver] = []
        """To siblings, lately."""
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(BALANCE_SECONDS, self._turn)

    def end(self) -> None:
        """What was offered stays offered: a drain is what comes next."""
        if self._timer is not None:
            self._timer.cancel()

    def _turn(self) -> None:
        self.begin()
        tried, self._offered = self._offered, []
        for connection in tried:
            connection.cancel_move()  # it had its time; another one may be quicker
        outbox = self._outbox
        if not outbox.takes(self._kind) or outbox.has_unread():
            return
        counts = {info.row: self._counters.read(info.row, CONNECTIONS) for info in outbox.receivers}
        counts[self._row] = self._counters.own[CONNECTIONS]
        plan = shares(counts, self._row)
        if not plan:  # as most of the time: there may be thousands of connections
            return
        mailboxes = {info.row: info.mailbox for info in outbox.receivers}
        had_their_time = set(map(id, tried))
        movable = iter(sorted(self._candidates(), key=lambda one: id(one) in had_their_time))
        for row, number in plan.items():
            for connection in islice(movable, number):
                self._offered.append(connection)
                connection.begin_move(mailboxes[row])
