"""Frames between controller and relay workers: taken apart at any place, and refused when they are none."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lb.core.table import Closing, Endpoint, Route, Table
from lb.core.wire import (
    HEADER,
    MAXIMUM_FRAME_BYTES,
    BadFrame,
    Draining,
    Failed,
    Frames,
    FromRelay,
    Hello,
    Recovered,
    Taken,
    decode_from_relay,
    decode_table,
    frame,
)

MESSAGES: list[FromRelay] = [
    Hello(pid=1, generation=2, slot=3, row=4),
    Taken(generation=1, revision=2),
    Failed(identity="shop/blue/ä@10.0.0.1:80#1", reason="connection refused"),
    Recovered(identity="x"),
    Draining(),
]
TABLE = Table(
    generation=2,
    revision=9,
    routes={
        "shop": Route(
            service="shop",
            shares={"blue": 100},
            pools={"blue": (Endpoint(identity="i", name="b", address="unix:/x", closing=Closing(at=1.5)),)},
        )
    },
)


@given(st.lists(st.sampled_from(MESSAGES)), st.lists(st.integers(0, 400)))
def test_messages_come_out_as_they_went_in_wherever_the_stream_is_cut(sent: list[FromRelay], cuts: list[int]) -> None:
    stream = b"".join(frame(message) for message in sent)
    edges = sorted({0, len(stream), *(min(cut, len(stream)) for cut in cuts)})
    frames = Frames()
    parts = [stream[start:end] for start, end in itertools.pairwise(edges)]
    assert [decode_from_relay(body) for part in parts for body in frames.feed(part)] == sent


def test_a_table_comes_out_as_it_went_in() -> None:
    (body,) = Frames().feed(frame(TABLE))
    assert decode_table(body) == TABLE


def test_a_length_beyond_the_limit_is_refused_before_its_bytes_come() -> None:
    with pytest.raises(BadFrame, match=str(MAXIMUM_FRAME_BYTES + 1)):
        Frames().feed(HEADER.pack(MAXIMUM_FRAME_BYTES + 1))
    assert Frames().feed(HEADER.pack(MAXIMUM_FRAME_BYTES)) == []


@given(st.binary(max_size=200))
def test_garbage_is_a_bad_frame_and_nothing_else(body: bytes) -> None:
    for decode in (decode_from_relay, decode_table):
        with pytest.raises(BadFrame):
            decode(body)


@pytest.mark.parametrize(
    "body", [b"", b"[" * 100_000, b'{"type":"hello"}', b'{"type":"taken","generation":"1"}', b"\xff"]
)
def test_json_that_is_no_message_is_a_bad_frame(body: bytes) -> None:
    with pytest.raises(BadFrame):
        decode_from_relay(body)
