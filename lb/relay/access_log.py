"""The access log: one line of JSON for each connection at its end, with an end code as HAProxy has it.

Its first letter is who ended it: `-` both, in order; C the client; S the server; P this balancer, by a rule of its
own; c or s a limit of time on that side; K closed by a drain. The second is the phase: R the PROXY header, H the
ClientHello, Q the queue, C connecting, D data, `-` after the end.
"""

from __future__ import annotations

import time
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from handoff.core.proxy_protocol import Address
from handoff.output import WHOLE_BYTES, Output
from lb.core.client_hello import ClientHello, NotTLS
from lb.relay.attempt import Attempt
from lb.relay.relay import Closed

if TYPE_CHECKING:
    from lb.relay.engine import Context

FLUSH_BYTES = 64 * 1024
MAXIMUM_BYTES = 1024 * 1024
"""What has no room in the output now waits, up to so much; then lines are dropped, and counted."""
MAXIMUM_PROTOCOLS = 8
"""Of a client's ALPN in a line, so many characters of each."""
MAXIMUM_CHARACTERS = 32
_SIDES = {"client": "C", "server": "S", "proxy": "P", "": "K"}
_TIMED = {"idle", "fin", "first byte"}


class Line(msgspec.Struct, frozen=True, kw_only=True):
    time: str
    service: str
    client: str
    sni: str | msgspec.UnsetType = msgspec.UNSET
    """Only where the service reads it, and the client says it."""
    alpn: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    """The same."""
    backend: str | None
    end: str
    reason: str
    seconds: float
    sent_bytes: int
    received_bytes: int


class AccessLog:
    """Writes to a borrowed fd, standard output as a rule, at the end of a turn; its reader may stand still for as long
    as it likes. Lines go out whole, whoever else writes there."""

    def __init__(self, fd: int) -> None:
        self._output = Output(fd)
        self._encoder = msgspec.json.Encoder()
        self._chunks: deque[bytearray] = deque()
        """Whole lines, as many as may be written at once."""
        self._size = 0
        self.dropped = 0

    def ended(self, attempt: Attempt, service: str, side: str, reason: str, is_late: bool, seconds: float) -> None:
        letter = _SIDES[side].lower() if is_late else _SIDES[side]
        hello = None if attempt.hello is None else logged(attempt.hello)
        end = letter + attempt.phase.value
        self._write(attempt.source, service, hello, attempt.backend, end, reason, seconds, (0, 0))

    def relayed(self, context: Context, closed: Closed, seconds: float) -> None:
        if closed.cause == "end":
            code = "--"
        else:
            letter = _SIDES[closed.side]
            code = (letter.lower() if closed.cause in _TIMED else letter) + "D"
        sizes = closed.sent_bytes, closed.received_bytes
        service, backend = context.service.name, context.target.endpoint.name
        self._write(context.source, service, context.hello, backend, code, closed.cause, seconds, sizes)

    def flush(self) -> None:
        while self._chunks and self._output.write(self._chunks[0]):
            self._size -= len(self._chunks.popleft())

    def close(self) -> None:
        self.flush()
        self._output.close()

    def _write(
        self,
        source: Address | None,
        service: str,
        hello: ClientHello | None,
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
            sni=msgspec.UNSET if hello is None or hello.sni is None else hello.sni,
            alpn=msgspec.UNSET if hello is None or not hello.alpn else hello.alpn,
            backend=backend,
            end=end,
            reason=reason,
            seconds=round(seconds, 6),
            sent_bytes=sizes[0],
            received_bytes=sizes[1],
        )
        encoded = self._encoder.encode(line) + b"\n"
        if self._chunks and len(self._chunks[-1]) + len(encoded) <= WHOLE_BYTES:
            self._chunks[-1] += encoded
        else:
            self._chunks.append(bytearray(encoded))
        self._size += len(encoded)
        if self._size > FLUSH_BYTES:
            self.flush()


def logged(hello: ClientHello | NotTLS) -> ClientHello | None:
    """What of it a line holds."""
    if isinstance(hello, NotTLS):
        return None
    return ClientHello(hello.sni, tuple(one[:MAXIMUM_CHARACTERS] for one in hello.alpn[:MAXIMUM_PROTOCOLS]))
