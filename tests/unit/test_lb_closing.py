"""Connections that are to be gone by some time are closed evenly until then."""

from __future__ import annotations

import pytest

from lb.core.closing import due_now

TICK_SECONDS = 0.05


def closings(present: int, seconds: float) -> list[tuple[float, int]]:
    """When, and how many at once."""
    now, found = 0.0, []
    while present:
        count, pause = due_now(present, seconds - now, TICK_SECONDS)
        found.append((now, count))
        present -= count
        now += pause
    return found


@pytest.mark.parametrize("present", [1, 2, 12, 99])
def test_few_are_closed_one_by_one_over_the_whole_time(present: int) -> None:
    times = [at for at, _ in closings(present, 5.0)]
    assert times == [pytest.approx(5.0 * number / present) for number in range(present)]


@pytest.mark.parametrize("present", [101, 1000, 54_321])
def test_of_many_a_share_is_closed_at_each_tick(present: int) -> None:
    found = closings(present, 5.0)
    counts = [count for _, count in found]
    assert sum(counts) == present
    assert max(counts) <= present // 100 + 1
    assert 4.0 < found[-1][0] <= 5.0


def test_when_the_time_is_over_all_are_closed() -> None:
    assert due_now(7, 0.0, TICK_SECONDS) == (7, TICK_SECONDS)
    assert due_now(7, -1.0, TICK_SECONDS) == (7, TICK_SECONDS)


def test_while_nobody_is_there_it_is_asked_again() -> None:
    assert due_now(0, 5.0, TICK_SECONDS) == (0, TICK_SECONDS)
