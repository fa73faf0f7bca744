"""What an agent says: every word of HAProxy's, and whatever else may come."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lb.control.agent import ask_agent
from lb.core.agent import MAXIMUM_DESCRIPTION, MAXIMUM_LINE_BYTES, Said, after, line_of, maxconn_of, parse, weight_of
from lb.core.model import Check
from lb.core.standing import Administrative, Health
from tests.unit.lb_harness import Handler, backend, closed_port, run


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("75%", Said(percent=75)),
        ("0%", Said(percent=0)),
        ("150%", Said(percent=150)),
        ("maxconn:30", Said(maxconn=30)),
        ("MAXCONN:0", Said(maxconn=0)),
        ("ready", Said(administrative=Administrative.READY)),
        ("drain", Said(administrative=Administrative.DRAIN)),
        ("maint", Said(administrative=Administrative.MAINT)),
        ("up", Said(health=Health.UP, health_word="up")),
        ("down", Said(health=Health.DOWN, health_word="down")),
        ("fail", Said(health=Health.DOWN, health_word="fail")),
        ("failed", Said(health=Health.DOWN, health_word="failed")),
        ("stopped", Said(health=Health.DOWN, health_word="stopped")),
        ("DRAIN", Said(administrative=Administrative.DRAIN)),
        (
            " ready,up\t50% ,maxconn:7# all is well, drain ",
            Said(
                administrative=Administrative.READY,
                health=Health.UP,
                health_word="up",
                percent=50,
                maxconn=7,
                description="all is well, drain",
            ),
        ),
        ("down#disk\x1bfull", Said(health=Health.DOWN, health_word="down", description="disk?full")),
        ("drain ready", Said(administrative=Administrative.READY)),
        ("10% 20%", Said(percent=20)),
        ("50% what -3% 3.5%", Said(percent=50, unknown=("what", "-3%", "3.5%"))),
    ],
)
def test_every_word(line: str, expected: Said) -> None:
    assert parse(line) == expected


@pytest.mark.parametrize(
    "line", ["", "  ,\t", "# only a comment", "HTTP/1.1 400 Bad Request", "upward", "%", "maxconn:"]
)
def test_an_answer_without_a_known_word_is_none(line: str) -> None:
    with pytest.raises(ValueError, match=r"without a word|is no word of an agent"):
        parse(line)


@pytest.mark.parametrize(
    ("data", "is_end", "expected"),
    [
        (b"up\n", False, "up"),
        (b"up\r\ndown\n", False, "up"),
        (b"up", False, None),
        (b"up", True, "up"),
        (b"", True, ""),
        (b"\ndown", True, ""),
        (b"x" * MAXIMUM_LINE_BYTES, False, "x" * MAXIMUM_LINE_BYTES),
    ],
)
def test_the_first_line_counts(data: bytes, is_end: bool, expected: str | None) -> None:
    assert line_of(data, is_end) == expected


def test_what_is_not_spoken_of_stays() -> None:
    first = after(None, parse("drain 50% # backup"))
    second = after(first, parse("down"))
    third = after(second, parse("ready maxconn:3 #"))
    assert str(first) == "drain 50% (backup)"
    assert str(second) == "drain down 50%"
    assert str(third) == "ready down 50% maxconn:3"
    assert after(third, parse("up 100%")).health is Health.UP


def test_weight_and_maxconn() -> None:
    assert [weight_of(4, one) for one in (None, parse("up"), parse("25%"), parse("0%"))] == [4.0, 4.0, 1.0, 0.0]
    assert weight_of(200, parse("999%")) == 256.0
    assert [maxconn_of(9, one) for one in (None, parse("up"), parse("maxconn:5"), parse("maxconn:0"))] == [
        9,
        9,
        5,
        None,
    ]


WORDS = ["up", "down", "fail", "failed", "stopped", "ready", "drain", "maint", "7%", "maxconn:4", "#", "x", "\t", ","]


@given(data=st.binary(max_size=3000) | st.lists(st.sampled_from(WORDS)).map(lambda words: " ".join(words).encode()))
def test_garbage_is_no_answer_or_a_bounded_one(data: bytes) -> None:
    line = line_of(data, is_end=True)
    assert line is not None
    try:
        said = parse(line)
    except ValueError as error:
        told = str(error)
        assert (told.isprintable(), len(told) < 100) == (True, True)
        return
    assert str(after(said, said)) == str(said)
    assert str(said).isprintable()
    assert len(said.description) <= MAXIMUM_DESCRIPTION
    assert len(said.unknown) <= 4
    assert 0.0 <= weight_of(256, said) <= 256.0


def answering(*parts: bytes) -> Handler:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()

    return handle


async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"x" * 10_000)
        await writer.drain()


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


@pytest.mark.parametrize(
    ("handler", "seconds", "expected"),
    [
        (answering(b"dra", b"in 5", b"0%\n"), 20.0, "drain 50%"),
        (answering(b"up"), 20.0, "up"),
        (answering(), 20.0, "an answer without a word"),
        (answering(b"SSH-2.0-x\r\n"), 20.0, "SSH-2.0-x: is no word of an agent"),
        (endless, 20.0, f"{'x' * 32}: is no word of an agent"),
        (silent, 0.1, "no answer within 0.1 s"),
    ],
)
def test_asking_a_real_one(handler: Handler, seconds: float, expected: str) -> None:
    async def test() -> None:
        async with backend(handler) as port:
            check = Check(type="agent", port=port, timeout_seconds=seconds)
            assert str(await ask_agent(check, "127.0.0.1:1")) == expected

    run(test)


def test_what_is_sent_to_it_and_nobody_there() -> None:
    async def test() -> None:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert await reader.readline() == b"shop/b1\n"
            writer.write(b"ready # for shop/b1\n")
            await reader.read()

        async with backend(echo) as port:
            check = Check(type="agent", address="127.0.0.1", port=port, send="shop/b1\n", timeout_seconds=20.0)
            assert str(await ask_agent(check, "10.255.255.1:80")) == "ready (for shop/b1)"
        gone = Check(type="agent", port=closed_port(), timeout_seconds=20.0)
        assert await ask_agent(gone, "127.0.0.1:80") == "connection refused"

    run(test)
