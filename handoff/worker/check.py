"""A worker's requests to itself, through the real protocol stack, before it says that it is ready."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from urllib.parse import urlsplit

from handoff.version import __version__
from handoff.worker.load import BootFailure

MAXIMUM_ANSWER_BYTES = 64 * 1024
"""How much of an answer is read for the reason of a failure; the rest is drained."""
_SHOWN_CHARACTERS = 300


async def request_self(
    protocol_factory: Callable[[], asyncio.BaseProtocol], target: str, subject: str, timeout_seconds: float
) -> None:
    """GET `target` (a path, or a URL whose host becomes the Host header) from a connection of our own.

    Raises BootFailure unless the answer is whole, in time, and its status below 400.
    """
    try:
        async with asyncio.timeout(timeout_seconds):
            status, body = await _get(protocol_factory, target)
    except TimeoutError:
        raise BootFailure(f"{subject} {target}: no answer within {timeout_seconds:g} s") from None
    except (OSError, ValueError, EOFError) as error:
        raise BootFailure(f"{subject} {target}: no whole answer: {error or type(error).__name__}") from None
    if status >= 400:
        shown = " ".join(body.decode(errors="replace").split())[:_SHOWN_CHARACTERS]
        raise BootFailure(f"{subject} {target}: answered {status}: {shown}")


async def _get(protocol_factory: Callable[[], asyncio.BaseProtocol], target: str) -> tuple[int, bytes]:
    loop = asyncio.get_running_loop()
    ours, theirs = _tcp_pair()
    try:
        transport, _ = await loop.connect_accepted_socket(protocol_factory, theirs)
    except BaseException:
        ours.close()
        theirs.close()
        raise
    reader, writer = await asyncio.open_connection(sock=ours)
    try:
        writer.write(_request(target))
        status_line = await reader.readline()
        status = int(status_line.split()[1]) if status_line.startswith(b"HTTP/") else 0
        if not status:
            raise EOFError(f"not HTTP: {status_line[:80]!r}")
        answer = b""
        while chunk := await reader.read(MAXIMUM_ANSWER_BYTES):
            answer = (answer + chunk)[:MAXIMUM_ANSWER_BYTES]
        return status, _body(answer)
    finally:
        writer.close()
        transport.close()


def _request(target: str) -> bytes:
    url = urlsplit(target)
    path = (url.path or "/") + (f"?{url.query}" if url.query else "")
    lines = [
        f"GET {path} HTTP/1.1",
        f"Host: {url.netloc or 'localhost'}",
        f"User-Agent: handoff-check/{__version__}",
        "Accept: */*",
        "Connection: close",
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _body(answer: bytes) -> bytes:
    """The body of an answer that was read up to its end, or to the limit; without the sizes of its chunks."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" not in head.lower():
        return rest
    body = b""
    while rest:
        size_line, _, rest = rest.partition(b"\r\n")
        size = int(size_line.partition(b";")[0], 16)
        body, rest = body + rest[:size], rest[size + 2 :]
    return body


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection on loopback: applications may look at the client's address."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        ours = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        ours.connect(listener.getsockname())
        while True:
            theirs, address = listener.accept()
            if address == ours.getsockname():
                break
            theirs.close()  # somebody else was quicker
    ours.setblocking(False)
    theirs.setblocking(False)
    return ours, theirs
