"""The load calls a failure a failure, and what it writes is read back as it was."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest

from bench.apps import hello
from bench.clients import Record, judge
from bench.reload import Result, _judge, _overview
from bench.responses import Outcome, ResponseReader, judge_response
from bench.statistics_of import Exchange, Failure, Summary, Window, place, summarise


def read(response: bytes) -> ResponseReader:
    reader = ResponseReader()
    assert reader.feed(response)
    return reader


def sized(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


@pytest.mark.parametrize(
    "response",
    [
        sized(b"hello") + b"H",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1_0\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhelloXX0\r\n\r\n",
        b"SMTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_not_one_response_is_malformed(response: bytes) -> None:
    assert judge_response(read(response), b"hello") is Outcome.MALFORMED


def test_http_1_0_announces_the_close() -> None:
    assert read(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok").announces_close
    assert not read(sized(b"ok")).announces_close


@pytest.mark.parametrize("body_of", [hello.hello_body, hello.stream_body])
def test_a_body_is_right_for_its_own_version_only(body_of: Callable[[int], bytes]) -> None:
    assert judge(read(sized(body_of(7))), body_of) == (Outcome.OK, 7)
    mixed = b"000008" + body_of(7)[6:-1]
    assert judge(read(sized(mixed)), body_of) == (Outcome.BAD_BODY, 8)


def test_a_stream_that_changes_version_half_way_is_wrong() -> None:
    one, other = hello.stream_body(1), hello.stream_body(2)
    half = len(one) // 2
    assert judge(read(sized(one[:half] + other[half:])), hello.stream_body)[0] is Outcome.BAD_BODY


@pytest.mark.parametrize(
    ("response", "outcome"),
    [
        (sized(hello.hello_body(1), b"503 No"), Outcome.BAD_STATUS),
        (sized(b""), Outcome.BAD_BODY),
        (sized(b"Hello"), Outcome.BAD_BODY),
    ],
)
def test_a_failure_has_no_version(response: bytes, outcome: Outcome) -> None:
    assert judge(read(response), hello.hello_body) == (outcome, -1)


def test_what_a_load_writes_is_read_back_as_it_was() -> None:
    exchanges = [Exchange(1.5, 0.25, Outcome.OK, 3), Exchange(2.0, 0.5, Outcome.MALFORMED)]
    record = Record()
    for one in exchanges:
        record.add(one)
    file = io.BytesIO()
    record.write(file)
    assert Record.read(file.getvalue(), 2) == exchanges
    with pytest.raises(ValueError, match="3 exchanges announced"):
        Record.read(file.getvalue(), 3)


@pytest.mark.parametrize(
    ("failed", "expected"),
    [
        (Exchange(4.0, 0.1, Outcome.TIMEOUT), Failure("no answer in time", 0, 3.0, False)),
        (Exchange(10.5, 0.1, Outcome.REFUSED), Failure("refused", 1, 0.5, True)),
        (Exchange(15.0, 0.1, Outcome.REFUSED), Failure("refused", 1, 5.0, False)),
        (Exchange(15.0, 4.0, Outcome.TRUNCATED), Failure("truncated", 1, 5.0, True)),
        (Exchange(20.0, 0.1, Outcome.REFUSED), Failure("refused", 2, 0.0, True)),
    ],
)
def test_a_failure_is_placed_by_the_reload_before_it(failed: Exchange, expected: Failure) -> None:
    assert place(failed, [Window(10.0, 12.0), Window(20.0, 21.0)], 1.0) == expected


def test_an_exchange_that_began_in_a_reload_belongs_to_it() -> None:
    summary = summarise([Exchange(13.0, 2.0, Outcome.OK), Exchange(14.0, 0.5, Outcome.OK)], [Window(10.0, 12.0)])
    assert summary.reload_ms["max"] == pytest.approx(2000.0)
    assert summary.steady_ms["max"] == pytest.approx(500.0)


def test_a_gap_that_touches_a_reload_is_not_a_steady_one() -> None:
    exchanges = [Exchange(at, 0.0, Outcome.OK) for at in (1.0, 1.5, 9.0, 9.25)]
    summary = summarise(exchanges, [Window(5.0, 6.0)])
    assert (summary.longest_gap_ms, summary.steady_gap_ms) == (7500.0, 500.0)


def test_nothing_measured_makes_an_empty_overview() -> None:
    assert _overview([]).splitlines()[0].startswith("| lost |")


def result(server: str, failures: dict[str, int], effective: int = 1) -> Result:
    return Result(
        server=server,
        version="",
        scenario="new",
        clients=16,
        reloads=1,
        effective=effective,
        old_left=0,
        reload_seconds=[1.0],
        connections_opened=10,
        announced_closes=0,
        reconnects=None,
        usable=None,
        notes=[],
        summary=Summary(10, failures, {}, {}, 0.0),
    )


def test_a_control_without_failures_fails_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert _judge([result("handoff", {}), result("kill and restart", {"refused": 3})]) == 0
    assert _judge([result("handoff", {}), result("kill and restart", {})]) == 1
    assert "proves nothing" in capsys.readouterr().err


def test_a_reload_that_did_not_happen_is_no_zero(capsys: pytest.CaptureFixture[str]) -> None:
    idle = result("uvicorn", {}, effective=0)
    assert "void: 0 of 1 reloads happened" in _overview([idle])
    _judge([idle])
    assert "did not happen" in capsys.readouterr().err
