"""The bench judges strictly: what it calls a failure, and how it counts."""

from __future__ import annotations

import pytest

from bench.responses import Outcome, ResponseReader, judge_end, judge_response
from bench.stalls import merge
from bench.statistics_of import Exchange, Window, longest_gap, percentiles, summarise, without_stalls

SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"


@pytest.mark.parametrize("response", [SIZED, CHUNKED])
def test_a_response_cut_anywhere_is_read_the_same(response: bytes) -> None:
    for place in range(1, len(response)):
        reader = ResponseReader()
        assert not reader.feed(response[:place])
        assert reader.feed(response[place:])
        assert judge_response(reader, b"hello") is Outcome.OK


def test_an_announced_close_is_seen() -> None:
    reader = ResponseReader()
    reader.feed(CHUNKED)
    assert reader.announces_close


@pytest.mark.parametrize(
    ("fed", "was_reset", "outcome"),
    [
        (b"", False, Outcome.CLOSED_BEFORE),
        (b"", True, Outcome.RESET_BEFORE),
        (SIZED[:-1], False, Outcome.TRUNCATED),
        (SIZED[:-1], True, Outcome.RESET_WITHIN),
        (CHUNKED[:-1], False, Outcome.TRUNCATED),
        (b"HTTP/1.1 200 OK\r\n\r\nhello", False, None),
        (b"HTTP/1.1 200 OK\r\n\r\nhello", True, Outcome.RESET_WITHIN),
    ],
)
def test_a_connection_that_ends_early_is_classified(fed: bytes, was_reset: bool, outcome: Outcome | None) -> None:
    reader = ResponseReader()
    if fed:
        assert not reader.feed(fed)
    assert judge_end(reader, was_reset) is outcome


def test_a_wrong_status_or_body_is_a_failure() -> None:
    reader = ResponseReader()
    reader.feed(SIZED)
    assert judge_response(reader, b"other") is Outcome.BAD_BODY
    reader = ResponseReader()
    reader.feed(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n")
    assert judge_response(reader, b"") is Outcome.BAD_STATUS


def test_exchanges_are_counted_in_and_outside_the_windows() -> None:
    exchanges = [Exchange(float(at), 0.001 * at, Outcome.OK) for at in range(1, 11)]
    exchanges.append(Exchange(5.5, 0.0, Outcome.REFUSED))
    summary = summarise(exchanges, [Window(4.0, 6.0)])
    assert summary.total == 11
    assert summary.failures == {"refused": 1}
    assert summary.reload_ms == pytest.approx({"p50": 5.0, "p99": 6.0, "p99.9": 6.0, "max": 6.0})
    assert summary.steady_ms["max"] == pytest.approx(10.0)


def test_the_longest_gap_is_between_good_answers() -> None:
    times = [1.0, 1.5, 4.0, 4.1]
    exchanges = [Exchange(at, 0.1, Outcome.OK) for at in times] + [Exchange(2.0, 0.1, Outcome.TRUNCATED)]
    assert longest_gap(exchanges) == pytest.approx(2.5)
    assert longest_gap([]) == 0.0
    assert percentiles([]) == {}


def test_what_the_machine_stood_still_is_not_the_servers_gap() -> None:
    stalls = merge([Window(1.0, 2.0), Window(1.5, 3.0), Window(5.0, 6.0)])
    assert stalls == [Window(1.0, 3.0), Window(5.0, 6.0)]
    assert without_stalls(Window(0.0, 4.0), stalls) == pytest.approx(2.0)
    assert without_stalls(Window(2.5, 5.5), stalls) == pytest.approx(2.0)
    assert without_stalls(Window(3.0, 4.0), stalls) == pytest.approx(1.0)
