"""A shared page of counters: one row for each worker, written by that worker only, read by everybody.

The master makes it, gives rows out, and zeroes a row when its worker was reaped: a dead worker must not go on counting.
"""

from __future__ import annotations

import mmap
import os

CONNECTIONS = 0
REQUESTS = 1
IN_PROGRESS = 2
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

    def take_row(self) -> int:
        return self._free.pop()

    def give_back(self, row: int) -> None:
        self._cells[row * FIELDS : (row + 1) * FIELDS] = memoryview(bytes(FIELDS * 8)).cast("Q")
        self._free.append(row)

    def read(self, row: int) -> tuple[int, ...]:
        return tuple(self._cells[row * FIELDS : (row + 1) * FIELDS])


def map_row(fd: int, row: int) -> memoryview:
    """The worker's side: the row as a view of unsigned 64-bit cells. Takes ownership of `fd` and closes it."""
    cells = memoryview(mmap.mmap(fd, _BYTES)).cast("Q")
    os.close(fd)
    return cells[row * FIELDS : (row + 1) * FIELDS]
