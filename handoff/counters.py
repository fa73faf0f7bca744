"""A shared page of counters: one row for each worker, written by that worker only, read by everybody.

The master makes it, gives rows out, and zeroes a row when its worker was reaped: a dead worker must not go on counting.
"""

from __future__ import annotations

import errno
import mmap
import os

CONNECTIONS = 0
REQUESTS = 1
IN_PROGRESS = 2
MOVED = 3
"""Connections handed over."""
WAITING = 4
"""Connections that are to be handed over and wait for room in a mailbox."""
ADOPTED = 5
REFUSED = 6
"""Connections that could not move, or could not be taken over."""
FIELDS = 16
"""Room for later fields; 128 bytes, so that two writers never share a cache line."""
MAXIMUM_ROWS = 2048
_BYTES = MAXIMUM_ROWS * FIELDS * 8


class CounterPage:
    """The master's side. Owns its memfd; `fd` is what workers inherit."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("handoff-counters", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, _BYTES)
        self._cells = memoryview(mmap.mmap(self.fd, _BYTES)).cast("Q")
        self._free = list(range(MAXIMUM_ROWS - 1, -1, -1))
        self._gone = [0] * FIELDS

    def take_row(self) -> int:
        """Raises OSError when all are taken."""
        if not self._free:
            raise OSError(errno.EAGAIN, f"more than {MAXIMUM_ROWS} workers")
        return self._free.pop()

    def give_back(self, row: int) -> None:
        """Its worker is gone; what it counted stays in the totals."""
        self._gone = [total + cell for total, cell in zip(self._gone, self.read(row), strict=True)]
        self._cells[row * FIELDS : (row + 1) * FIELDS] = memoryview(bytes(FIELDS * 8)).cast("Q")
        self._free.append(row)

    def gone(self, field: int) -> int:
        """The sum over all workers that are gone. Of use for fields that only grow."""
        return self._gone[field]

    def read(self, row: int) -> tuple[int, ...]:
        return tuple(self._cells[row * FIELDS : (row + 1) * FIELDS])


class WorkerCounters:
    """The worker's side: its own row, to write, and everybody's, to read. Takes ownership of `fd` and closes it."""

    def __init__(self, fd: int, row: int) -> None:
        self._cells = memoryview(mmap.mmap(fd, _BYTES)).cast("Q")
        os.close(fd)
        self.own = self._cells[row * FIELDS : (row + 1) * FIELDS]
        """Unsigned 64-bit cells."""

    def read(self, row: int, field: int) -> int:
        return self._cells[row * FIELDS + field]
