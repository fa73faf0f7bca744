"""What a list of exchanges says: failures, percentiles in and outside the reload windows, and the longest gap."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from bench.responses import Outcome


class Exchange(NamedTuple):
    """Ended at `at` (monotonic seconds) after `seconds`."""

    at: float
    seconds: float
    outcome: Outcome


class Window(NamedTuple):
    start: float
    end: float


class Summary(NamedTuple):
    total: int
    failures: dict[str, int]
    steady_ms: dict[str, float]
    reload_ms: dict[str, float]
    longest_gap_ms: float

    @property
    def failed(self) -> int:
        return sum(self.failures.values())


def summarise(exchanges: Sequence[Exchange], windows: Sequence[Window]) -> Summary:
    inside = [one for one in exchanges if any(window.start <= one.at <= window.end for window in windows)]
    inside_set = set(map(id, inside))
    outside = [one for one in exchanges if id(one) not in inside_set]
    failures = Counter(one.outcome.value for one in exchanges if one.outcome is not Outcome.OK)
    return Summary(
        len(exchanges), dict(failures), percentiles(outside), percentiles(inside), longest_gap(exchanges) * 1000
    )


def percentiles(exchanges: Sequence[Exchange]) -> dict[str, float]:
    """Milliseconds of those that were answered: p50, p99, p99.9, max."""
    seconds = sorted(one.seconds for one in exchanges if one.outcome is Outcome.OK)
    if not seconds:
        return {}
    named = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
    return {name: seconds[max(0, math.ceil(part * len(seconds)) - 1)] * 1000 for name, part in named.items()}


def longest_gap(exchanges: Sequence[Exchange]) -> float:
    """Seconds between two good answers, whoever got them."""
    times = sorted(one.at for one in exchanges if one.outcome is Outcome.OK)
    return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)
