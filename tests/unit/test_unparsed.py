"""Where messages end, for every way to cut a client's bytes."""

from __future__ import annotations

import httptools
from hypothesis import given
from hypothesis import strategies as st

from handoff.worker.unparsed import BodySplitter, after_last_message

BODIES = st.one_of(st.binary(max_size=40), st.sampled_from([b"\r\n\r\n", b"0\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"]))


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """One request: without a body, with a length, or chunked, with or without trailers."""
    kind = draw(st.sampled_from(["none", "length", "chunked", "trailers"]))
    if kind == "none":
        return b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % draw(st.integers(0, 99))
    if kind == "length":
        body = draw(BODIES)
        return b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in draw(st.lists(BODIES, max_size=3)) if one)
    trailer = b"X-Sum: 1\r\n" if kind == "trailers" else b""
    return b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n" + trailer + b"\r\n"


@given(st.lists(messages(), max_size=4), messages(), st.data())
def test_the_begun_head_is_found_after_any_messages(before: list[bytes], last: bytes, data: st.DataObject) -> None:
    head_bytes = last.index(b"\r\n\r\n") + 3
    begun = last[: data.draw(st.integers(1, head_bytes))]
    assert after_last_message(b"".join(before) + begun) == begun


class Parser:
    """Counts the messages that are complete, and the bytes of the present body."""

    def __init__(self) -> None:
        self.complete = 0
        self.seen = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.parser = httptools.HttpRequestParser(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_body(self, body: bytes) -> None:
        self.seen += len(body)

    def on_message_complete(self) -> None:
        self.complete += 1


@given(messages().filter(lambda one: one.startswith(b"POST")), st.binary(max_size=60), st.data())
def test_no_piece_reaches_beyond_the_body(message: bytes, later: bytes, data: st.DataObject) -> None:
    whole = message + later
    body_begins = message.index(b"\r\n\r\n") + 4
    cut = data.draw(st.integers(body_begins, len(message)))
    parser = Parser()
    parser.parser.feed_data(whole[:cut])
    if parser.complete:
        return  # nothing of the body was left
    splitter = BodySplitter(parser.headers, whole[:cut])
    rest = whole[cut:]
    while rest and not parser.complete:
        arrived, rest = rest[: (size := data.draw(st.integers(1, len(rest))))], rest[size:]
        while arrived and not parser.complete:
            piece = splitter.piece(arrived, parser.seen)
            parser.parser.feed_data(arrived[:piece])
            arrived = arrived[piece:]
        rest = arrived + rest
    assert parser.complete == 1
    assert rest == later
