"""A shared page of counters: one row for each worker, written by that worker only, read by everybody.

The master makes it, gives rows out, and zeroes a row when its worker was reaped: a dead worker must not go on counting.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterable

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
HEARTBEAT = 7
"""Grows as long as the event loop turns."""
ADOPTING = 8
"""Not 0: what was read from the mailbox may not be in CONNECTIONS yet."""
FIELDS = 16
"""Room for later fields."""

# What only `--metrics` counts.
DURATION_NANOSECONDS = 16
"""The sum over all answered requests."""
DURATIONS = 17
"""From here on a histogram: one cell for each bound, and one for what is longer than all of them."""
DURATION_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Seconds; what takes no longer counts for the bound."""
STATUSES = 64
"""From here on one cell for each status, from 100 to 599."""
FIRST_STATUS = 100
STATUS_COUNT = 500
CELLS = 576
"""Of a row: a multiple of 8, so that two writers never share a cache line."""

MAXIMUM_ROWS = 2048
_ROW_BYTES = CELLS * 8
_BYTES = MAXIMUM_ROWS * _ROW_BYTES


class CounterPage:
    """The master's side. Owns its memfd; `fd` is what workers inherit."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("handoff-counters", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, _BYTES)
        self._cells = memoryview(mmap.mmap(self.fd, _BYTES)).cast("Q")
        self._free = list(range(MAXIMUM_ROWS - 1, -1, -1))
        self._gone = [0] * CELLS

    def take_row(self) -> int:
        """Raises OSError when all are taken."""
        if not self._free:
            raise OSError(errno.EAGAIN, f"more than {MAXIMUM_ROWS} workers")
        return self._free.pop()

    def give_back(self, row: int) -> None:
        """Its worker is gone; what it counted stays in the totals."""
        self._gone = [total + cell for total, cell in zip(self._gone, self.read_all(row), strict=True)]
        self._cells[row * CELLS : (row + 1) * CELLS] = memoryview(bytes(_ROW_BYTES)).cast("Q")
        self._free.append(row)

    def totals(self, rows: Iterable[int]) -> list[int]:
        """The sums over these rows and all workers that are gone. Of use for cells that only grow."""
        return [sum(cells) for cells in zip(self._gone, *map(self.read_all, rows), strict=True)]

    def read(self, row: int) -> tuple[int, ...]:
        """What is counted always."""
        return tuple(self._cells[row * CELLS : row * CELLS + FIELDS])

    def read_all(self, row: int) -> tuple[int, ...]:
        return tuple(self._cells[row * CELLS : (row + 1) * CELLS])


class WorkerCounters:
    """The worker's side: its own row, to write, and everybody's, to read. Takes ownership of `fd` and closes it."""

    def __init__(self, fd: int, row: int) -> None:
        self._cells = memoryview(mmap.mmap(fd, _BYTES)).cast("Q")
        os.close(fd)
        self.own = self._cells[row * CELLS : (row + 1) * CELLS]
        """Unsigned 64-bit cells."""

    def read(self, row: int, field: int) -> int:
        return self._cells[row * CELLS + field]
