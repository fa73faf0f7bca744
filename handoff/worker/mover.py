"""Handing live connections over to other workers' mailboxes."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from handoff.core.messages import Receivers
from handoff.counters import MOVED, REFUSED, WAITING
from handoff.mailbox import MAXIMUM_INLINE_BYTES, MAXIMUM_LETTERS, Connection
from handoff.worker.outbox import Outbox, Put

RETRY_SECONDS = 0.02
"""Where nothing wakes us: too many fds under way, or nobody who takes it."""


class Movable(Protocol):
    """One connection."""

    kind: str

    def letter(self) -> Connection | None:
        """What moves, fds borrowed; None when it is not quiet any more, or gone. May be asked again."""

    def waits(self) -> None:
        """There is no room for it yet, and `letter` will be asked for again, unless it stays by now."""

    def moved(self) -> None:
        """It belongs to somebody else now: close our copy, send nothing."""

    def refused(self) -> None:
        """It cannot move: let it end here."""


@dataclass(slots=True)
class _Queue:
    """Of one kind: one that nobody takes must not keep the others. Each with the receiver that it is meant for."""

    posted: deque[tuple[Movable, int | None]] = field(default_factory=deque)
    room: asyncio.Event = field(default_factory=asyncio.Event)
    """Not set: everybody in it waits for room, and was told so."""


class Mover:
    """One worker's, on its event loop."""

    def __init__(self, counters: memoryview) -> None:
        self._counters = counters
        self.outbox = Outbox()
        self._queues: dict[str, _Queue] = {}
        self._is_flush_due = False
        self._watched: list[socket.socket] = []
        self._timer: asyncio.TimerHandle | None = None

    def update(self, message: Receivers, fds: list[int]) -> None:
        """Take the master's list. Owns the fds: the writing ends of the mailboxes that are new."""
        self._unwatch()
        self.outbox.update(message, fds)
        self._flush()

    def post(self, connection: Movable, mailbox: int | None = None) -> None:
        """Hand over a quiet connection in the next turn of the loop, with what is posted in this one: several in one
        datagram take a fifth less of both workers' time. To the receiver `mailbox`, if it is there and has room."""
        queue = self._queue(connection.kind)
        queue.posted.append((connection, mailbox))
        if not queue.room.is_set():
            connection.waits()
            self._count()
        elif not self._is_flush_due:
            self._is_flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def room(self, kind: str) -> asyncio.Event:
        """Set while nobody of this kind waits for room: more may be posted. Who waits is not read from, and its client
        waits as well."""
        return self._queue(kind).room

    def _queue(self, kind: str) -> _Queue:
        queue = self._queues.get(kind)
        if queue is None:
            queue = self._queues[kind] = _Queue()
            queue.room.set()
        return queue

    def count_refused(self) -> None:
        """One that could not move, and could not go on here either."""
        self._counters[REFUSED] += 1

    def _flush(self) -> None:
        self._is_flush_due = False
        self._unwatch()
        for kind, queue in list(self._queues.items()):
            self._send_all(kind, queue)
        self._count()

    def _count(self) -> None:
        self._counters[WAITING] = sum(len(queue.posted) for queue in self._queues.values() if not queue.room.is_set())

    def _send_all(self, kind: str, queue: _Queue) -> None:
        """As far as there is room; `_flush` is called again for the rest. After one that was refused all go alone."""
        # Several datagrams for each receiver, so that a few connections are shared evenly, too.
        limit = min(MAXIMUM_LETTERS, max(1, len(queue.posted) // max(1, 2 * self.outbox.count_takers(kind))))
        while queue.posted:
            mailbox = queue.posted[0][1]
            batch = self._take_batch(queue.posted, limit)
            put = self._put(kind, [letter for _, letter in batch], mailbox) if batch else Put.SENT
            if put is Put.SENT:
                self._counters[MOVED] += len(batch)
                for connection, _ in batch:
                    connection.moved()
            elif put is Put.REFUSED and len(batch) == 1:
                self._refuse(batch[0][0])
            else:
                queue.posted.extendleft((connection, mailbox) for connection, _ in reversed(batch))
                if put is not Put.REFUSED:
                    self._wait(kind, queue, put)
                    return
                limit = 1
        queue.room.set()

    def _take_batch(self, posted: deque[tuple[Movable, int | None]], limit: int) -> list[tuple[Movable, Connection]]:
        """Those at the front that go in one datagram, with their letters; none where they are gone, or cannot move."""
        batch: list[tuple[Movable, Connection]] = []
        seen: set[Movable] = set()  # one that was posted, taken back and posted again is there twice
        size, mailbox = 0, posted[0][1]
        while posted and len(batch) < limit and posted[0][1] == mailbox:
            connection = posted[0][0]
            try:
                letter = connection.letter()
            except Exception:
                logging.getLogger("uvicorn.error").exception("a connection could not be handed over")
                posted.popleft()
                self._refuse(connection)
                continue
            if letter is not None and connection not in seen:
                size += len(letter[1])
                if batch and size > MAXIMUM_INLINE_BYTES:
                    break
                seen.add(connection)
                batch.append((connection, letter))
            posted.popleft()
        return batch

    def _put(self, kind: str, connections: list[Connection], mailbox: int | None) -> Put:
        try:
            return self.outbox.put(kind, connections, mailbox)
        except Exception:
            logging.getLogger("uvicorn.error").exception("connections could not be handed over")
            return Put.REFUSED

    def _refuse(self, connection: Movable) -> None:
        self._counters[REFUSED] += 1
        connection.refused()

    # --- waiting for room -------------------------------------------------------------------------------------------

    def _wait(self, kind: str, queue: _Queue, put: Put) -> None:
        if put is Put.FULL:
            self._watch(self.outbox.writers(kind))
        else:
            self._retry_later()
        if queue.room.is_set():
            queue.room.clear()
            for connection, _ in queue.posted:
                connection.waits()

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
