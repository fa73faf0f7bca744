"""Where messages of HTTP/1.1 end in a client's bytes, since the parser tells no offsets.

A connection moves with the bytes that nobody acted on, and must not move with one of a message that was parsed.
"""

from __future__ import annotations

import httptools

HEAD_END = b"\r\n\r\n"


class BodySplitter:
    """Cuts what arrives within one body into pieces such that the body's end is the end of a piece."""

    def __init__(self, headers: list[tuple[bytes, bytes]], before: bytes) -> None:
        """`before`: the last bytes that arrived before (three are enough)."""
        length = _content_length(headers)
        self.length = length
        """None for a chunked body."""
        self._last = before[-3:]

    def piece(self, data: bytes, seen: int) -> int:
        """How many bytes of `data` to parse next; `seen`: the bytes of the body so far.

        A chunked body ends with an empty line, after its last chunk or its trailers; so does nothing but such a piece.
        """
        if self.length is not None:
            return min(len(data), max(1, self.length - seen))
        joined = self._last + data
        found = joined.find(HEAD_END)
        size = len(data) if found < 0 else found + len(HEAD_END) - len(self._last)
        self._last = (self._last + data[:size])[-3:]
        return size


def after_last_message(data: bytes) -> bytes:
    """The head that has begun, of bytes that start with a message and end within a head."""
    end = data.rfind(HEAD_END) + len(HEAD_END)
    if end < len(HEAD_END):
        return data
    last = _LastMessage()
    parser = httptools.HttpRequestParser(last)
    try:
        parser.feed_data(data[:end])
    except httptools.HttpParserUpgrade:
        return data[end:]
    return data[end + last.missing :]


class _LastMessage:
    """Callbacks of a parser: how many bytes of the last message's body it has not seen."""

    def __init__(self) -> None:
        self._headers: list[tuple[bytes, bytes]] = []
        self._seen = 0
        self._is_complete = True

    def on_message_begin(self) -> None:
        self._headers, self._seen, self._is_complete = [], 0, False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_body(self, body: bytes) -> None:
        self._seen += len(body)

    def on_message_complete(self) -> None:
        self._is_complete = True

    @property
    def missing(self) -> int:
        length = _content_length(self._headers)
        return 0 if self._is_complete or length is None else length - self._seen


def _content_length(headers: list[tuple[bytes, bytes]]) -> int | None:
    for name, value in headers:
        if name == b"content-length":
            return int(value)
    return None
