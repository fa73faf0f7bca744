"""Durations as people write them: `30s`, `200ms`, `2m`, `1h`."""

from __future__ import annotations

import re

from handoff.errors import UsageError

_SECONDS_PER_UNIT = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_NUMBER = re.compile(r"\d+(?:\.\d+)?|\.\d+", re.ASCII)

# epoll_wait(2) counts milliseconds in an int, which ends after 24 days.
MAX_DURATION_SECONDS = 168 * 3600.0


def parse_duration(text: str) -> float:
    """Seconds of a duration with a unit; `0s` is one too.

    Raises UsageError for a missing unit, a negative duration, nonsense, and more than 168 hours.
    """
    shown = text if text and text.isprintable() else repr(text)
    stripped = text.strip()
    if stripped.startswith("-"):
        raise UsageError(f"duration {shown}: is negative; write 0s or more")
    number = _NUMBER.match(stripped)
    if number is None:
        raise UsageError(f"duration {shown}: is not a duration; write 30s, 200ms or 2m")
    unit = stripped[number.end() :].strip()
    if not unit:
        raise UsageError(f"duration {shown}: has no unit; write {stripped}s, 200ms or 2m")
    if unit not in _SECONDS_PER_UNIT:
        raise UsageError(f"duration {shown}: is not a duration; write 30s, 200ms or 2m")
    seconds = float(number.group()) * _SECONDS_PER_UNIT[unit]
    if seconds > MAX_DURATION_SECONDS:
        raise UsageError(f"duration {shown}: is too long; at most 168h is taken")
    return seconds


def format_duration(seconds: float) -> str:
    """The shortest exact spelling that `parse_duration` reads back, to the microsecond: 120 is `2m`, 0.2 is `200ms`."""
    if seconds < 0:
        return "-" + format_duration(-seconds)
    if seconds == 0 or seconds >= 1:
        for unit, size in (("h", 3600), ("m", 60)):
            if seconds and seconds % size == 0:
                return f"{seconds / size:.0f}{unit}"
        return _shortest(seconds) + "s"
    return _shortest(seconds * 1000) + "ms"


def _shortest(number: float) -> str:
    return f"{number:.3f}".rstrip("0").rstrip(".")
