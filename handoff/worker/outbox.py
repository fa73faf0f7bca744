"""The writing ends of other workers' mailboxes: putting letters into one of them. Never waits."""

from __future__ import annotations

import enum
import errno
import os
import socket
from collections.abc import Sequence

from handoff.core.messages import ReceiverInfo, Receivers
from handoff.mailbox import Connection, TooLarge, send_letters, unread_bytes


class Put(enum.Enum):
    """What became of the letters."""

    SENT = "sent"
    FULL = "full"
    """Every mailbox is full; each becomes writable when there is room."""
    LATER = "later"
    """Nobody takes it now, or too many fds are under way (ETOOMANYREFS), of which polling tells nothing."""
    REFUSED = "refused"
    """It does not fit a letter; of several, each may."""


class Outbox:
    """One worker's. Owns the writing ends."""

    def __init__(self) -> None:
        self._writers: dict[int, socket.socket] = {}
        self.receivers: tuple[ReceiverInfo, ...] = ()
        self._takers: dict[str, tuple[ReceiverInfo, ...]] = {}
        """By kind."""
        self._next = os.getpid()  # several senders should not all begin with the same receiver

    def update(self, message: Receivers, fds: list[int]) -> None:
        """Take the master's list. Owns the fds: the writing ends of the mailboxes that are new."""
        fresh = iter(fds)
        for info in message.receivers:
            if info.is_new:
                self._writers[info.mailbox] = socket.socket(fileno=next(fresh))
                self._writers[info.mailbox].setblocking(False)
        self.receivers = tuple(info for info in message.receivers if info.mailbox in self._writers)
        kinds = {kind for info in self.receivers for kind in info.adopts}
        self._takers = {kind: tuple(info for info in self.receivers if kind in info.adopts) for kind in kinds}
        kept = {info.mailbox for info in message.receivers}
        for mailbox in [mailbox for mailbox in self._writers if mailbox not in kept]:
            self._writers.pop(mailbox).close()

    def takes(self, kind: str) -> bool:
        """Somebody adopts connections of this kind."""
        return kind in self._takers

    def count_takers(self, kind: str) -> int:
        return len(self._takers.get(kind, ()))

    def has_unread(self) -> bool:
        """Letters lie in a mailbox: its owner's count of connections does not tell what it will have."""
        return any(unread_bytes(self._writers[info.mailbox]) for info in self.receivers)

    def writers(self, kind: str) -> list[socket.socket]:
        """Of those that adopt this kind; borrowed."""
        return [self._writers[info.mailbox] for info in self._takers.get(kind, ())]

    def put(self, kind: str, connections: Sequence[Connection], mailbox: int | None = None) -> Put:
        """Send them, all or none, to one receiver: to `mailbox` if it has room, else to the others in turn."""
        targets = self._takers.get(kind, ())
        self._next += 1
        first = self._next % len(targets) if targets else 0
        targets = targets[first:] + targets[:first]
        if mailbox is not None:
            targets = tuple(sorted(targets, key=lambda info: info.mailbox != mailbox))
        result = Put.LATER
        for info in targets:
            try:
                send_letters(self._writers[info.mailbox], connections)
            except TooLarge:
                return Put.REFUSED
            except BlockingIOError:
                result = Put.FULL
            except OSError as error:
                if error.errno == errno.ETOOMANYREFS:
                    return Put.LATER
                if error.errno == errno.EMSGSIZE:  # net.core.wmem_max is less than a queue of ours
                    return Put.REFUSED
            else:
                return Put.SENT
        return result
