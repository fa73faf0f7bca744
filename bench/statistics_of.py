"""What a list of exchanges says: failures, percentiles in and outside the reload windows, and the longest gap."""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bench.responses import Outcome


class Exchange(NamedTuple):
    """Ended at `at` (monotonic seconds) after `seconds`; answered by `version`, -1: unknown."""

    at: float
    seconds: float
    outcome: Outcome
    version: int = -1


class Window(NamedTuple):
    start: float
    end: float


class Failure(NamedTuple):
    """`reload` counts from 1, 0: before the first; `seconds` since it began, or since the first exchange ended."""

    outcome: str
    reload: int
    seconds: float
    is_in_window: bool


class Summary(NamedTuple):
    """Times of exchanges that overlap a reload's window are apart from the others, as are the gaps that do."""

    total: int
    failures: dict[str, int]
    steady_ms: dict[str, float]
    reload_ms: dict[str, float]
    longest_gap_ms: float
    steady_gap_ms: float = 0.0
    own_gap_ms: float = 0.0
    """The longest gap without what of it the machine itself stood still."""
    first_failures: tuple[Failure, ...] = ()

    @property
    def failed(self) -> int:
        return sum(self.failures.values())


MAXIMUM_FAILURES = 1000
"""How many are kept with their times; all are counted."""


def summarise(exchanges: Sequence[Exchange], windows: Sequence[Window], stalls: Sequence[Window] = ()) -> Summary:
    inside: list[Exchange] = []
    outside: list[Exchange] = []
    for one in exchanges:
        (inside if _overlaps(one.at - one.seconds, one.at, windows) else outside).append(one)
    failed = sorted((one for one in exchanges if one.outcome is not Outcome.OK), key=lambda one: one.at)
    began = min((one.at for one in exchanges), default=0.0)
    steady = [later - earlier for earlier, later in _gaps(exchanges) if not _overlaps(earlier, later, windows)]
    return Summary(
        len(exchanges),
        dict(Counter(one.outcome.value for one in failed)),
        percentiles(outside),
        percentiles(inside),
        longest_gap(exchanges) * 1000,
        max(steady, default=0.0) * 1000,
        own_gap(exchanges, stalls) * 1000,
        tuple(place(one, windows, began) for one in failed[:MAXIMUM_FAILURES]),
    )


def own_gap(exchanges: Sequence[Exchange], stalls: Sequence[Window]) -> float:
    """Seconds of the longest gap, each without its stalls; longest first, so that few need to be looked at."""
    longest = 0.0
    for earlier, later in sorted(_gaps(exchanges), key=lambda gap: gap[0] - gap[1]):
        if later - earlier <= longest:
            break
        longest = max(longest, without_stalls(Window(earlier, later), stalls))
    return longest


def without_stalls(gap: Window, stalls: Sequence[Window]) -> float:
    """Seconds of a gap in which no processor stood still. `stalls` are in order and do not overlap."""
    left = gap.end - gap.start
    for stall in stalls[bisect.bisect_right(stalls, gap.start, key=lambda stall: stall.end) :]:
        if stall.start >= gap.end:
            break
        left -= min(gap.end, stall.end) - max(gap.start, stall.start)
    return left


def place(failed: Exchange, windows: Sequence[Window], began: float) -> Failure:
    """Says where among the reloads an exchange failed. `windows` are in order."""
    number = bisect.bisect_right(windows, failed.at, key=lambda window: window.start)
    since = windows[number - 1].start if number else began
    is_inside = _overlaps(failed.at - failed.seconds, failed.at, windows)
    return Failure(failed.outcome.value, number, round(failed.at - since, 4), is_inside)


def _overlaps(start: float, end: float, windows: Sequence[Window]) -> bool:
    following = bisect.bisect_right(windows, end, key=lambda window: window.start)
    return following > 0 and windows[following - 1].end >= start


def percentiles(exchanges: Sequence[Exchange]) -> dict[str, float]:
    """Milliseconds of those that were answered: p50, p99, p99.9, max."""
    seconds = sorted(one.seconds for one in exchanges if one.outcome is Outcome.OK)
    if not seconds:
        return {}
    named = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
    return {name: seconds[max(0, math.ceil(part * len(seconds)) - 1)] * 1000 for name, part in named.items()}


def longest_gap(exchanges: Sequence[Exchange]) -> float:
    """Seconds between two good answers, whoever got them."""
    return max((later - earlier for earlier, later in _gaps(exchanges)), default=0.0)


def _gaps(exchanges: Sequence[Exchange]) -> Iterable[tuple[float, float]]:
    return itertools.pairwise(sorted(one.at for one in exchanges if one.outcome is Outcome.OK))
