"""What travels with a live connection from one worker to another, as data: typed, bounded, never code.

A worker that serves a kind says so when it is ready (`adopts`); nobody sends it anything else. So a state of another
version is another kind: `http/2` would be one.
"""

from __future__ import annotations

from typing import Any

import msgspec

HTTP = "http/1"
RAW = "raw/1"
WEBSOCKET = "websocket/1"

MAXIMUM_STATE_BYTES = 16 * 1024
MAXIMUM_DATA_BYTES = 16 * 1024 * 1024
"""Bytes that a client sent and nobody acted on. More than this does not move: the connection ends where it is."""


class State(msgspec.Struct, frozen=True, tag_field="kind", kw_only=True, omit_defaults=True):
    """`client`: host and port, since getpeername tells nothing after a reset; None for a unix socket."""

    client: tuple[str, int] | None = None


class HTTPState(State, frozen=True, tag=HTTP):
    """A connection of HTTP/1.1 between two messages, or within the head of the next one."""

    scheme: str = "http"
    server: tuple[str, int] | None = None
    """Our address, for the scope: asking the kernel for it is felt where thousands move. None: ask (a unix socket)."""
    is_answered: bool = False
    """At least one response was sent on it: an idle client may be asked to come back."""
    keep_alive_until: float | None = None
    """On the monotonic clock, which all processes of one system share. None where no response was given yet, or the
    next request has begun."""


class RawState(State, frozen=True, tag=RAW):
    """A connection of a program's own protocol; what the program says of it is the letter's data."""

    listener: str = ""
    """The name of the listener that it came from; empty for a program that hands over by itself."""


class WebSocketState(State, frozen=True, tag=WEBSOCKET):
    """An open WebSocket between two messages. The letter's data: the handshake's request, then what came later."""

    scheme: str = "ws"
    request_bytes: int = 0
    """How much of the letter's data is the request."""
    subprotocol: str | None = None
    extensions: str = ""
    """What was negotiated, as the header said it: the new worker must come to the same."""
    state: dict[str, Any] = {}
    """What the application left for its successor; JSON."""


AnyState = HTTPState | RawState | WebSocketState


class Letter(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One connection in the head of a datagram in a mailbox.

    Its `size` bytes of data follow all heads, or lie in a memfd, which comes after its fds.
    """

    state: AnyState
    fds: int = 1
    size: int = 0
    in_memfd: bool = False
