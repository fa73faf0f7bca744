"""What goes from one relay worker to another with a connection: typed, bounded, checked, never code.

Both may be of different releases: a field is only ever added, with a default, and nobody refuses one that it does not
know. File descriptors come in this order: the client, the server, the two ends of a pipe with something in it for the
way up, and of one for the way down.
"""

from __future__ import annotations

import socket

import msgspec

from handoff.core.proxy_protocol import Address
from lb.relay.attempt import AttemptState
from lb.relay.relay import RelayState


class BadLetter(Exception):
    """Not from a relay worker, or with other fds than it says."""


class RelayLetter(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="relay/1"):
    """A relayed connection."""

    service: str
    identity: str
    """Of the backend."""
    name: str
    address: str
    """Where the backend is; of use for one that the receiver's table does not have any more."""
    state: RelayState
    limits: tuple[float | None, float | None, float | None, float | None]
    """Of use where the receiver's table does not have the service any more."""
    counted_as: str | None = None
    source: Address | None = None
    sni: str | None = None
    alpn: tuple[str, ...] = ()
    """What its ClientHello asked for, where it was read."""

    @property
    def fds(self) -> int:
        return 2 + 2 * (self.state.up.piped > 0) + 2 * (self.state.down.piped > 0)


class AttemptLetter(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="attempt/1"):
    """A client that has no backend yet."""

    service: str
    state: AttemptState

    @property
    def fds(self) -> int:
        return 1


Letter = RelayLetter | AttemptLetter

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Letter] = msgspec.msgpack.Decoder(Letter)


def encode(letter: Letter) -> bytes:
    return _encoder.encode(letter)


def decode(data: bytes, fds: int) -> Letter:
    """Raises BadLetter."""
    try:
        letter = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadLetter(f"not a letter: {error}") from None
    if fds != letter.fds:
        raise BadLetter(f"a letter with {fds} fds, for {letter.fds}")
    return letter


def plain_socket(fd: int) -> socket.socket:
    """Takes ownership of the fd. Raises OSError where it is no socket, and the fd stays open."""
    made = socket.SocketType(fileno=fd)
    made.setblocking(False)
    return made  # type: ignore[return-value]  # the plain class of C, as in Acceptor
