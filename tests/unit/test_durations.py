"""Durations: read and written the way people do."""

from __future__ import annotations

import pytest

from handoff.durations import format_duration, parse_duration
from handoff.errors import ExitCode, UsageError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30.0),
        ("200ms", 0.2),
        ("2m", 120.0),
        ("1h", 3600.0),
        ("1.5s", 1.5),
        (".5s", 0.5),
        ("0s", 0.0),
        ("0ms", 0.0),
        (" 5 s ", 5.0),
        ("168h", 604800.0),
    ],
)
def test_a_duration_with_a_unit_is_read_in_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("30", "duration 30: has no unit; write 30s, 200ms or 2m"),
        ("1.5", "duration 1.5: has no unit; write 1.5s, 200ms or 2m"),
        ("-3s", "duration -3s: is negative; write 0s or more"),
        ("soon", "duration soon: is not a duration; write 30s, 200ms or 2m"),
        ("", "duration '': is not a duration; write 30s, 200ms or 2m"),
        ("30 days", "duration 30 days: is not a duration; write 30s, 200ms or 2m"),
        ("1e3s", "duration 1e3s: is not a duration; write 30s, 200ms or 2m"),
        ("nan", "duration nan: is not a duration; write 30s, 200ms or 2m"),
        ("5S", "duration 5S: is not a duration; write 30s, 200ms or 2m"),
        ("٣s", "duration ٣s: is not a duration; write 30s, 200ms or 2m"),
        ("5\ns\n!", "duration '5\\ns\\n!': is not a duration; write 30s, 200ms or 2m"),
        ("169h", "duration 169h: is too long; at most 168h is taken"),
    ],
)
def test_what_is_no_duration_is_refused_with_a_remedy(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_duration(text)
    assert caught.value.message == message
    assert caught.value.exit_code is ExitCode.USAGE


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.2, "200ms"), (0.0005, "0.5ms"), (1.5, "1.5s"), (75, "75s"), (90, "90s"), (120, "2m"), (7200, "2h")],
)
def test_a_duration_is_written_in_its_shortest_form_and_reads_back(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
    assert parse_duration(text) == pytest.approx(seconds)


def test_a_measured_duration_is_written_without_noise() -> None:
    assert format_duration(1.23456789) == "1.235s"
    assert format_duration(0.0123456789) == "12.346ms"
    assert format_duration(-0.2) == "-200ms"
