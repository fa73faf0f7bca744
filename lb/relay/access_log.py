"""The access log: one line of JSON for each connection at its end, with an end code as HAProxy has it.

Its first letter is who ended it: `-` both, in order; C the client; S the server; P this balancer, by a rule of its
own; c or s a limit of time on that side; K closed by a drain. The second is the phase: R the PROXY header, Q the queue,
C connecting, D data, `-` after the end.
"""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime

import msgspec

from handoff.core.proxy_protocol import Address
from lb.relay.attempt import Attempt
from lb.relay.relay import Closed
from lb.relay.targets import Target

FLUSH_BYTES = 64 * 1024
MAXIMUM_BYTES = 1024 * 1024
"""What cannot be written now waits, up to so much; then lines are dropped, and counted."""
_SIDES = {"client": "C", "server": "S", "proxy": "P", "": "K"}
_TIMED = {"idle", "fin", "first byte"}


class Line(msgspec.Struct, frozen=True, kw_only=True):
    time: str
    service: str
    client: str
    backend: str | None
    end: str
    reason: str
    seconds: float
    sent_bytes: int
    received_bytes: int


class AccessLog:
    """Writes to a borrowed fd, standard output as a rule, at the end of a turn and never within it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._encoder = msgspec.json.Encoder()
        self._lines: list[bytes] = []
        self._size = 0
        self.dropped = 0

    def ended(self, attempt: Attempt, service: str, side: str, reason: str, is_late: bool) -> None:
        letter = _SIDES[side].lower() if is_late else _SIDES[side]
        self._write(attempt.source, service, None, letter + attempt.phase.value, reason, 0.0, (0, 0))

    def relayed(self, source: Address | None, service: str, target: Target, closed: Closed, seconds: float) -> None:
        if closed.cause == "end":
            code = "--"
        else:
            letter = _SIDES[closed.side]
            code = (letter.lower() if closed.cause in _TIMED else letter) + "D"
        sizes = closed.sent_bytes, closed.received_bytes
        self._write(source, service, target.endpoint.name, code, closed.cause, seconds, sizes)

    def flush(self) -> None:
        if not self._lines:
            return
        text = b"".join(self._lines)
        self._lines.clear()
        self._size = 0
        try:
            written = os.write(self._fd, text)
        except OSError:  # BlockingIOError, or nobody reads any more
            written = 0
        if written < len(text):
            self._lines.append(text[written:])
            self._size = len(text) - written

    def _write(
        self,
        source: Address | None,
        service: str,
        backend: str | None,
        end: str,
        reason: str,
        seconds: float,
        sizes: tuple[int, int],
    ) -> None:
        if self._size > MAXIMUM_BYTES:
            self.dropped += 1
            return
        line = Line(
            time=datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds"),
            service=service,
            client=f"{source[0]}:{source[1]}" if source is not None else "unix",
            backend=backend,
            end=end,
            reason=reason,
            seconds=round(seconds, 6),
            sent_bytes=sizes[0],
            received_bytes=sizes[1],
        )
        encoded = self._encoder.encode(line) + b"\n"
        self._lines.append(encoded)
        self._size += len(encoded)
        if self._size > FLUSH_BYTES:
            self.flush()
