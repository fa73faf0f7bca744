"""Backends by how long they take: the peak of the recent times, and the choice of the quicker of two. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lb.core.choice import Candidate, drawn_two

DECAY_SECONDS = 10.0
LEAST_SECONDS = 0.0001
"""What is quicker than this is as good as equal: then the number of connections decides."""


class PeakAverage:
    """An average that takes a longer time at once, and forgets it only slowly: within 10 s to a third."""

    __slots__ = ("_at", "_seconds")

    def __init__(self) -> None:
        self._seconds = 0.0
        self._at = 0.0

    def observe(self, seconds: float, now: float) -> None:
        present = self.read(now)
        if seconds >= present:
            self._seconds = seconds
        else:
            kept = math.exp(-max(0.0, now - self._at) / DECAY_SECONDS)
            self._seconds = self._seconds * kept + seconds * (1 - kept)
        self._at = now

    def read(self, now: float) -> float:
        """Seconds. Of one that is not asked any more it falls, so that it is tried again."""
        return self._seconds * math.exp(-max(0.0, now - self._at) / DECAY_SECONDS)


class QuickerOfTwo:
    """Of two that are drawn by weight, the one whose time, by the connections it has, is less (peak EWMA)."""

    def choose(self, candidates: Sequence[Candidate], source: str, random: tuple[float, float]) -> Candidate | None:
        two = drawn_two(candidates, random)
        return min(two, key=_cost) if two else None


def _cost(one: Candidate) -> float:
    return max(one.seconds, LEAST_SECONDS) * (one.connections + 1) / one.weight
