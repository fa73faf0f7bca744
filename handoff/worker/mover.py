"""Handing live connections over to other workers' mailboxes."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from handoff.core.messages import Receivers
from handoff.core.moves import AnyState
from handoff.counters import MOVED, REFUSED, WAITING
from handoff.worker.outbox import Outbox, Put

RETRY_SECONDS = 0.02
"""Where nothing wakes us: too many fds under way, or nobody who takes it."""


class Movable(Protocol):
    """One connection."""

    kind: str

    def letter(self) -> tuple[AnyState, bytes, Sequence[int]] | None:
        """What moves, fds borrowed; None when it is not quiet any more, or gone."""

    def moved(self) -> None:
        """It belongs to somebody else now: close our copy, send nothing."""

    def refused(self) -> None:
        """It cannot move: let it end here."""


class Mover:
    """One worker's, on its event loop."""

    def __init__(self, counters: memoryview) -> None:
        self._counters = counters
        self.outbox = Outbox()
        self._waiting: deque[Movable] = deque()
        self._watched: list[socket.socket] = []
        self._timer: asyncio.TimerHandle | None = None

    def update(self, message: Receivers, fds: list[int]) -> None:
        """Take the master's list. Owns the fds: the writing ends of the mailboxes that are new."""
        self._unwatch()
        self.outbox.update(message, fds)
        self._flush()

    def post(self, connection: Movable, mailbox: int | None = None) -> None:
        """Hand over a quiet connection: now, or when there is room. `mailbox`: to this receiver, if it is there."""
        self._waiting.append(connection)
        self._counters[WAITING] = len(self._waiting)
        if len(self._waiting) == 1:
            self._flush(mailbox)

    def _flush(self, mailbox: int | None = None) -> None:
        while self._waiting:
            connection = self._waiting[0]
            letter = connection.letter()
            if letter is not None and not self._send(connection, letter, mailbox):
                break
            self._waiting.popleft()
        self._counters[WAITING] = len(self._waiting)

    def _send(self, connection: Movable, letter: tuple[AnyState, bytes, Sequence[int]], mailbox: int | None) -> bool:
        """False: there is no room now, and `_flush` will be called again."""
        match self.outbox.put(connection.kind, letter, mailbox):
            case Put.SENT:
                self._counters[MOVED] += 1
                connection.moved()
                return True
            case Put.REFUSED:
                self._counters[REFUSED] += 1
                connection.refused()
                return True
            case Put.FULL:
                self._watch(self.outbox.writers(connection.kind))
            case Put.LATER:
                self._retry_later()
        return False

    # --- waiting for room -------------------------------------------------------------------------------------------

    def _watch(self, writers: list[socket.socket]) -> None:
        loop = asyncio.get_running_loop()
        self._watched = writers
        for writer in writers:
            loop.add_writer(writer.fileno(), self._has_room)

    def _has_room(self) -> None:
        self._unwatch()
        self._flush()

    def _unwatch(self) -> None:
        loop = asyncio.get_running_loop()
        for writer in self._watched:
            loop.remove_writer(writer.fileno())
        self._watched = []

    def _retry_later(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(RETRY_SECONDS, self._retry)

    def _retry(self) -> None:
        self._timer = None
        self._flush()
