"""Whether what is new does as well as what is old, by the counters of the balancers."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from lb.core.rollout.model import Gate


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """Of some backends, over all balancers, since these were started."""

    total: int = 0
    """Connections made."""
    failed: int = 0
    """Attempts to connect that failed."""
    reset: int = 0
    """Connections that ended by a reset, or a limit."""
    connect_seconds: float = 0.0
    """Of all connections that were made, the sum."""

    def __add__(self, other: Counts) -> Counts:
        return self._with(other, 1)

    def __sub__(self, other: Counts) -> Counts:
        return self._with(other, -1)

    def _with(self, other: Counts, sign: int) -> Counts:
        """A balancer that was started anew counts from 0 again: less than nothing is nothing."""
        return Counts(
            total=max(0, self.total + sign * other.total),
            failed=max(0, self.failed + sign * other.failed),
            reset=max(0, self.reset + sign * other.reset),
            connect_seconds=max(0.0, self.connect_seconds + sign * other.connect_seconds),
        )


def compared(gate: Gate, meanwhile: Counts, before: Counts) -> Counts:
    """Which counts of the old ones are the measure: those of the same time, or, where nearly all connections go to the
    new ones by then, all before it."""
    return meanwhile if meanwhile.total + meanwhile.failed >= gate.minimum_connections else before


def refusals(gate: Gate, new: Counts, old: Counts) -> list[str]:
    """What does not hold, a line each."""
    found = []
    if gate.failed_percent is not None and new.total + new.failed >= gate.minimum_connections:
        mine, theirs = _percent(new.failed, new.total + new.failed), _percent(old.failed, old.total + old.failed)
        if mine > theirs + gate.failed_percent:
            found.append(
                f"{mine:.1f} % of connecting to the new backends failed, {theirs:.1f} % to the old ones; "
                f"failed_percent is {gate.failed_percent:g}"
            )
    if new.total < gate.minimum_connections:
        return found
    if gate.reset_percent is not None:
        mine, theirs = _percent(new.reset, new.total), _percent(old.reset, old.total)
        if mine > theirs + gate.reset_percent:
            found.append(
                f"{mine:.1f} % of the new backends' connections were reset, {theirs:.1f} % of the old ones'; "
                f"reset_percent is {gate.reset_percent:g}"
            )
    if gate.connect_ratio is not None and old.total >= gate.minimum_connections and old.connect_seconds > 0:
        ratio = (new.connect_seconds / new.total) / (old.connect_seconds / old.total)
        if ratio > gate.connect_ratio:
            found.append(
                f"connecting to the new backends takes {ratio:.1f} times as long as to the old ones; "
                f"connect_ratio is {gate.connect_ratio:g}"
            )
    return found


def summed(counts: Mapping[str, Counts]) -> Counts:
    found = Counts()
    for one in counts.values():
        found += one
    return found


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0
