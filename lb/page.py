"""The page of connections: how many each relay worker has to each backend, in a file that all of them map.

A row belongs to one process and is written by it alone; everybody reads all rows, so that `leastconn` and `maxconn`
hold for the whole balancer. A column belongs to a backend, by its identity. Rows and columns are given out under a lock
on the file. What a dead process counted as present goes when its row is taken again or swept; what only grows is added
to row 0, which is nobody's.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
from collections.abc import Collection, Iterator
from pathlib import Path

CURRENT = 0
"""Connections now, those that are being made included."""
TOTAL = 1
"""Connections made since the start."""
FAILED = 2
"""Attempts to connect that failed."""
RESET = 3
"""Connections that ended by a reset, or a limit."""
SENT_BYTES = 4
"""From clients to the backend."""
RECEIVED_BYTES = 5
CONNECT_NANOSECONDS = 6
"""The sum over all connections that were made."""
FIELDS = 8
"""One cache line: two writers never share one."""

ROWS = 256
COLUMNS = 4096
_VERSION = 1
_HEAD_CELLS = COLUMNS + 2 * ROWS + 8
"""The version; the keys of the columns; pid and start time of each row's owner."""
_ROWS_CHANGED = 1
"""Grows when a row is given out or swept."""
_KEYS = 8
_OWNERS = _KEYS + COLUMNS
_ROW_CELLS = COLUMNS * FIELDS
_BYTES = (_HEAD_CELLS + ROWS * _ROW_CELLS) * 8


class PageFull(Exception):
    """There is no row, or no column, left."""


class Page:
    """Owns its mapping and its file descriptor until `close`."""

    def __init__(self, path: Path) -> None:
        """Opens the page, or makes it (sparse, 0600). Raises OSError."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if os.fstat(self._fd).st_size < _BYTES:
                os.ftruncate(self._fd, _BYTES)
            self._map = mmap.mmap(self._fd, _BYTES)
        except BaseException:
            os.close(self._fd)
            raise
        self._cells = memoryview(self._map).cast("Q")
        self._cells[0] = _VERSION
        self._given: dict[int, memoryview] = {}
        self._rows: tuple[int, ...] = ()
        self._rows_known = -1
        self.row: int | None = None
        """The row that we own, and write."""

    def close(self) -> None:
        """The row, if we have one, is given back, and no `cells` are good any more."""
        for cells in self._given.values():
            cells.release()
        if self.row is not None:
            with self._locked():
                self._sweep_row(self.row)
        self._cells.release()
        self._map.close()
        os.close(self._fd)

    # --- giving out -------------------------------------------------------------------------------------------------

    def take_row(self) -> int:
        """A row of our own; one whose owner is dead is swept and taken. Raises PageFull."""
        with self._locked():
            for row in range(1, ROWS):
                if not self._is_alive(row):
                    self._sweep_row(row)
                    self._cells[_OWNERS + 2 * row + 1] = _start_time(os.getpid()) or 0
                    self._cells[_OWNERS + 2 * row] = os.getpid()
                    self._cells[_ROWS_CHANGED] += 1
                    self.row = row
                    return row
        raise PageFull(f"{ROWS} relay workers")

    def sweep(self) -> int:
        """Rows of dead processes count no more. Returns how many there were."""
        with self._locked():
            dead = [row for row in range(1, ROWS) if self._cells[_OWNERS + 2 * row] and not self._is_alive(row)]
            for row in dead:
                self._sweep_row(row)
        return len(dead)

    def column(self, identity: str) -> int:
        """The backend's column, given out now if it has none. Raises PageFull."""
        key = _key(identity)
        with self._locked():
            free = None
            for column in range(COLUMNS):
                found = self._cells[_KEYS + column]
                if found == key:
                    return column
                if found == 0:
                    free = column if free is None else free
            if free is None:
                raise PageFull(f"{COLUMNS} backends")
            self._cells[_KEYS + free] = key
            return free

    def keep_only(self, identities: Collection[str]) -> None:
        """Columns of other backends that have no connection are free again, and their sums gone. To be called when
        every relay worker has taken a table without them."""
        keys = {_key(identity) for identity in identities}
        with self._locked():
            for column in range(COLUMNS):
                if self._cells[_KEYS + column] and self._cells[_KEYS + column] not in keys:
                    if any(self._cells[cell] for cell in self._column_cells(column, CURRENT)):
                        continue
                    for field in range(FIELDS):
                        for cell in self._column_cells(column, field):
                            if self._cells[cell]:
                                self._cells[cell] = 0
                    self._cells[_KEYS + column] = 0

    # --- counting ---------------------------------------------------------------------------------------------------

    def cells(self, column: int) -> memoryview:
        """Our own cells of a backend, by field, to write."""
        assert self.row is not None, "take_row first"
        found = self._given.get(column)
        if found is None:
            begin = _HEAD_CELLS + self.row * _ROW_CELLS + column * FIELDS
            found = self._given[column] = self._cells[begin : begin + FIELDS]
        return found

    def current(self, column: int) -> int:
        """Connections to a backend now, over all relay workers."""
        first, cells = _HEAD_CELLS + column * FIELDS + CURRENT, self._cells
        return sum(cells[first + row * _ROW_CELLS] for row in self.rows())

    def sums(self, identity: str) -> tuple[int, ...]:
        """All fields of a backend, over all rows and the dead; zeros where it has no column."""
        key = _key(identity)
        try:
            column = self._cells[_KEYS : _KEYS + COLUMNS].tolist().index(key)
        except ValueError:
            return (0,) * FIELDS
        return tuple(sum(self._cells[cell] for cell in self._column_cells(column, field)) for field in range(FIELDS))

    def rows(self) -> tuple[int, ...]:
        """Rows that have an owner, dead or alive."""
        cells = self._cells
        if cells[_ROWS_CHANGED] != self._rows_known:
            self._rows_known = cells[_ROWS_CHANGED]
            self._rows = tuple(row for row in range(1, ROWS) if cells[_OWNERS + 2 * row])
        return self._rows

    def owner(self, row: int) -> int:
        """Its pid, 0 if it has none."""
        return self._cells[_OWNERS + 2 * row] if 0 <= row < ROWS else 0

    # --- within -----------------------------------------------------------------------------------------------------

    def _column_cells(self, column: int, field: int) -> Iterator[int]:
        first = _HEAD_CELLS + column * FIELDS + field
        return (first + row * _ROW_CELLS for row in (0, *self.rows()))

    def _sweep_row(self, row: int) -> None:
        begin = _HEAD_CELLS + row * _ROW_CELLS
        for column in range(COLUMNS):
            if not self._cells[_KEYS + column]:
                continue
            for field in range(FIELDS):
                cell = begin + column * FIELDS + field
                if self._cells[cell]:
                    if field != CURRENT:
                        self._cells[_HEAD_CELLS + column * FIELDS + field] += self._cells[cell]
                    self._cells[cell] = 0
        self._cells[_OWNERS + 2 * row] = self._cells[_OWNERS + 2 * row + 1] = 0
        self._cells[_ROWS_CHANGED] += 1

    def _is_alive(self, row: int) -> bool:
        pid = self._cells[_OWNERS + 2 * row]
        return bool(pid) and _start_time(pid) == self._cells[_OWNERS + 2 * row + 1]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)


def _key(identity: str) -> int:
    """Never 0."""
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "big") or 1


def _start_time(pid: int) -> int | None:
    """In clock ticks since boot (proc(5)); None: there is no such process, or only its zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])
