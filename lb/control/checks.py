"""One check of one backend: over TCP alone, with a TLS handshake, or with HTTP requests. Bounded in time and in what is
read."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator
from typing import NamedTuple

import h11
import msgspec

from handoff.addresses import Bind, parse_bind
from handoff.core.proxy_protocol import LOCAL_V2, encode_v1
from handoff.version import __version__
from lb.control.tls import Contexts
from lb.core.model import Check, SendProxy
from lb.core.standing import Outcome

MAXIMUM_HEAD_BYTES = 16 * 1024
MAXIMUM_BODY_BYTES = 256 * 1024
"""The text that is looked for must stand within."""
_READ_BYTES = 16 * 1024
_GOODBYE_SECONDS = 0.5
"""For a backend that has answered well to end its TLS; then it is cut off."""

_HEADERS: dict[SendProxy, bytes] = {"off": b"", "v1": encode_v1(None, None), "v2": LOCAL_V2}

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Result(NamedTuple):
    outcome: Outcome
    reason: str
    """`passed in 2 ms`, `connection refused`, `status 503`."""
    seconds: float


class Asked(NamedTuple):
    """Whom a check is about."""

    check: Check
    target: Bind
    typed: str
    """The backend's address as it is configured: a name, perhaps."""
    header: bytes
    tls: Contexts


class Failure(Exception):
    """Why, in a few words."""


async def check_backend(
    check: Check, address: str, send_proxy: SendProxy, typed: str | None = None, tls: Contexts | None = None
) -> Result:
    """Asks the backend once. `typed`: its address as it is configured. Raises nothing but cancellation."""
    asked = Asked(check, target_of(check, address), typed or address, _HEADERS[send_proxy], tls or Contexts())
    began = time.monotonic()
    reason = await _reason(asked, check.timeout_seconds)
    seconds = time.monotonic() - began
    if reason is None:
        return Result(Outcome.PASSED, f"passed in {seconds * 1000:.0f} ms", seconds)
    return Result(Outcome.FAILED, reason, seconds)


async def warm_up(
    check: Check, address: str, send_proxy: SendProxy, typed: str | None = None, tls: Contexts | None = None
) -> Result:
    """Sends the warm-up requests, one after another. They pass with what passes for the check; a body is not looked at.
    Raises nothing but cancellation."""
    began = time.monotonic()
    for path in check.warm_up:
        one = msgspec.structs.replace(check, method="GET", path=path, body=None)
        asked = Asked(one, target_of(check, address), typed or address, _HEADERS[send_proxy], tls or Contexts())
        reason = await _reason(asked, check.warm_up_timeout_seconds)
        if reason is not None:
            return Result(Outcome.FAILED, f"warm-up {path}: {reason}", time.monotonic() - began)
    seconds = time.monotonic() - began
    return Result(Outcome.PASSED, f"passed, warmed up in {seconds * 1000:.0f} ms", seconds)


async def _reason(asked: Asked, timeout_seconds: float) -> str | None:
    """Why it failed; None: it passed."""
    try:
        async with asyncio.timeout(timeout_seconds) as deadline:
            async with _connected(asked, deadline) as (reader, writer):
                if asked.check.type == "http":
                    await _ask_http(asked, reader, writer)
    except TimeoutError:
        return f"no answer within {timeout_seconds:g} s"
    except Failure as failure:
        return str(failure)
    except h11.RemoteProtocolError as error:
        return f"no HTTP: {error}"
    except OSError as error:
        return reason_of(error)
    return None


def target_of(check: Check, address: str) -> Bind:
    """Where to ask: another address, another port; for TCP only."""
    bind = parse_bind(address)
    if bind.kind != "tcp":
        return bind
    return Bind(kind="tcp", host=check.address or bind.host, port=check.port or bind.port)


def reason_of(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return "its name is not known"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {(error.reason or str(error)).lower().replace('_', ' ')}"
    text = os.strerror(error.errno) if error.errno else str(error)
    return text[:1].lower() + text[1:] if text else "closed without an answer"


@contextlib.asynccontextmanager
async def _connected(asked: Asked, deadline: asyncio.Timeout) -> AsyncIterator[Streams]:
    """A connection, with a PROXY header and with TLS where they belong; closed politely once all went well."""
    check = asked.check
    has_tls = check.type == "tls" or check.tls
    reader, writer = await (_connect_tls(asked) if has_tls else connect(asked.target))
    try:
        if asked.header and not has_tls:
            writer.write(asked.header)
        yield reader, writer
    except BaseException:
        writer.transport.abort()
        raise
    finally:
        writer.close()
    deadline.reschedule(None)  # it answered well; how it hangs up is its own affair
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(_GOODBYE_SECONDS if has_tls else check.timeout_seconds):
            await writer.wait_closed()
    writer.transport.abort()


async def connect(target: Bind) -> Streams:
    """Raises OSError."""
    if target.kind != "unix":
        return await asyncio.open_connection(target.host, target.port, limit=_READ_BYTES)
    # Not asyncio's own connect: unix(7) says EAGAIN where the backlog is full, which that takes for "in progress".
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        made.connect(target.path)
        return await asyncio.open_unix_connection(sock=made, limit=_READ_BYTES)
    except BaseException:
        made.close()
        raise


async def _connect_tls(asked: Asked) -> Streams:
    """The PROXY header goes ahead of the handshake. Raises OSError, of which ssl.SSLError is one."""
    context, target, loop = asked.tls.of(asked.check), asked.target, asyncio.get_running_loop()
    family = socket.AF_UNIX if target.kind == "unix" else socket.AF_INET6 if ":" in target.host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        await loop.sock_connect(made, target.path if target.kind == "unix" else (target.host, target.port))
        if asked.header:
            await loop.sock_sendall(made, asked.header)
        name = _server_name(asked)
        return await asyncio.open_connection(sock=made, ssl=context, server_hostname=name or "", limit=_READ_BYTES)
    except BaseException:
        made.close()
        raise


def _server_name(asked: Asked) -> str | None:
    """Whose certificate is expected; an address goes into no SNI. None: nobody's in particular."""
    check, typed = asked.check, parse_bind(asked.typed)
    if check.sni is not None:
        return check.sni
    if check.host is not None:
        return check.host.rpartition(":")[0] if check.host.rpartition(":")[2].isdigit() else check.host.strip("[]")
    host = typed.host if typed.kind == "tcp" else "localhost"
    return host if check.verify or not _version(host) else None


async def _ask_http(asked: Asked, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    check = asked.check
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAXIMUM_HEAD_BYTES)
    headers = [
        ("Host", check.host or _host_of(asked)),
        ("User-Agent", f"handoff-lb/{__version__}"),
        ("Accept", "*/*"),
        ("Connection", "close"),
    ]
    head = connection.send(h11.Request(method=check.method, target=check.path, headers=headers))
    end = connection.send(h11.EndOfMessage())
    writer.write((head or b"") + (end or b""))
    body = b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            data = await reader.read(_READ_BYTES)
            if not data and connection.their_state is not h11.SEND_BODY:
                raise Failure("closed without an answer")
            connection.receive_data(data)
        elif isinstance(event, h11.Response):
            low, high = check.status
            if not low <= event.status_code <= high:
                raise Failure(f"status {event.status_code}")
            if check.body is None:
                return
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
            if check.body is not None and check.body.encode() in body:
                return
            if len(body) >= MAXIMUM_BODY_BYTES:
                raise Failure(f"body: {check.body!r} is not in its first {MAXIMUM_BODY_BYTES} bytes")
        elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
            raise Failure(f"body: {check.body!r} is not in it")


def _host_of(asked: Asked) -> str:
    """The backend as it is called; its address where it has no name."""
    target, typed = asked.target, parse_bind(asked.typed)
    if target.kind == "unix":
        return "localhost"
    host = typed.host if typed.kind == "tcp" and not _version(typed.host) else target.host
    return f"[{host}]:{target.port}" if _version(host) == 6 else f"{host}:{target.port}"


def _version(host: str) -> int:
    """4, 6; 0: it is a name."""
    try:
        return ipaddress.ip_address(host).version
    except ValueError:
        return 0
