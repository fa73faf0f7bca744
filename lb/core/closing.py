"""How fast connections are closed that are to be gone by some time: evenly, however few or many there are."""

from __future__ import annotations

from math import ceil


def due_now(present: int, left_seconds: float, tick_seconds: float) -> tuple[int, float]:
    """How many of those that are present to close now, and after how many seconds to ask again, so that they end one
    after another over all of the time that is left. `tick_seconds`: not more often than that."""
    if left_seconds <= 0 or not present:
        return present, tick_seconds
    pace_seconds = left_seconds / present
    if pace_seconds >= tick_seconds:
        return 1, pace_seconds
    return ceil(tick_seconds / pace_seconds), tick_seconds
