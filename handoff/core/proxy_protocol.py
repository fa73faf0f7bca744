"""The PROXY protocol, versions 1 and 2: reading and writing its header. Bytes only, no I/O.

Source: haproxy.org, doc/proxy-protocol.txt (2020/03/05).
"""

from __future__ import annotations

import ipaddress
import re
import struct
from typing import NamedTuple

V1_MAXIMUM_BYTES = 107
V2_MAXIMUM_BYTES = 16 + 4096
"""The length field could say 64 KiB; nobody sends that many TLVs, and we would have to wait for them."""
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_V1_PREFIX = b"PROXY "
_FIXED_BYTES = 16
_V1 = re.compile(rb"PROXY (TCP4|TCP6) ([0-9a-fA-F:.]{2,39}) ([0-9a-fA-F:.]{2,39}) ([0-9]{1,5}) ([0-9]{1,5})\r\n")
_UNIX_BYTES = 216
_IPV4, _IPV6 = struct.Struct("!4s4sHH"), struct.Struct("!16s16sHH")

Address = tuple[str, int]


class ProxyError(Exception):
    """The peer's fault, in one line."""


class Header(NamedTuple):
    """`size_bytes` of what was read. Without addresses (LOCAL, UNKNOWN, a unix socket) the connection's own count."""

    size_bytes: int
    source: Address | None = None
    destination: Address | None = None


class Absent(NamedTuple):
    """These bytes do not begin a header, and never will."""


class Incomplete(NamedTuple):
    """As far as can be told they begin one; all of them belong to it if it is one."""


Reading = Header | Absent | Incomplete


def read_header(data: bytes) -> Reading:
    """What the first bytes of a connection are. Raises ProxyError for a header that is malformed or too long."""
    if data.startswith(SIGNATURE):
        return _read_v2(data)
    if data.startswith(_V1_PREFIX):
        return _read_v1(data)
    is_beginning = SIGNATURE.startswith(data) or _V1_PREFIX.startswith(data)
    return Incomplete() if is_beginning else Absent()


def _read_v1(data: bytes) -> Reading:
    end = data.find(b"\r\n", 0, V1_MAXIMUM_BYTES)
    if end < 0:
        if len(data) >= V1_MAXIMUM_BYTES:
            raise ProxyError(f"PROXY v1: no end of line within {V1_MAXIMUM_BYTES} bytes")
        return Incomplete()
    size = end + 2
    line = data[:size]
    if line == b"PROXY UNKNOWN\r\n" or line.startswith(b"PROXY UNKNOWN "):
        return Header(size)  # the rest of the line is to be ignored
    found = _V1.fullmatch(line)
    if found is None:
        raise ProxyError(f"PROXY v1: malformed line {line[:-2]!r}")
    version = 4 if found[1] == b"TCP4" else 6
    source, destination = (_v1_address(found[at], found[at + 2], version) for at in (2, 3))
    return Header(size, source, destination)


def _v1_address(host: bytes, port: bytes, version: int) -> Address:
    try:
        address = ipaddress.ip_address(host.decode())
    except ValueError:
        raise ProxyError(f"PROXY v1: {host.decode()} is not an address") from None
    if address.version != version:
        raise ProxyError(f"PROXY v1: {host.decode()} is not an address of TCP{version}")
    if int(port) > 65535 or (port != b"0" and port.startswith(b"0")):
        raise ProxyError(f"PROXY v1: {port.decode()} is not a port")
    return _shown(address), int(port)


def _read_v2(data: bytes) -> Reading:
    if len(data) < _FIXED_BYTES:
        return Incomplete()
    version_and_command, family_and_transport, length = struct.unpack_from("!BBH", data, len(SIGNATURE))
    if version_and_command >> 4 != 2:
        raise ProxyError(f"PROXY v2: version {version_and_command >> 4} is not 2")
    command = version_and_command & 0xF
    if command not in (0, 1):
        raise ProxyError(f"PROXY v2: unknown command {command}")
    size = _FIXED_BYTES + length
    if size > V2_MAXIMUM_BYTES:
        raise ProxyError(f"PROXY v2: a header of {size} bytes; at most {V2_MAXIMUM_BYTES}")
    if len(data) < size:
        return Incomplete()
    payload = data[_FIXED_BYTES:size]
    if command == 0:
        return Header(size)  # LOCAL: the proxy's own connection, a health check
    return _v2_addresses(size, family_and_transport, payload)


def _v2_addresses(size: int, family_and_transport: int, payload: bytes) -> Header:
    family, transport = family_and_transport >> 4, family_and_transport & 0xF
    if family > 3 or transport > 2:
        raise ProxyError(f"PROXY v2: unknown family {family} or transport {transport}")
    form = {1: _IPV4, 2: _IPV6}.get(family)
    used = {0: 0, 3: _UNIX_BYTES}.get(family) if form is None else form.size
    assert used is not None
    if len(payload) < used:
        raise ProxyError(f"PROXY v2: {len(payload)} bytes of addresses; family {family} has {used}")
    if family == 0:
        return Header(size)  # what follows is not ours to understand
    _check_tlvs(payload[used:])
    if form is None or transport != 1:
        return Header(size)
    source, destination, source_port, destination_port = form.unpack_from(payload)
    return Header(size, (_text(source), source_port), (_text(destination), destination_port))


def _check_tlvs(data: bytes) -> None:
    """Type, length, value: skipped, but they must fill the header exactly."""
    at = 0
    while at < len(data):
        if len(data) - at < 3:
            raise ProxyError("PROXY v2: a TLV is cut off")
        at += 3 + int.from_bytes(data[at + 1 : at + 3], "big")
    if at != len(data):
        raise ProxyError("PROXY v2: a TLV is longer than the header")


def _text(packed: bytes) -> str:
    return _shown(ipaddress.ip_address(packed))


def _shown(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    """A mapped address is the client's IPv4 address, as the application would see it without a proxy."""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


# --- writing --------------------------------------------------------------------------------------------------------


def encode_v1(source: Address | None, destination: Address | None) -> bytes:
    """A header of version 1; UNKNOWN without addresses, or with addresses of two families."""
    pair = _pair(source, destination)
    if pair is None:
        return b"PROXY UNKNOWN\r\n"
    (one, one_port), (other, other_port) = pair
    return f"PROXY TCP{one.version} {one} {other} {one_port} {other_port}\r\n".encode()


def encode_v2(source: Address | None, destination: Address | None) -> bytes:
    """A header of version 2; UNSPEC without addresses."""
    pair = _pair(source, destination)
    if pair is None:
        return SIGNATURE + struct.pack("!BBH", 0x21, 0x00, 0)
    (one, one_port), (other, other_port) = pair
    form, family = (_IPV4, 0x11) if one.version == 4 else (_IPV6, 0x21)
    return (
        SIGNATURE
        + struct.pack("!BBH", 0x21, family, form.size)
        + form.pack(one.packed, other.packed, one_port, other_port)
    )


LOCAL_V2 = SIGNATURE + struct.pack("!BBH", 0x20, 0x00, 0)
"""Version 2 of a connection that the proxy makes for itself: a health check."""

_Parsed = tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]


def _pair(source: Address | None, destination: Address | None) -> tuple[_Parsed, _Parsed] | None:
    if source is None or destination is None:
        return None
    one, other = (ipaddress.ip_address(host.partition("%")[0]) for host, _ in (source, destination))
    if one.version != other.version:
        one, other = (_as_ipv6(address) for address in (one, other))
    return (one, source[1]), (other, destination[1])


def _as_ipv6(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv6Address:
    return address if address.version == 6 else ipaddress.IPv6Address(b"\0" * 10 + b"\xff\xff" + address.packed)
