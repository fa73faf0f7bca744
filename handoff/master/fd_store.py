"""Fds that a worker leaves for the next one in its place: sd_notify(3), FDSTORE=1."""

from __future__ import annotations

import fcntl
import os
import select
import stat
from collections.abc import Container, Sequence
from typing import NamedTuple

MAXIMUM_STORED_FDS = 64
"""Of one place."""
Place = int | str
"""The slot of a worker, or the name of a companion."""


class _Stored(NamedTuple):
    name: str
    fd: int
    identity: tuple[int, ...] | None
    is_polled: bool


class FdStore:
    """Owns what it keeps, close-on-exec as it was received, until it is removed or has ended."""

    def __init__(self) -> None:
        self._places: dict[Place, list[_Stored]] = {}

    def __bool__(self) -> bool:
        return bool(self._places)

    def add(self, place: Place, name: str, fds: Sequence[int], is_polled: bool = True) -> int:
        """Takes ownership of the fds. Those that are there already are closed, and so are those for which there is no
        room, whose number is returned. `is_polled`: one whose other end is gone is not kept.
        """
        self._drop_ended(place)
        kept = self._places.pop(place, [])
        known = {one.identity for one in kept if one.identity is not None}
        refused = 0
        for fd in fds:
            identity = _identity(fd)
            has_room = len(kept) < MAXIMUM_STORED_FDS
            if identity in known or not has_room:
                os.close(fd)
                refused += identity not in known
                continue
            kept.append(_Stored(name, fd, identity, is_polled))
            if identity is not None:
                known.add(identity)
        self._put(place, kept)
        return refused

    def of(self, place: Place) -> list[tuple[str, int]]:
        """Names and fds, borrowed until the next call, in the order in which they came."""
        self._drop_ended(place)
        return [(one.name, one.fd) for one in self._places.get(place, ())]

    def remove(self, place: Place, name: str) -> None:
        """All of this name."""
        self._keep(place, [one for one in self._places.get(place, ()) if one.name != name])

    def keep_only(self, places: Container[Place]) -> None:
        for place in [place for place in self._places if place not in places]:
            self._keep(place, [])

    def close(self) -> None:
        self.keep_only(())

    def _drop_ended(self, place: Place) -> None:
        poll = select.poll()
        kept = self._places.get(place, [])
        for one in kept:
            if one.is_polled:
                poll.register(one.fd, 0)  # poll(2): errors and ends are told unasked
        ended = {fd for fd, _ in poll.poll(0)} if kept else set()
        if ended:
            self._keep(place, [one for one in kept if one.fd not in ended])

    def _keep(self, place: Place, kept: list[_Stored]) -> None:
        for one in self._places.pop(place, []):
            if one not in kept:
                os.close(one.fd)
        self._put(place, kept)

    def _put(self, place: Place, kept: list[_Stored]) -> None:
        if kept:
            self._places[place] = kept


def _identity(fd: int) -> tuple[int, ...] | None:
    """What two fds of the same thing have in common; None where that cannot be told.

    Two ends of a pipe have one inode, and all eventfds, timers and the like share a single one, without a file type.
    """
    status = os.fstat(fd)
    if not stat.S_IFMT(status.st_mode):
        return None
    access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    return status.st_dev, status.st_ino, status.st_rdev, access
