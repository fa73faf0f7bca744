"""The plan of a rebalancing: even after it, the same for all who compute it, and quiet when it is even enough."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from handoff.worker.balance import TOLERANCE, shares

COUNTS = st.dictionaries(st.integers(0, 30), st.integers(0, 200), min_size=1, max_size=8)


def after(counts: dict[int, int]) -> dict[int, int]:
    """Everybody carries out its part of the plan."""
    result = dict(counts)
    for worker in counts:
        for other, number in shares(counts, worker).items():
            result[worker] -= number
            result[other] += number
    return result


@given(COUNTS)
def test_nothing_is_lost_and_nobody_gives_more_than_it_has_too_many(counts: dict[int, int]) -> None:
    result = after(counts)
    assert sum(result.values()) == sum(counts.values())
    even = sum(counts.values()) / len(counts)
    for worker in counts:
        assert worker not in shares(counts, worker)
        if counts[worker] > even:
            assert result[worker] >= int(even)
        else:
            assert result[worker] <= even + 1


@given(COUNTS)
def test_everybody_is_within_the_tolerance_after_it_and_then_nobody_moves(counts: dict[int, int]) -> None:
    result = after(counts)
    even = sum(counts.values()) / len(counts)
    assert max(result.values()) <= max(even * (1 + TOLERANCE), even + 1)
    assert all(not shares(result, worker) or max(result.values()) > even * (1 + TOLERANCE) for worker in result)
    assert after(after(result)) == after(result), "it does not swing"


def test_sixteen_on_two() -> None:
    assert shares({3: 0, 7: 16}, 7) == {3: 8}
    assert shares({3: 0, 7: 16}, 3) == {}
    assert shares({3: 8, 7: 8}, 3) == {}


def test_two_givers_fill_different_gaps() -> None:
    counts = {1: 10, 2: 0, 3: 10, 4: 0}
    assert [shares(counts, worker) for worker in counts] == [{2: 5}, {}, {4: 5}, {}]


def test_one_alone_keeps_all() -> None:
    assert shares({5: 100}, 5) == {}
