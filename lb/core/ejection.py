"""Passive checks: a backend that fails clients is ejected for a while, for longer each time. No I/O.

After Envoy's outlier detection: consecutive failures to connect, a time that grows with each ejection, a cap on how
many are out at once, and a panic threshold below which being out counts for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(slots=True, frozen=True)
class EjectionRules:
    """`failures`: so many in a row eject. Times in seconds. `maximum_share`: of all backends, 0 to 1."""

    failures: int = 5
    base_seconds: float = 10.0
    maximum_seconds: float = 300.0
    maximum_share: float = 0.5
    forgive_seconds: float = 60.0
    """After so long without trouble, the next ejection is as long as one less would have made it."""


@dataclass(slots=True)
class EjectionRecord:
    """Of one backend."""

    failures: int = 0
    ejections: int = 0
    until: float | None = None
    calm_since: float = 0.0


@dataclass(slots=True)
class Ejections:
    """Of one pool. Times are monotonic."""

    rules: EjectionRules
    records: dict[str, EjectionRecord] = field(default_factory=dict)

    def succeeded(self, identity: str) -> None:
        """A connection was made: the row of failures ends. It does not end an ejection."""
        record = self.records.get(identity)
        if record is not None:
            record.failures = 0

    def failed(self, identity: str, pool_size: int, now: float) -> float | None:
        """A connection could not be made. Returns until when the backend is out, if that is new."""
        record = self.records.setdefault(identity, EjectionRecord(calm_since=now))
        self._forgive(record, now)
        record.failures += 1
        if record.failures < self.rules.failures or record.until is not None:
            return None
        if len(self.ejected(now)) + 1 > self.rules.maximum_share * pool_size:
            return None
        record.failures = 0
        record.ejections += 1
        seconds = min(self.rules.base_seconds * 2 ** (record.ejections - 1), self.rules.maximum_seconds)
        record.until = now + seconds
        return record.until

    def ejected(self, now: float) -> frozenset[str]:
        """Those that are out at this time; whose time is over may come back."""
        for record in self.records.values():
            if record.until is not None and record.until <= now:
                record.calm_since, record.until = record.until, None
        return frozenset(identity for identity, record in self.records.items() if record.until is not None)

    def next_deadline(self) -> float | None:
        return min((record.until for record in self.records.values() if record.until is not None), default=None)

    def keep_only(self, identities: frozenset[str]) -> None:
        """The same address, removed and added again, is a new identity: nothing of the old one counts."""
        self.records = {identity: record for identity, record in self.records.items() if identity in identities}

    def _forgive(self, record: EjectionRecord, now: float) -> None:
        if record.until is not None or record.ejections == 0:
            return
        forgiven = int((now - record.calm_since) / self.rules.forgive_seconds)
        if forgiven > 0:
            record.ejections = max(0, record.ejections - forgiven)
            record.calm_since = now


def is_panic(eligible: Mapping[str, bool], threshold: float) -> bool:
    """So few are eligible that being down is no reason any more: better a chance than none. 0 turns it off."""
    return bool(eligible) and sum(eligible.values()) / len(eligible) < threshold
