"""ClientHellos, real and made by hand, in whatever pieces they come."""

from __future__ import annotations

import ssl
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lb.core.client_hello import (
    MAXIMUM_HELLO_BYTES,
    ClientHello,
    ClientHelloReader,
    Incomplete,
    Malformed,
    NotTLS,
    Reading,
    read_client_hello,
)
from tests.unit.client_hellos import extension, hello_body, in_records, made_by_openssl, message, sni_of

VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


def fed(*pieces: bytes) -> Reading:
    reader = ClientHelloReader()
    reading: Reading = Incomplete()
    for piece in pieces:
        reading = reader.feed(piece)
        if not isinstance(reading, Incomplete):
            break
    return reading


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("sni", "alpn", "expected"),
    [
        ("api.Example.com", (), ClientHello("api.example.com")),
        ("shop.example", ("h2", "http/1.1"), ClientHello("shop.example", ("h2", "http/1.1"))),
        (None, ("acme-tls/1",), ClientHello(None, ("acme-tls/1",))),
        (None, (), ClientHello()),
    ],
)
def test_a_real_one_is_read_once_it_is_complete_wherever_it_is_cut(
    version: ssl.TLSVersion, sni: str | None, alpn: tuple[str, ...], expected: ClientHello
) -> None:
    data = made_by_openssl(sni, alpn, version)
    for at in range(len(data)):
        assert read_client_hello(data[:at]) == Incomplete(), at
        assert fed(data[:at], data[at:]) == expected, at
    assert fed(*(data[at : at + 1] for at in range(len(data)))) == expected
    assert read_client_hello(data + b"what comes next") == expected


@given(st.data())
def test_records_may_cut_it_anywhere_and_tcp_the_records(data: st.DataObject) -> None:
    body = message(hello_body(sni_of(b"api.example.com"), extension(16, b"\0\3\2h2")))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(body) - 1), max_size=len(body) - 1)))
    stream = in_records(*(body[begin:end] for begin, end in pairwise([0, *cuts, len(body)])))
    pieces = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=20)))
    reader = ClientHelloReader()
    *first, last = [stream[begin:end] for begin, end in pairwise([0, *pieces, len(stream)])]
    assert [reader.feed(one) for one in first] == [Incomplete()] * len(first)
    assert reader.feed(last) == ClientHello("api.example.com", ("h2",))


def test_a_real_one_in_records_of_one_byte() -> None:
    data = made_by_openssl("api.example.com", ("h2",))
    stream = in_records(*(data[at : at + 1] for at in range(5, len(data))))
    assert read_client_hello(stream) == ClientHello("api.example.com", ("h2",))
    assert read_client_hello(stream[:-1]) == Incomplete()


@given(st.binary(max_size=600), st.lists(st.integers(0, 600), max_size=10))
def test_nonsense_is_never_an_error_and_pieces_make_no_difference(data: bytes, cuts: list[int]) -> None:
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    whole = read_client_hello(data)
    assert isinstance(whole, Incomplete | NotTLS | Malformed | ClientHello)
    assert fed(*(data[begin:end] for begin, end in pairwise(places))) == whole


@given(st.data())
def test_a_real_one_with_bytes_changed_is_never_an_error(data: st.DataObject) -> None:
    changed = bytearray(made_by_openssl("api.example.com", ("h2",)))
    for at in data.draw(st.sets(st.integers(0, len(changed) - 1), min_size=1, max_size=4)):
        changed[at] = data.draw(st.integers(0, 255))
    reading = read_client_hello(bytes(changed))
    assert isinstance(reading, Incomplete | NotTLS | Malformed | ClientHello)
    if isinstance(reading, ClientHello):
        assert reading.sni is None or reading.sni.isascii()


@pytest.mark.parametrize(
    "data",
    [b"G", b"GET / HTTP/1.1\r\n", b"\0", b"SSH-2.0-OpenSSH_9.2\r\n", b"\x16\x02", b"\x15\x03\x01", b"\x80\x2e\x01"],
)
def test_another_protocol_is_told_by_its_first_bytes(data: bytes) -> None:
    assert read_client_hello(data) == NotTLS()


def test_grease_and_what_is_not_known_is_passed_over() -> None:
    body = hello_body(
        extension(0x0A0A), extension(0x1A1A, b"\0"), sni_of(b"a.example"), extension(16, b"\0\6\2\x0a\x0a\2h2")
    )
    assert read_client_hello(in_records(message(body))) == ClientHello("a.example", ("\x0a\x0a", "h2"))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (hello_body(extensions=None), ClientHello()),
        (hello_body(), ClientHello()),
        (hello_body(sni_of(b"EXAMPLE.com.")), ClientHello("example.com")),
        (hello_body(extension(0, b"\0\6\7\0\3xyz")), ClientHello()),
        (hello_body(sni_of(b"")), Malformed("an SNI that is no name")),
        (hello_body(sni_of(b".")), Malformed("an SNI that is no name")),
        (hello_body(sni_of(b".a")), Malformed("an SNI that is no name")),
        (hello_body(sni_of(b"a b")), Malformed("an SNI that is no name")),
        (hello_body(sni_of(b"a\0b")), Malformed("an SNI that is no name")),
        (hello_body(sni_of("ä.example".encode())), Malformed("an SNI that is no name")),
        (hello_body(sni_of(b"a" * 256)), Malformed("an SNI that is no name")),
        (hello_body(sni_of(b"a", b"b")), Malformed("an SNI with two names")),
        (hello_body(sni_of(b"a"), sni_of(b"b")), Malformed("a ClientHello with two extensions of type 0")),
        (hello_body(extension(0, b"\0\4\0\0\1ab")), Malformed("an SNI with something after its end")),
        (hello_body(extension(16, b"\0\1\0")), Malformed("an ALPN that is no list of protocols")),
        (hello_body(extension(16, b"\0\3\2h2x")), Malformed("an ALPN that is no list of protocols")),
        (hello_body(extension(16, b"\0\3\3h2")), Malformed("a ClientHello with a length beyond its end")),
        (hello_body() + b"x", Malformed("a ClientHello with something after its end")),
        (b"\3\3", Malformed("a ClientHello with a length beyond its end")),
        (b"", Malformed("a ClientHello with a length beyond its end")),
    ],
)
def test_what_a_message_may_hold(body: bytes, expected: Reading) -> None:
    assert read_client_hello(in_records(message(body))) == expected


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x16\3\1\0\0", "a record of 0 bytes"),
        (b"\x16\3\1\x40\1", "a record of 16385 bytes"),
        (in_records(b"\2\0\0\1x"), "a handshake that begins with a message of type 2"),
        (in_records(b"\1\0\0") + b"\x15\3\1\0\2\1\0", "a record that is no handshake"),
        (in_records(b"\1\xff\xff\xff"), "a ClientHello of 16777219 bytes; at most 16384"),
    ],
)
def test_what_begins_as_tls_and_goes_on_otherwise(data: bytes, reason: str) -> None:
    assert read_client_hello(data) == Malformed(reason)


def test_more_than_the_limit_is_not_waited_for() -> None:
    body = message(hello_body(extension(21, bytes(MAXIMUM_HELLO_BYTES - 100)), sni_of(b"a.example")))
    assert len(body) < MAXIMUM_HELLO_BYTES
    assert read_client_hello(in_records(body[:9000], body[9000:])) == ClientHello("a.example")
    small = in_records(*(body[at : at + 100] for at in range(0, len(body), 100)))
    too_much = Malformed("a ClientHello of more than 16384 bytes")
    assert fed(*(small[at : at + 1000] for at in range(0, len(small), 1000))) == too_much
    assert fed(small[:MAXIMUM_HELLO_BYTES]) == too_much
    assert fed(small[: MAXIMUM_HELLO_BYTES - 1]) == Incomplete()
