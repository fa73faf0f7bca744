"""The mailboxes of all slots: who may write to which, and what becomes of letters that no worker reads."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from handoff.core.messages import ReceiverInfo, Receivers
from handoff.core.receivers import Slot, accepting, kept_slots, read_slots, receivers
from handoff.core.supervisor import Supervisor
from handoff.mailbox import Unreadable, count_letters, mailbox_pair, put_unread, take_unread
from handoff.master.crew import Crew
from handoff.master.log import MasterLog
from handoff.master.loop import Loop, Order
from handoff.rights import has_headroom

RETRY_SECONDS = 0.05
"""After a full mailbox or channel, or too many fds under way, of which nothing tells when that is over."""
LETTERS_PER_TURN = 16


@dataclass(slots=True)
class _Mailbox:
    """Owns both ends, and the letters taken that have nowhere to go yet."""

    number: int
    slot: Slot
    writer: socket.socket
    reader: socket.socket
    held: tuple[bytes, list[int]] | None = None
    is_retired: bool = False
    is_watched: bool = False


@dataclass(slots=True)
class _Told:
    """What one worker was told: the mailboxes whose writing end it has, and the last list."""

    known: set[int] = field(default_factory=set)
    last: tuple[ReceiverInfo, ...] = ()


class Mailboxes:
    """One service's. Borrows what it is given; owns the mailboxes."""

    def __init__(self, supervisor: Supervisor, crew: Crew, loop: Loop, log: MasterLog) -> None:
        self._supervisor = supervisor
        self._crew = crew
        self._loop = loop
        self._log = log
        self._mailboxes: dict[Slot, _Mailbox] = {}
        self._retired: list[_Mailbox] = []
        self._told: dict[int, _Told] = {}
        self._next_number = 1
        self._next_target = 0
        self._retry_at: float | None = None
        self._facts: tuple[object, ...] = ()
        """What the last round was made for; most turns of the loop change nothing here."""

    def reader_fd(self, slot: Slot) -> int:
        """The reading end for a worker that is to be started in this slot; it stays ours. Raises OSError."""
        if slot not in self._mailboxes:
            writer, reader = mailbox_pair()
            self._mailboxes[slot] = _Mailbox(self._next_number, slot, writer, reader)
            self._next_number += 1
        return self._mailboxes[slot].reader.fileno()

    def next_deadline(self) -> float | None:
        return self._retry_at

    def check(self, now: float) -> None:
        """Bring everybody up to date with the supervisor's facts; called after every turn."""
        fleet = self._supervisor.fleet
        facts = (
            self._supervisor.live,
            self._supervisor.is_stopping,
            *((w.worker, w.state) for w in fleet.workers.values()),
        )
        is_due = self._retry_at is not None and self._retry_at <= now
        if facts == self._facts and not is_due:
            return
        self._facts = facts
        if is_due:
            self._retry_at = None
            for mailbox in (*self._mailboxes.values(), *self._retired):
                self._forward(mailbox)
        self._tell(receivers(fleet, self._supervisor.live, self._supervisor.is_stopping))
        if self._supervisor.is_stopping:  # nobody is sent anything any more: readers see the end when all have heard it
            for mailbox in self._mailboxes.values():
                mailbox.writer.close()
        self._retire()
        self._watch_unread()

    # --- telling who may send to whom -------------------------------------------------------------------------------

    def _tell(self, wanted: Mapping[int, tuple[int, ...]]) -> None:
        for worker in [worker for worker in self._told if self._crew.get(worker) is None]:
            del self._told[worker]
        for worker in {*wanted, *self._told}:
            told = self._told.get(worker)
            if told is None:
                told = self._told[worker] = _Told()
            infos = tuple(self._infos(wanted.get(worker, ()), told))
            if tuple(_as_known(info) for info in infos) == told.last:
                continue
            fds = [self._by_number(info.mailbox).writer.fileno() for info in infos if info.is_new]
            if self._crew.pass_on(worker, Receivers(receivers=infos, fds=len(fds)), fds):
                told.known = {info.mailbox for info in infos}
                told.last = tuple(_as_known(info) for info in infos)
            else:
                self._retry_soon()

    def _infos(self, workers: tuple[int, ...], told: _Told) -> list[ReceiverInfo]:
        found = []
        for number in workers:
            process = self._crew.get(number)
            record = self._supervisor.fleet.workers[number]
            mailbox = self._mailboxes.get((record.generation, record.slot))
            if process is not None and mailbox is not None and process.adopts:
                is_new = mailbox.number not in told.known
                row = process.boot.counters_row
                found.append(ReceiverInfo(mailbox=mailbox.number, row=row, adopts=process.adopts, is_new=is_new))
        return found

    def _by_number(self, number: int) -> _Mailbox:
        return next(mailbox for mailbox in self._mailboxes.values() if mailbox.number == number)

    # --- letters that no worker reads -------------------------------------------------------------------------------

    def _retire(self) -> None:
        """A mailbox that will have no reader any more: it ends when its last writer has gone."""
        kept = kept_slots(self._supervisor.fleet, self._supervisor.live)
        for slot in [slot for slot in self._mailboxes if slot not in kept]:
            mailbox = self._mailboxes.pop(slot)
            mailbox.writer.close()
            mailbox.is_retired = True
            self._retired.append(mailbox)

    def _watch_unread(self) -> None:
        """We read where nobody else does, as long as there is somebody to give it to."""
        has_targets = bool(self._targets())
        read = read_slots(self._supervisor.fleet)
        for mailbox in [*self._mailboxes.values(), *self._retired]:
            is_unread = mailbox.is_retired or mailbox.slot not in read
            wants = is_unread and has_targets and mailbox.held is None
            if wants and not mailbox.is_watched:
                self._loop.watch(
                    mailbox.reader,
                    Order.CONTROL,
                    partial(self._forward, mailbox),
                    on_failure=partial(self._failed, mailbox),
                )
                mailbox.is_watched = True
            elif not wants:
                self._unwatch(mailbox)

    def _failed(self, mailbox: _Mailbox, error: Exception) -> None:
        self._log.failure(f"the mailbox of slot {mailbox.slot}", error)
        self._unwatch(mailbox)
        self._retry_soon()

    def _unwatch(self, mailbox: _Mailbox) -> None:
        if mailbox.is_watched:
            self._loop.forget(mailbox.reader)
            mailbox.is_watched = False

    def _targets(self) -> list[_Mailbox]:
        takers = accepting(self._supervisor.fleet, self._supervisor.live, self._supervisor.is_stopping)
        return [self._mailboxes[slot] for one in takers if (slot := (one.generation, one.slot)) in self._mailboxes]

    def _forward(self, mailbox: _Mailbox) -> None:
        is_read = not mailbox.is_retired and mailbox.slot in read_slots(self._supervisor.fleet)
        targets = [target for target in self._targets() if target is not mailbox or is_read]
        for _ in range(LETTERS_PER_TURN):
            if mailbox.held is None and not self._take(mailbox):
                return
            if mailbox.held is not None and not self._put(mailbox.held, targets):
                self._unwatch(mailbox)
                self._retry_soon()
                return
            mailbox.held = None

    def _take(self, mailbox: _Mailbox) -> bool:
        if not mailbox.is_watched:
            return False
        if not has_headroom(mailbox.reader.fileno()):
            self._unwatch(mailbox)
            self._retry_soon()
            return False
        try:
            mailbox.held = take_unread(mailbox.reader)
        except BlockingIOError:
            return False
        except EOFError:
            self._close(mailbox)
            return False
        except Unreadable as error:  # it would stay in the way
            self._log.warning("a datagram in a mailbox was dropped", reason=str(error))
            return False
        return True

    def _put(self, letter: tuple[bytes, list[int]], targets: list[_Mailbox]) -> bool:
        data, fds = letter
        for _ in targets:
            self._next_target += 1
            target = targets[self._next_target % len(targets)]
            try:
                put_unread(target.writer, data, fds)
            except OSError as error:
                if error.errno == errno.ETOOMANYREFS:
                    return False
                continue
            for fd in fds:
                os.close(fd)
            return True
        return False

    def _retry_soon(self) -> None:
        self._retry_at = time.monotonic() + RETRY_SECONDS

    # --- the end ----------------------------------------------------------------------------------------------------

    def _close(self, mailbox: _Mailbox) -> None:
        self._unwatch(mailbox)
        mailbox.reader.close()
        mailbox.writer.close()
        if mailbox in self._retired:
            self._retired.remove(mailbox)
        elif self._mailboxes.get(mailbox.slot) is mailbox:
            del self._mailboxes[mailbox.slot]

    def close(self) -> None:
        """The service has ended: what still lies in mailboxes has nobody to go to. It is closed, and counted."""
        lost = 0
        for mailbox in [*self._mailboxes.values(), *self._retired]:
            if mailbox.held is not None:
                lost += count_letters(mailbox.held[0])
                for fd in mailbox.held[1]:
                    os.close(fd)
            lost += _drop_unread(mailbox.reader)
            self._close(mailbox)
        self._mailboxes.clear()
        if lost:
            self._log.warning("connections that waited to be taken over were closed", count=lost)


def _drop_unread(reader: socket.socket) -> int:
    """Close what was sent with the datagrams that are there; how many connections it was."""
    count = 0
    while True:
        try:
            datagram, fds = take_unread(reader)
        except (BlockingIOError, EOFError):
            return count
        except Unreadable:
            continue
        count += count_letters(datagram)
        for fd in fds:
            os.close(fd)


def _as_known(info: ReceiverInfo) -> ReceiverInfo:
    return ReceiverInfo(mailbox=info.mailbox, row=info.row, adopts=info.adopts, is_new=False)
