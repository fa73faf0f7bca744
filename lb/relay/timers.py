"""Deadlines of many relays at the cost of none: a relay that is active is not touched."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from math import ceil
from typing import Protocol

BUCKET_SECONDS = 0.02
FAR_SECONDS = 5.0
"""What is due later than this from now waits in a bucket of a whole second: there are fewer of them."""
PATIENT_SECONDS = 2.0
"""What is not due before may be armed by `arm_later`."""
_BUCKETS_PER_SECOND = 50


class Timed(Protocol):
    """`due_at`: when it is to be looked at next, on the monotonic clock; None: never. It may have moved to later."""

    bucket: int | None
    """Ours: None at first."""

    @property
    def due_at(self) -> float | None: ...

    def is_due(self, now: float) -> None: ...


class Alarm:
    """One call at one time, unless it is cancelled before."""

    __slots__ = ("_callback", "bucket", "due_at")

    def __init__(self, due_at: float, callback: Callable[[], None]) -> None:
        self.bucket: int | None = None
        self.due_at: float | None = due_at
        self._callback = callback

    def cancel(self) -> None:
        self.due_at = None

    def is_due(self, _now: float) -> None:
        self.due_at = None
        self._callback()


class Timers:
    """Buckets of 20 ms. Who is in one too early is put into a later one when it comes up."""

    def __init__(self) -> None:
        self._far_from = 0.0
        self._buckets: dict[int, set[Timed]] = {}
        self._order: list[int] = []

    def arm(self, timed: Timed) -> None:
        """Look at it when it is due. To be called at first, and when it may be due earlier than it was."""
        due_at = timed.due_at
        if due_at is not None:
            self.arm_at(timed, due_at)

    def arm_at(self, timed: Timed, at: float) -> None:
        """Look at it then at the latest: for one that knows when it may be due."""
        before = timed.bucket
        if before is not None and before * BUCKET_SECONDS <= at:
            return
        number = ceil(at) * _BUCKETS_PER_SECOND if at > self._far_from else ceil(at / BUCKET_SECONDS)
        if before is not None:
            self._buckets[before].discard(timed)
        timed.bucket = number
        bucket = self._buckets.get(number)
        if bucket is None:
            self._buckets[number] = {timed}
            heapq.heappush(self._order, number)
        else:
            bucket.add(timed)

    def arm_later(self, timed: Timed) -> None:
        """Look at it in one second or two: for one that is not due before, and most likely over by then."""
        number = (int(self._far_from - FAR_SECONDS) + 2) * _BUCKETS_PER_SECOND
        timed.bucket = number
        bucket = self._buckets.get(number)
        if bucket is None:
            self._buckets[number] = {timed}
            heapq.heappush(self._order, number)
        else:
            bucket.add(timed)

    def forget(self, timed: Timed) -> None:
        """It is over: nothing here keeps it."""
        if timed.bucket is not None:
            self._buckets[timed.bucket].discard(timed)
            timed.bucket = None

    def call_at(self, due_at: float, callback: Callable[[], None]) -> Alarm:
        alarm = Alarm(due_at, callback)
        self.arm(alarm)
        return alarm

    def next_deadline(self) -> float | None:
        return self._order[0] * BUCKET_SECONDS if self._order else None

    def set_now(self, now: float) -> None:
        """To be called every second, `check` included; without it every bucket is of a whole second."""
        self._far_from = now + FAR_SECONDS

    def check(self, now: float) -> None:
        """Look at what is due."""
        self.set_now(now)
        while self._order and self._order[0] * BUCKET_SECONDS <= now:
            bucket = self._buckets.pop(heapq.heappop(self._order))
            for timed in bucket:
                timed.bucket = None
            for timed in bucket:
                due_at = timed.due_at
                if due_at is not None and due_at <= now:
                    timed.is_due(now)
                self.arm(timed)
