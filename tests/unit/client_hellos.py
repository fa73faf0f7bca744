"""ClientHellos for tests: as OpenSSL makes them, and put together by hand."""

from __future__ import annotations

import contextlib
import functools
import ssl


@functools.cache
def made_by_openssl(
    sni: str | None = None, alpn: tuple[str, ...] = (), version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> bytes:
    """What a client sends first, of this version and no other."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    if alpn:
        context.set_alpn_protocols(alpn)
    sent = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=sni)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return sent.read()


def vector(data: bytes, size: int) -> bytes:
    """With its length ahead, in so many bytes."""
    return len(data).to_bytes(size) + data


def extension(kind: int, data: bytes = b"") -> bytes:
    return kind.to_bytes(2) + vector(data, 2)


def sni_of(*names: bytes) -> bytes:
    return extension(0, vector(b"".join(b"\0" + vector(name, 2) for name in names), 2))


def hello_body(*parts: bytes, extensions: bool | None = True) -> bytes:
    """`extensions`: None: not even an empty list of them."""
    head = b"\3\3" + bytes(32) + vector(b"", 1) + vector(b"\x13\x01", 2) + vector(b"\0", 1)
    return head if extensions is None else head + vector(b"".join(parts), 2)


def message(body: bytes) -> bytes:
    """Of a handshake: a ClientHello."""
    return b"\1" + vector(body, 3)


def in_records(*fragments: bytes) -> bytes:
    return b"".join(b"\x16\3\1" + vector(one, 2) for one in fragments)
