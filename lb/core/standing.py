"""Where a backend stands: what people want of it, and what was observed. Two axes, never one enum.

`eligible = ready and up`. A check that passes does not end a drain, and a drain says nothing about health.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Administrative(enum.Enum):
    """What people want."""

    READY = "ready"
    DRAIN = "drain"
    """Nothing new; what there is goes on."""
    MAINT = "maint"
    """Nothing at all, and it is not checked."""


class Health(enum.Enum):
    """What was observed."""

    UNKNOWN = "unknown"
    """It has checks, and none has passed or failed often enough yet: nothing is sent to it."""
    UP = "up"
    DOWN = "down"


class Outcome(enum.Enum):
    """Of one check."""

    PASSED = "passed"
    FAILED = "failed"


@dataclass(slots=True, frozen=True)
class Thresholds:
    """Consecutive checks: `rise` of them passed bring it up, `fall` failed bring it down; each at least 1."""

    rise: int = 2
    fall: int = 3


@dataclass(slots=True, frozen=True)
class CheckedHealth:
    """The health by checks: one state and one row of contrary outcomes. Values, not records: `after` makes the next.

    One that was never checked needs a single passed check to get traffic, not `rise` of them: there is nothing that it
    would have to recover from.
    """

    health: Health = Health.UNKNOWN
    contrary: int = 0
    """Outcomes in a row that speak against the present state."""

    def after(self, outcome: Outcome, thresholds: Thresholds) -> CheckedHealth:
        speaks_for = _SPEAKS_FOR[outcome]
        if self.health is speaks_for:
            return CheckedHealth(self.health)
        contrary = self.contrary + 1
        if contrary >= self._needed(outcome, thresholds):
            return CheckedHealth(speaks_for)
        return CheckedHealth(self.health, contrary)

    def _needed(self, outcome: Outcome, thresholds: Thresholds) -> int:
        if self.health is Health.UNKNOWN:
            return 1
        return thresholds.rise if outcome is Outcome.PASSED else thresholds.fall

    @property
    def is_changing(self) -> bool:
        """Checks come faster now, to know soon."""
        return self.health is Health.UNKNOWN or self.contrary > 0


_SPEAKS_FOR = {Outcome.PASSED: Health.UP, Outcome.FAILED: Health.DOWN}


@dataclass(slots=True, frozen=True)
class Standing:
    """Both axes, and the ejection on passive evidence, which a passed check does not lift early."""

    administrative: Administrative = Administrative.READY
    health: Health = Health.UP
    is_ejected: bool = False

    @property
    def is_eligible(self) -> bool:
        """It may get new connections."""
        return self.administrative is Administrative.READY and self.health is Health.UP and not self.is_ejected

    @property
    def is_checked(self) -> bool:
        return self.administrative is not Administrative.MAINT

    @property
    def ends_connections(self) -> bool:
        """What it has is closed: nobody wants it to serve at all."""
        return self.administrative is Administrative.MAINT
