"""Reading responses strictly: bytes in, a verdict out. No I/O."""

from __future__ import annotations

import enum


class Outcome(enum.Enum):
    """How one exchange ended. Everything but OK is a failure, and none is retried."""

    OK = "ok"
    REFUSED = "refused"
    RESET_BEFORE = "reset before an answer"
    CLOSED_BEFORE = "closed before an answer"
    RESET_WITHIN = "reset within an answer"
    TRUNCATED = "truncated"
    TIMEOUT = "no answer in time"
    BAD_STATUS = "bad status"
    BAD_BODY = "wrong body"
    MALFORMED = "malformed"


class ResponseReader:
    """One response. `feed` returns True when it is whole; `finish` judges the end of the connection."""

    def __init__(self) -> None:
        self.status = 0
        self.body = bytearray()
        self.announces_close = False
        self.is_malformed = False
        self._buffer = bytearray()
        self._has_head = False
        self._is_chunked = False
        self._left: int | None = None
        self.has_bytes = False

    def feed(self, data: bytes) -> bool:
        self.has_bytes = True
        self._buffer += data
        try:
            is_whole = self._read()
        except (ValueError, IndexError):
            self.is_malformed = True
            return True
        # Nothing was asked for beyond this response: a byte after it belongs to somebody else's.
        self.is_malformed = is_whole and bool(self._buffer)
        return is_whole

    def ends_with_connection(self) -> bool:
        """Whether the end of the connection is the end of this response (neither a length nor chunks)."""
        return self._has_head and not self._is_chunked and self._left is None

    def _read(self) -> bool:
        if not self._has_head and not self._read_head():
            return False
        return self._read_chunks() if self._is_chunked else self._read_sized()

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        status_line, *lines = bytes(self._buffer[:end]).split(b"\r\n")
        del self._buffer[: end + 4]
        self._has_head = True
        if not status_line.startswith(b"HTTP/1."):
            raise ValueError(status_line)
        self.announces_close = status_line.startswith(b"HTTP/1.0")
        self.status = int(status_line.split()[1])
        for line in lines:
            name, _, value = line.partition(b":")
            match name.lower():
                case b"content-length":
                    self._left = _digits(value, 10)
                case b"transfer-encoding":
                    self._is_chunked = value.strip().lower() == b"chunked"
                case b"connection":
                    self.announces_close = b"close" in value.lower()
        return True

    def _read_sized(self) -> bool:
        if self._left is None:
            self.body += self._buffer
            self._buffer.clear()
            return False
        take = self._buffer[: self._left]
        self.body += take
        del self._buffer[: len(take)]
        self._left -= len(take)
        return self._left == 0

    def _read_chunks(self) -> bool:
        while True:
            line_end = self._buffer.find(b"\r\n")
            if line_end < 0:
                return False
            size = _digits(bytes(self._buffer[:line_end]), 16)
            if len(self._buffer) < line_end + 2 + size + 2:
                return False
            if self._buffer[line_end + 2 + size : line_end + 4 + size] != b"\r\n":
                raise ValueError(self._buffer[:line_end])
            self.body += self._buffer[line_end + 2 : line_end + 2 + size]
            del self._buffer[: line_end + 2 + size + 2]
            if size == 0:
                return True


def _digits(text: bytes, base: int) -> int:
    """int() would also take a sign, blanks within and underscores."""
    stripped = text.strip()
    if not stripped.isalnum():
        raise ValueError(text)
    return int(stripped, base)


def judge_end(reader: ResponseReader, was_reset: bool) -> Outcome | None:
    """The outcome when the connection ends before `feed` said that the response is whole; None: it is whole so."""
    if reader.ends_with_connection() and not was_reset:
        return None
    if not reader.has_bytes:
        return Outcome.RESET_BEFORE if was_reset else Outcome.CLOSED_BEFORE
    return Outcome.RESET_WITHIN if was_reset else Outcome.TRUNCATED


def judge_response(reader: ResponseReader, expected: bytes) -> Outcome:
    if reader.is_malformed:
        return Outcome.MALFORMED
    if reader.status != 200:
        return Outcome.BAD_STATUS
    return Outcome.OK if reader.body == expected else Outcome.BAD_BODY
