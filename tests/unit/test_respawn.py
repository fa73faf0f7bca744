"""When a crashed worker's slot is filled again."""

from __future__ import annotations

import pytest

from handoff.core.respawn import (
    BREAKER_CRASHES,
    BREAKER_DELAY_SECONDS,
    LONGEST_DELAY_SECONDS,
    Respawn,
    delay_seconds,
)


def test_the_first_crash_is_repaired_at_once() -> None:
    assert delay_seconds(0) == delay_seconds(1) == 0.0


@pytest.mark.parametrize(("crashes", "seconds"), [(2, 0.1), (3, 0.2), (4, 0.4), (5, 0.8), (6, 1.6), (7, 3.2)])
def test_each_further_crash_doubles_the_wait(crashes: int, seconds: float) -> None:
    assert delay_seconds(crashes) == pytest.approx(seconds)


def test_the_wait_is_capped_before_the_breaker() -> None:
    assert all(delay_seconds(crashes) <= LONGEST_DELAY_SECONDS for crashes in range(BREAKER_CRASHES))


@pytest.mark.parametrize("crashes", [BREAKER_CRASHES, BREAKER_CRASHES + 1, 1_000_000])
def test_a_crash_loop_is_tried_slowly_for_ever(crashes: int) -> None:
    assert delay_seconds(crashes) == BREAKER_DELAY_SECONDS


def test_the_wait_never_gets_shorter() -> None:
    delays = [delay_seconds(crashes) for crashes in range(BREAKER_CRASHES + 3)]
    assert delays == sorted(delays)


def test_the_breaker_opens_at_its_number_of_crashes() -> None:
    respawn = Respawn()
    for _ in range(BREAKER_CRASHES - 1):
        respawn.crashed(100.0)
    assert not respawn.is_breaker_open
    respawn.crashed(100.0)
    assert respawn.is_breaker_open
    assert respawn.not_before == 100.0 + BREAKER_DELAY_SECONDS
