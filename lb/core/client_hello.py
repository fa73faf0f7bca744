"""The ClientHello with which TLS begins: the name (SNI) and the protocols (ALPN) that a client asks for. No I/O.

RFC 8446, sections 4.1.2 and 5.1; RFC 6066, section 3; RFC 7301. The record layer may cut the message anywhere, and TCP
the records. Nothing is decrypted, and nothing is changed: what was read goes to the backend as it came.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

MAXIMUM_HELLO_BYTES = 16 * 1024
"""All that may have come before the message is complete; those of browsers have 0.5 to 2 KiB."""
MAXIMUM_NAME_BYTES = 255
_MAXIMUM_FRAGMENT_BYTES = 1 << 14
_RECORD_HEADER_BYTES, _MESSAGE_HEADER_BYTES = 5, 4
_HANDSHAKE, _MAJOR_VERSION = b"\x16", b"\x03"
"""The type of record, and the first byte of every version since SSL 3."""
_CLIENT_HELLO = 1
_SERVER_NAME, _HOST_NAME, _PROTOCOLS = 0, 0, 16


@dataclass(slots=True, frozen=True)
class Incomplete:
    """So far it may become one."""


@dataclass(slots=True, frozen=True)
class ClientHello:
    """What it asks for."""

    sni: str | None = None
    """In lower case, without a dot at its end; None: no name."""
    alpn: tuple[str, ...] = ()
    """As the client prefers them, each byte a character: GREASE (RFC 8701) is no text."""


@dataclass(slots=True, frozen=True)
class NotTLS:
    """The client speaks something else."""


@dataclass(slots=True, frozen=True)
class Malformed:
    """It begins as TLS does, and is no ClientHello that can be read."""

    reason: str


Reading: TypeAlias = Incomplete | ClientHello | NotTLS | Malformed

_INCOMPLETE, _NOT_TLS = Incomplete(), NotTLS()


class ClientHelloReader:
    """Of one client. What has come is looked at once, however small the pieces are."""

    def __init__(self) -> None:
        self._data = bytearray()
        """Of the record that is not complete yet."""
        self._message = bytearray()
        """Of the handshake, without the headers of records."""
        self._size = 0

    def feed(self, data: bytes) -> Reading:
        """After anything but Incomplete nothing more is to be fed."""
        self._size += len(data)
        self._data += data
        reading = self._read()
        if reading is _INCOMPLETE and self._size >= MAXIMUM_HELLO_BYTES:
            return Malformed(f"a ClientHello of more than {MAXIMUM_HELLO_BYTES} bytes")
        return reading

    def _read(self) -> Reading:
        data, at = self._data, 0
        while True:
            head = data[at : at + _RECORD_HEADER_BYTES]
            if head[:1] not in (b"", _HANDSHAKE) or head[1:2] not in (b"", _MAJOR_VERSION):
                return Malformed("a record that is no handshake") if self._message else _NOT_TLS
            if len(head) < _RECORD_HEADER_BYTES:
                break
            size = int.from_bytes(head[3:])
            if not 0 < size <= _MAXIMUM_FRAGMENT_BYTES:
                return Malformed(f"a record of {size} bytes")
            begin = at + _RECORD_HEADER_BYTES
            if len(data) < begin + size:
                break
            self._message += data[begin : begin + size]
            at = begin + size
            reading = _read_message(self._message)
            if reading is not _INCOMPLETE:
                return reading
        del data[:at]
        return _INCOMPLETE


def read_client_hello(data: bytes) -> Reading:
    """Of all that a client has sent."""
    return ClientHelloReader().feed(data)


def _read_message(message: bytearray) -> Reading:
    if message[0] != _CLIENT_HELLO:
        return Malformed(f"a handshake that begins with a message of type {message[0]}")
    if len(message) < _MESSAGE_HEADER_BYTES:
        return _INCOMPLETE
    end = _MESSAGE_HEADER_BYTES + int.from_bytes(message[1:_MESSAGE_HEADER_BYTES])
    if end > MAXIMUM_HELLO_BYTES:
        return Malformed(f"a ClientHello of {end} bytes; at most {MAXIMUM_HELLO_BYTES}")
    if len(message) < end:
        return _INCOMPLETE
    try:
        return _read_hello(_Vector(bytes(message[_MESSAGE_HEADER_BYTES:end])))
    except _BadHelloError as error:
        return Malformed(str(error))


class _BadHelloError(Exception):
    pass


class _Vector:
    """Bytes that are taken from the front. Raises _BadHelloError where there are fewer than it says."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, size: int) -> bytes:
        begin, self._at = self._at, self._at + size
        if self._at > len(self._data):
            raise _BadHelloError("a ClientHello with a length beyond its end")
        return self._data[begin : self._at]

    def rest(self) -> bytes:
        return self.take(len(self._data) - self._at)

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size))

    def vector(self, size: int) -> _Vector:
        """With its own length ahead, of so many bytes."""
        return _Vector(self.take(self.number(size)))


def _read_hello(body: _Vector) -> ClientHello:
    body.take(2 + 32)  # version, random
    body.vector(1)  # session
    body.vector(2)  # cipher suites
    body.vector(1)  # compression
    sni: str | None = None
    alpn: tuple[str, ...] = ()
    if not body:  # extensions came with TLS 1.2
        return ClientHello()
    extensions = body.vector(2)
    if body:
        raise _BadHelloError("a ClientHello with something after its end")
    seen: set[int] = set()
    while extensions:
        kind, content = extensions.number(2), extensions.vector(2)
        if kind not in (_SERVER_NAME, _PROTOCOLS):
            continue
        if kind in seen:  # which of them a backend would go by is nothing to guess
            raise _BadHelloError(f"a ClientHello with two extensions of type {kind}")
        seen.add(kind)
        if kind == _SERVER_NAME:
            sni = _read_name(content)
        else:
            alpn = _read_protocols(content)
    return ClientHello(sni, alpn)


def _read_name(content: _Vector) -> str | None:
    names, found = content.vector(2), None
    while names:
        kind, name = names.number(1), names.vector(2)
        if kind != _HOST_NAME:
            continue
        if found is not None:
            raise _BadHelloError("an SNI with two names")
        found = _plain_name(name)
    if content:
        raise _BadHelloError("an SNI with something after its end")
    return found


def _plain_name(name: _Vector) -> str:
    data = name.rest()
    if not 0 < len(data) <= MAXIMUM_NAME_BYTES or not all(0x21 <= byte <= 0x7E for byte in data):
        raise _BadHelloError("an SNI that is no name")
    found = plain_name(data.decode("ascii"))
    if not found or found.startswith("."):
        raise _BadHelloError("an SNI that is no name")
    return found


def plain_name(name: str) -> str:
    """As names are compared."""
    return name.lower().removesuffix(".")


def _read_protocols(content: _Vector) -> tuple[str, ...]:
    protocols, found = content.vector(2), []
    while protocols:
        found.append(protocols.vector(1).rest().decode("latin-1"))
    if content or not all(found):
        raise _BadHelloError("an ALPN that is no list of protocols")
    return tuple(found)
