"""Gates: what is new beside what is old, by counts."""

from __future__ import annotations

import pytest

from lb.core.rollout.gates import Counts, compared, refusals, summed
from lb.core.rollout.model import Gate

OLD = Counts(total=1000, failed=10, reset=20, connect_seconds=1.0)
GATE = Gate(failed_percent=1.0, reset_percent=1.0, connect_ratio=2.0)


@pytest.mark.parametrize(
    ("new", "lines"),
    [
        (Counts(total=100, failed=1, reset=2, connect_seconds=0.1), []),
        (Counts(total=97, failed=3, connect_seconds=0.1), ["3.0 % of connecting to the new backends failed, 1.0 %"]),
        (Counts(total=100, reset=5, connect_seconds=0.1), ["5.0 % of the new backends' connections were reset, 2.0 %"]),
        (Counts(total=100, connect_seconds=0.5), ["connecting to the new backends takes 5.0 times as long"]),
        (Counts(failed=20), ["100.0 % of connecting to the new backends failed"]),
        (Counts(total=19, reset=19, connect_seconds=100), []),
    ],
    ids=["as the old", "fails", "resets", "slow", "nobody gets in", "too few to say"],
)
def test_what_is_worse_than_the_old_is_refused(new: Counts, lines: list[str]) -> None:
    found = refusals(GATE, new, OLD)
    assert len(found) == len(lines)
    assert all(one.startswith(line) for one, line in zip(found, lines, strict=True))


def test_without_a_gate_nothing_is_refused() -> None:
    assert refusals(Gate(), Counts(failed=100, reset=100), OLD) == []


def test_old_ones_that_get_nothing_any_more_are_judged_by_all_before() -> None:
    few = Counts(total=19)
    assert compared(GATE, few, OLD) == OLD
    assert compared(GATE, Counts(total=20), OLD) == Counts(total=20)
    slow = Counts(total=100, connect_seconds=10)
    assert refusals(GATE, slow, compared(GATE, Counts(), OLD))


def test_counts_are_summed_and_never_below_nothing() -> None:
    assert summed({"a": OLD, "b": OLD}).total == 2000
    assert Counts(total=5) - Counts(total=7, failed=1) == Counts()
