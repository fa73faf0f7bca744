"""Handing live connections over to other workers' mailboxes."""

from __future__ import annotations

import asyncio
import logging
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
        self._waiting: dict[str, deque[Movable]] = {}
        """By kind: one that nobody takes must not keep the others."""
        self.room = asyncio.Event()
        """Nobody waits for room: more may be posted. Who waits is not read from, and its client waits as well."""
        self.room.set()
        self._watched: list[socket.socket] = []
        self._timer: asyncio.TimerHandle | None = None

    def update(self, message: Receivers, fds: list[int]) -> None:
        """Take the master's list. Owns the fds: the writing ends of the mailboxes that are new."""
        self._unwatch()
        self.outbox.update(message, fds)
        self._flush()

    def post(self, connection: Movable, mailbox: int | None = None) -> bool:
        """Hand over a quiet connection, to the receiver `mailbox` if it is there. False: it waits for room."""
        queue = self._waiting.setdefault(connection.kind, deque())
        if not queue and self._send(connection, mailbox):
            return True
        queue.append(connection)
        self._count()
        return False

    def count_refused(self) -> None:
        """One that could not move, and could not go on here either."""
        self._counters[REFUSED] += 1

    def _flush(self) -> None:
        self._unwatch()
        for queue in list(self._waiting.values()):
            self._send_all(queue, None)
        self._count()

    def _count(self) -> None:
        self._counters[WAITING] = waiting = sum(map(len, self._waiting.values()))
        if waiting:
            self.room.clear()
        else:
            self.room.set()

    def _send_all(self, queue: deque[Movable], mailbox: int | None) -> None:
        while queue and self._send(queue[0], mailbox):
            queue.popleft()

    def _send(self, connection: Movable, mailbox: int | None) -> bool:
        """False: there is no room now, and `_flush` will be called again."""
        try:
            letter = connection.letter()
            if letter is None:
                return True
            put = self.outbox.put(connection.kind, letter, mailbox)
        except Exception:
            logging.getLogger("uvicorn.error").exception("a connection could not be handed over")
            put = Put.REFUSED
        match put:
            case Put.SENT:
                self._counters[MOVED] += 1
                connection.moved()
            case Put.REFUSED:
                self._counters[REFUSED] += 1
                connection.refused()
            case Put.FULL:
                self._watch(self.outbox.writers(connection.kind))
                return False
            case Put.LATER:
                self._retry_later()
                return False
        return True

    # --- waiting for room -------------------------------------------------------------------------------------------

    def _watch(self, writers: list[socket.socket]) -> None:
        loop = asyncio.get_running_loop()
        for writer in writers:
            if writer not in self._watched:
                self._watched.append(writer)
                loop.add_writer(writer.fileno(), self._flush)

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
