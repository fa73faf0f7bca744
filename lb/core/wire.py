"""What controller and relay workers tell each other over the unix socket `relays.sock` in the runtime directory.

A frame is a length, 4 bytes in network order, and so many bytes of JSON. The relay worker connects and says Hello; the
controller sends its table, and each later one; the relay worker answers with Taken. Whoever reads garbage closes the
connection; a relay worker connects again, with back-off, and serves on meanwhile.
"""

from __future__ import annotations

import struct
from typing import TypeAlias

import msgspec

from lb.core.table import Table

SOCKET_NAME = "relays.sock"
TABLE_NAME = "table.json"
PAGE_NAME = "connections"
HEADER = struct.Struct("!I")
MAXIMUM_FRAME_BYTES = 16 * 1024 * 1024


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """The first frame."""

    pid: int
    generation: int
    slot: int
    row: int
    """Its row in the page of connections."""
    bound: tuple[str, ...] = ()
    """Where its listeners really are; empty: of a release that does not say it."""


class Taken(msgspec.Struct, frozen=True, kw_only=True, tag="taken"):
    """From now on no connection is begun by an older table than this one: no attempt under an older one is under way,
    or the new table allows it as well."""

    generation: int
    revision: int


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """A connection to a backend could not be made: refused, timed out, unreachable; not for want of ports here."""

    identity: str
    reason: str


class Recovered(msgspec.Struct, frozen=True, kw_only=True, tag="recovered"):
    """A connection could be made, after one that failed in this relay worker."""

    identity: str


class Draining(msgspec.Struct, frozen=True, kw_only=True, tag="draining"):
    """This relay worker accepts nothing any more. It goes on to take tables."""


FromRelay: TypeAlias = Hello | Taken | Failed | Recovered | Draining
"""To the controller. To the relay worker there is only `Table`."""

_ENCODER = msgspec.json.Encoder()
_FROM_RELAY: msgspec.json.Decoder[FromRelay] = msgspec.json.Decoder(FromRelay)
_TABLE = msgspec.json.Decoder(Table)


class BadFrame(Exception):
    """What came is no frame; the connection cannot be used any more."""


def frame(message: FromRelay | Table) -> bytes:
    body = _ENCODER.encode(message)
    return HEADER.pack(len(body)) + body


def decode_from_relay(body: bytes) -> FromRelay:
    """Raises BadFrame."""
    try:
        return _FROM_RELAY.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadFrame(str(error)) from None


def decode_table(body: bytes) -> Table:
    """Raises BadFrame."""
    try:
        return _TABLE.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadFrame(str(error)) from None


class Frames:
    """Takes a stream of bytes apart."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies that are complete now. Raises BadFrame for a length beyond MAXIMUM_FRAME_BYTES."""
        self._data += data
        found = []
        while len(self._data) >= HEADER.size:
            (size,) = HEADER.unpack_from(self._data)
            if size > MAXIMUM_FRAME_BYTES:
                raise BadFrame(f"a frame of {size} bytes")
            end = HEADER.size + size
            if len(self._data) < end:
                break
            found.append(bytes(self._data[HEADER.size : end]))
            del self._data[:end]
        return found
