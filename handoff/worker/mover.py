"""Handing live connections over to other workers' mailboxes."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from handoff.core.messages import ReceiverInfo, Receivers
from handoff.core.moves import AnyState
from handoff.counters import MOVED, REFUSED, WAITING
from handoff.mailbox import TooLarge, send_letter, unread_bytes

RETRY_SECONDS = 0.02
"""After ETOOMANYREFS, which nothing wakes us from: polling says that there is room."""


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
    """One worker's. Runs on its event loop; owns the writing ends of the receivers' mailboxes."""

    def __init__(self, counters: memoryview) -> None:
        self._counters = counters
        self._writers: dict[int, socket.socket] = {}
        self.receivers: tuple[ReceiverInfo, ...] = ()
        self._next = os.getpid()  # several senders should not all begin with the same receiver
        self._waiting: deque[Movable] = deque()
        self._watched: list[socket.socket] = []
        self._timer: asyncio.TimerHandle | None = None

    def update(self, message: Receivers, fds: list[int]) -> None:
        """Take the master's list. Owns the fds: the writing ends of the mailboxes that are new."""
        fresh = iter(fds)
        for info in message.receivers:
            if info.is_new:
                self._writers[info.mailbox] = socket.socket(fileno=next(fresh))
                self._writers[info.mailbox].setblocking(False)
        self.receivers = message.receivers
        self._unwatch()
        kept = {info.mailbox for info in message.receivers}
        for mailbox in [mailbox for mailbox in self._writers if mailbox not in kept]:
            self._writers.pop(mailbox).close()
        self._flush()

    def takes(self, kind: str) -> bool:
        """Somebody adopts connections of this kind."""
        return any(kind in info.adopts for info in self.receivers)

    def has_unread(self) -> bool:
        """Letters lie in a mailbox: its owner's count of connections does not tell what it will have."""
        return any(unread_bytes(self._writers[info.mailbox]) for info in self.receivers)

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
        targets = [info for info in self.receivers if connection.kind in info.adopts]
        if not targets:
            return False  # the next list of receivers brings some, or the drain's deadline ends it
        chosen = [info for info in targets if info.mailbox == mailbox]
        self._next += 1
        first = self._next % len(targets)
        for info in (*chosen, *targets[first:], *targets[:first]):
            try:
                send_letter(self._writers[info.mailbox], *letter)
            except TooLarge:
                self._counters[REFUSED] += 1
                connection.refused()
                return True
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno == errno.ETOOMANYREFS:
                    self._retry_later()
                    return False
                continue
            self._counters[MOVED] += 1
            connection.moved()
            return True
        self._watch([self._writers[info.mailbox] for info in targets])
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
