"""Deadlines of many relays at the cost of none: a relay that is active is not touched."""

from __future__ import annotations

import math
from typing import Protocol

BUCKET_SECONDS = 0.02


class Timed(Protocol):
    """`due_at`: when it is to be looked at next, on the monotonic clock; None: never. It may have moved to later."""

    @property
    def due_at(self) -> float | None: ...

    def is_due(self, now: float) -> None: ...


class Timers:
    """Buckets of 20 ms. Who is in one too early is put into a later one when it comes up."""

    def __init__(self) -> None:
        self._buckets: dict[int, list[Timed]] = {}

    def arm(self, timed: Timed) -> None:
        """Look at it when it is due. To be called at first, and when it may be due earlier than it was."""
        due_at = timed.due_at
        if due_at is not None:
            self._buckets.setdefault(math.ceil(due_at / BUCKET_SECONDS), []).append(timed)

    def next_deadline(self) -> float | None:
        return min(self._buckets) * BUCKET_SECONDS if self._buckets else None

    def check(self, now: float) -> None:
        for bucket in [bucket for bucket in self._buckets if bucket * BUCKET_SECONDS <= now]:
            for timed in self._buckets.pop(bucket):
                due_at = timed.due_at
                if due_at is not None and due_at <= now:
                    timed.is_due(now)
                self.arm(timed)
