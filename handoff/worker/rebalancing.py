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
PAUSE_SECONDS = 0.3
"""After everybody was asked, and stayed."""


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
        self._stayed: set[Leaver] = set()
        """They were asked since the plan was last empty."""
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, after_seconds: float = BALANCE_SECONDS) -> None:
        self._timer = asyncio.get_running_loop().call_later(after_seconds, self._turn)

    def end(self) -> None:
        """Nobody is asked any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._take_back()

    def _take_back(self) -> None:
        offered, self._offered = self._offered, []
        for connection in offered:
            connection.cancel_move()  # it had its time; another one may be quicker
        self._stayed.update(offered)

    def _turn(self) -> None:
        self.begin()
        self._take_back()
        plan = self._plan()
        if not plan:  # as most of the time: there may be thousands of connections
            self._stayed.clear()
            return
        candidates = list(self._candidates())
        self._stayed &= set(candidates)
        if candidates and len(self._stayed) == len(candidates):
            self.end()
            self._stayed.clear()
            self.begin(PAUSE_SECONDS)
            return
        mailboxes = {info.row: info.mailbox for info in self._outbox.receivers}
        movable = (one for one in candidates if one not in self._stayed)
        for row, number in plan.items():
            for connection in islice(movable, number):
                self._offered.append(connection)
                connection.begin_move(mailboxes[row])

    def _plan(self) -> dict[int, int]:
        """How many go to whom, by their rows."""
        outbox = self._outbox
        if not outbox.takes(self._kind) or outbox.has_unread():
            return {}
        counts = {info.row: self._counters.read(info.row, CONNECTIONS) for info in outbox.receivers}
        counts[self._row] = self._counters.own[CONNECTIONS]
        return shares(counts, self._row)
