"""The header of the PROXY protocol: good ones, bad ones, any split, any garbage."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handoff.core.proxy_protocol import (
    LOCAL_V2,
    SIGNATURE,
    V1_MAXIMUM_BYTES,
    V2_MAXIMUM_BYTES,
    Absent,
    Header,
    Incomplete,
    ProxyError,
    encode_v1,
    encode_v2,
    read_header,
)

A4, B4 = ("192.0.2.1", 1234), ("198.51.100.2", 80)
A6 = ("2001:db8::1", 65535)


def v2(command: int, family: int, payload: bytes, length: int | None = None) -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, family, len(payload) if length is None else length) + payload


IPV4 = bytes([192, 0, 2, 1, 198, 51, 100, 2]) + struct.pack("!HH", 1234, 80)
GOOD: list[tuple[bytes, Header]] = [
    (b"PROXY TCP4 192.0.2.1 198.51.100.2 1234 80\r\n", Header(43, A4, B4)),
    (b"PROXY TCP6 2001:db8::1 ::ffff:1.2.3.4 65535 0\r\n", Header(47, A6, ("1.2.3.4", 0))),
    (b"PROXY UNKNOWN\r\n", Header(15)),
    (b"PROXY UNKNOWN ffff::1 whatever 1 2\r\n", Header(36)),
    (v2(0x21, 0x11, IPV4), Header(28, A4, B4)),
    (v2(0x21, 0x11, IPV4 + b"\x04\0\x03abc\x01\0\0"), Header(37, A4, B4)),
    (v2(0x20, 0x00, b""), Header(16)),
    (v2(0x20, 0x11, b"garbage that nobody reads"), Header(41)),
    (v2(0x21, 0x00, b"anything"), Header(24)),
    (v2(0x21, 0x31, bytes(216)), Header(232)),
    (v2(0x21, 0x12, IPV4), Header(28)),
]
BAD: list[tuple[bytes, str]] = [
    (b"PROXY TCP4 192.0.2.1 198.51.100.2 1234\r\n", "malformed line"),
    (b"PROXY TCP5 192.0.2.1 198.51.100.2 1234 80\r\n", "malformed line"),
    (b"PROXY TCP4  192.0.2.1 198.51.100.2 1234 80\r\n", "malformed line"),
    (b"PROXY TCP4 2001:db8::1 198.51.100.2 1234 80\r\n", "2001:db8::1 is not an address of TCP4"),
    (b"PROXY TCP4 192.0.2.256 198.51.100.2 1234 80\r\n", "192.0.2.256 is not an address"),
    (b"PROXY TCP4 192.0.2.1 198.51.100.2 1234 65536\r\n", "65536 is not a port"),
    (b"PROXY TCP4 192.0.2.1 198.51.100.2 01234 80\r\n", "01234 is not a port"),
    (b"PROXY \r\n", "malformed line"),
    (b"PROXY " + b"x" * V1_MAXIMUM_BYTES, f"no end of line within {V1_MAXIMUM_BYTES} bytes"),
    (v2(0x11, 0x11, IPV4), "version 1 is not 2"),
    (v2(0x22, 0x11, IPV4), "unknown command 2"),
    (v2(0x21, 0x41, IPV4), "unknown family 4 or transport 1"),
    (v2(0x21, 0x13, IPV4), "unknown family 1 or transport 3"),
    (v2(0x21, 0x11, IPV4[:-1]), "11 bytes of addresses; family 1 has 12"),
    (v2(0x21, 0x31, bytes(215)), "215 bytes of addresses; family 3 has 216"),
    (v2(0x21, 0x11, b"", length=4097), f"a header of 4113 bytes; at most {V2_MAXIMUM_BYTES}"),
    (v2(0x21, 0x11, IPV4 + b"\x04\0"), "a TLV is cut off"),
    (v2(0x21, 0x11, IPV4 + b"\x04\0\x09abc"), "a TLV is longer than the header"),
]


@pytest.mark.parametrize(("data", "header"), GOOD)
def test_a_good_header_is_read_wherever_it_is_split_and_nothing_beyond_it(data: bytes, header: Header) -> None:
    assert header.size_bytes == len(data)
    for rest in (b"", b"GET / HTTP/1.1\r\n", b"\r\n"):
        assert read_header(data + rest) == header
    for size in range(len(data)):
        assert read_header(data[:size]) == Incomplete()


@pytest.mark.parametrize(("data", "problem"), BAD)
def test_a_bad_header_is_an_error_that_says_what(data: bytes, problem: str) -> None:
    with pytest.raises(ProxyError) as caught:
        read_header(data)
    assert problem in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1", b"PROXX", b"\r\n\r\nGET", b"\x16\x03\x01", b"PROPFIND /"])
def test_what_is_no_header_is_told_apart_as_soon_as_it_can_be(data: bytes) -> None:
    assert read_header(data) == Absent()


ADDRESSES = st.one_of(
    st.tuples(st.ip_addresses(v=4).map(str), st.integers(0, 65535)),
    st.tuples(st.ip_addresses(v=6).map(str), st.integers(0, 65535)),
)


@given(ADDRESSES, ADDRESSES, st.sampled_from([encode_v1, encode_v2]))
def test_what_is_written_is_read(source: tuple[str, int], destination: tuple[str, int], encode: object) -> None:
    data = encode(source, destination)  # type: ignore[operator]
    assert len(data) <= V1_MAXIMUM_BYTES
    found = read_header(data)
    assert isinstance(found, Header)
    for one, sent in ((found.source, source), (found.destination, destination)):
        assert one is not None
        read, given_address = ipaddress.ip_address(one[0]), ipaddress.ip_address(sent[0])
        mapped = getattr(given_address, "ipv4_mapped", None) or given_address
        assert one[1] == sent[1]
        assert read == mapped


def test_without_addresses_a_header_says_so() -> None:
    assert read_header(encode_v1(None, None)) == Header(15)
    assert read_header(encode_v2(A4, None)) == Header(16)
    assert read_header(LOCAL_V2) == Header(16)


@given(st.binary(max_size=300), st.sampled_from([b"", b"PROXY ", b"PROXY TCP4 ", SIGNATURE, SIGNATURE + b"\x21\x11"]))
def test_garbage_is_an_error_and_nothing_else(data: bytes, prefix: bytes) -> None:
    try:
        found = read_header(prefix + data)
    except ProxyError:
        return
    if isinstance(found, Header):
        assert 0 < found.size_bytes <= len(prefix + data)
