"""The shared page of counters."""

from __future__ import annotations

import os

import pytest

from handoff.counters import (
    CELLS,
    CONNECTIONS,
    DURATION_BOUNDS,
    DURATION_NANOSECONDS,
    DURATIONS,
    FIELDS,
    IN_PROGRESS,
    MAXIMUM_ROWS,
    REFUSED,
    REQUESTS,
    STATUS_COUNT,
    STATUSES,
    CounterPage,
    WorkerCounters,
)


@pytest.fixture
def page() -> CounterPage:
    return CounterPage()


def test_a_new_page_counts_nothing(page: CounterPage) -> None:
    assert page.read(page.take_row()) == (0,) * FIELDS


def test_what_a_worker_writes_the_master_reads(page: CounterPage) -> None:
    row = page.take_row()
    cells = WorkerCounters(os.dup(page.fd), row).own
    cells[CONNECTIONS] = 3
    cells[REQUESTS] = 2**63
    cells[IN_PROGRESS] += 1
    assert page.read(row)[:3] == (3, 2**63, 1)


def test_mapping_a_row_closes_the_fd(page: CounterPage) -> None:
    fd = os.dup(page.fd)
    WorkerCounters(fd, 0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_row_belongs_to_one_worker_only(page: CounterPage) -> None:
    first, second = page.take_row(), page.take_row()
    WorkerCounters(os.dup(page.fd), first).own[CELLS - 1] = 7
    WorkerCounters(os.dup(page.fd), second).own[0] = 9
    assert page.read_all(first) == (*(0,) * (CELLS - 1), 7)
    assert page.read_all(second) == (9, *(0,) * (CELLS - 1))
    assert page.read(second) == (9, *(0,) * (FIELDS - 1))


def test_the_cells_of_a_row_do_not_overlap() -> None:
    assert max(CONNECTIONS, REFUSED) < FIELDS <= DURATION_NANOSECONDS < DURATIONS
    assert DURATIONS + len(DURATION_BOUNDS) + 1 <= STATUSES
    assert STATUSES + STATUS_COUNT <= CELLS
    assert CELLS * 8 % 64 == 0


def test_a_dead_worker_does_not_go_on_counting(page: CounterPage) -> None:
    row = page.take_row()
    neighbour = page.take_row()
    for one in (row, neighbour):
        cells = WorkerCounters(os.dup(page.fd), one).own
        for field in range(CELLS):
            cells[field] = 5
    page.give_back(row)
    assert page.read_all(row) == (0,) * CELLS
    assert page.read_all(neighbour) == (5,) * CELLS


def test_a_row_that_was_given_back_is_given_out_again(page: CounterPage) -> None:
    rows = [page.take_row() for _ in range(MAXIMUM_ROWS)]
    assert sorted(rows) == list(range(MAXIMUM_ROWS))
    page.give_back(rows[5])
    assert page.take_row() == rows[5]


def test_when_all_rows_are_taken_there_is_an_error_and_nothing_is_lost(page: CounterPage) -> None:
    rows = [page.take_row() for _ in range(MAXIMUM_ROWS)]
    with pytest.raises(OSError, match="more than"):
        page.take_row()
    page.give_back(rows[0])
    assert page.take_row() == rows[0]


def test_what_a_row_counted_stays_in_the_totals(page: CounterPage) -> None:
    for _ in range(2):
        row = page.take_row()
        WorkerCounters(os.dup(page.fd), row).own[REQUESTS] = 5
        page.give_back(row)
    assert page.totals(())[REQUESTS] == 10


def test_a_worker_cannot_write_past_its_row(page: CounterPage) -> None:
    cells = WorkerCounters(os.dup(page.fd), page.take_row()).own
    with pytest.raises(IndexError):
        cells[CELLS] = 1


def test_the_page_is_not_inherited_unless_it_is_meant_to_be(page: CounterPage) -> None:
    assert not os.get_inheritable(page.fd)
