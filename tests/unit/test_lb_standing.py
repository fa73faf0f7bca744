"""A backend's two axes, their whole product; rise and fall; ejections on passive evidence."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lb.core.ejection import EjectionRules, Ejections, is_panic
from lb.core.standing import Administrative, CheckedHealth, Health, Outcome, Standing, Thresholds

P, F = Outcome.PASSED, Outcome.FAILED


@pytest.mark.parametrize(
    ("administrative", "health", "is_ejected"), list(product(Administrative, Health, (False, True)))
)
def test_only_ready_and_up_and_not_ejected_is_eligible(
    administrative: Administrative, health: Health, is_ejected: bool
) -> None:
    standing = Standing(administrative, health, is_ejected)
    wanted = administrative is Administrative.READY and health is Health.UP and not is_ejected
    assert standing.is_eligible is wanted
    assert standing.is_checked is (administrative is not Administrative.MAINT)
    assert standing.ends_connections is (administrative is Administrative.MAINT)


@pytest.mark.parametrize(
    ("start", "outcomes", "end"),
    [
        (Health.UNKNOWN, [P], Health.UP),
        (Health.UNKNOWN, [F], Health.DOWN),
        (Health.UP, [F, F], Health.UP),
        (Health.UP, [F, F, F], Health.DOWN),
        (Health.UP, [F, F, P, F, F], Health.UP),
        (Health.DOWN, [P], Health.DOWN),
        (Health.DOWN, [P, P], Health.UP),
        (Health.DOWN, [P, F, P], Health.DOWN),
    ],
)
def test_rise_and_fall(start: Health, outcomes: list[Outcome], end: Health) -> None:
    health = CheckedHealth(start)
    for outcome in outcomes:
        health = health.after(outcome, Thresholds(rise=2, fall=3))
    assert health.health is end


@given(st.lists(st.sampled_from([P, F])), st.integers(1, 5), st.integers(1, 5))
def test_a_change_needs_exactly_so_many_in_a_row(outcomes: list[Outcome], rise: int, fall: int) -> None:
    thresholds, health = Thresholds(rise, fall), CheckedHealth(Health.UP)
    for number, outcome in enumerate(outcomes, 1):
        before, health = health.health, health.after(outcome, thresholds)
        needed = rise if outcome is P else fall
        if before is not health.health:
            assert outcomes[number - needed : number] == [outcome] * needed
            assert not health.is_changing
        elif len(row := outcomes[max(0, number - needed) : number]) == needed and set(row) == {outcome}:
            assert health.health is (Health.UP if outcome is P else Health.DOWN)


def test_a_backend_that_was_never_checked_is_known_after_one_check() -> None:
    assert CheckedHealth().is_changing
    assert CheckedHealth().after(P, Thresholds(rise=5)).health is Health.UP


RULES = EjectionRules(failures=3, base_seconds=10, maximum_seconds=35, maximum_share=0.5, forgive_seconds=60)


def eject(ejections: Ejections, identity: str, now: float, size: int = 4) -> float | None:
    found = [ejections.failed(identity, size, now) for _ in range(RULES.failures)]
    assert found[:-1] == [None] * (RULES.failures - 1)
    return found[-1]


def test_failures_in_a_row_eject_for_longer_each_time() -> None:
    ejections, now, seconds = Ejections(RULES), 0.0, []
    for _ in range(4):
        until = eject(ejections, "a", now)
        assert until is not None
        assert ejections.ejected(now) == {"a"}
        assert ejections.next_deadline() == until
        seconds.append(until - now)
        assert ejections.ejected(until) == frozenset()
        now = until
    assert seconds == [10, 20, 35, 35]


def test_a_success_ends_the_row_and_not_the_ejection() -> None:
    ejections = Ejections(RULES)
    ejections.failed("a", 4, 0.0)
    ejections.failed("a", 4, 0.0)
    ejections.succeeded("a")
    assert ejections.failed("a", 4, 0.0) is None
    assert eject(ejections, "b", 0.0) == 10.0
    ejections.succeeded("b")
    assert ejections.ejected(1.0) == {"b"}


def test_no_more_than_the_share_is_out_at_once() -> None:
    ejections = Ejections(RULES)
    assert eject(ejections, "a", 0.0, size=3) == 10.0
    assert eject(ejections, "b", 0.0, size=3) is None
    assert ejections.ejected(0.0) == {"a"}
    assert eject(Ejections(RULES), "a", 0.0, size=1) is None


def test_calm_is_forgiving_and_a_new_identity_starts_anew() -> None:
    ejections = Ejections(RULES)
    assert eject(ejections, "a", 0.0) == 10.0
    ejections.ejected(10.0)
    assert eject(ejections, "a", 100.0) == 110.0
    ejections.ejected(110.0)
    ejections.keep_only(frozenset("b"))
    assert eject(ejections, "a", 110.0) == 120.0


@pytest.mark.parametrize(
    ("eligible", "threshold", "expected"),
    [([], 0.5, False), ([True, False], 0.5, False), ([True, False, False], 0.5, True), ([False], 0.0, False)],
)
def test_panic(eligible: list[bool], threshold: float, expected: bool) -> None:
    assert is_panic({str(index): one for index, one in enumerate(eligible)}, threshold) is expected
