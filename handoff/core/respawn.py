"""When a crashed worker's slot is filled again: at once, then with capped back-off, then slowly for ever."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_DELAY_SECONDS = 0.1
LONGEST_DELAY_SECONDS = 10.0
BREAKER_CRASHES = 8
"""From this many crashes in a row on, the slot counts as a crash loop."""
BREAKER_DELAY_SECONDS = 30.0
STABLE_SECONDS = 10.0
"""A worker that accepted for this long ends the row of crashes."""


def delay_seconds(crashes: int) -> float:
    """Seconds to wait after the given number of crashes in a row: 0, 0.1, 0.2, … 3.2, then the breaker's."""
    if crashes <= 1:
        return 0.0
    if crashes >= BREAKER_CRASHES:
        return BREAKER_DELAY_SECONDS
    return float(min(FIRST_DELAY_SECONDS * 2 ** (crashes - 2), LONGEST_DELAY_SECONDS))


@dataclass(slots=True)
class Respawn:
    """The crashes in a row of one slot, and when (monotonic) it may be filled again."""

    crashes: int = 0
    not_before: float = 0.0

    @property
    def is_breaker_open(self) -> bool:
        return self.crashes >= BREAKER_CRASHES

    def crashed(self, now: float) -> None:
        self.crashes += 1
        self.not_before = now + delay_seconds(self.crashes)
