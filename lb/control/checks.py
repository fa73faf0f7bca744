"""One check of one backend: over TCP alone, or with an HTTP request. Bounded in time and in what is read."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import time
from typing import NamedTuple

import h11

from handoff.addresses import Bind, parse_bind
from handoff.core.proxy_protocol import LOCAL_V2, encode_v1
from handoff.version import __version__
from lb.core.model import Check, SendProxy
from lb.core.standing import Outcome

MAXIMUM_HEAD_BYTES = 16 * 1024
MAXIMUM_BODY_BYTES = 256 * 1024
"""The text that is looked for must stand within."""
_READ_BYTES = 16 * 1024

_HEADERS: dict[SendProxy, bytes] = {"off": b"", "v1": encode_v1(None, None), "v2": LOCAL_V2}


class Result(NamedTuple):
    outcome: Outcome
    reason: str
    """`passed in 2 ms`, `connection refused`, `status 503`."""
    seconds: float


class _Failure(Exception):
    """Why, in a few words."""


async def check_backend(check: Check, address: str, send_proxy: SendProxy) -> Result:
    """Asks the backend once. Raises nothing but cancellation."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(check.timeout_seconds):
            await _ask(check, target_of(address, check.port), _HEADERS[send_proxy])
    except TimeoutError:
        reason = f"no answer within {check.timeout_seconds:g} s"
    except _Failure as failure:
        reason = str(failure)
    except h11.RemoteProtocolError as error:
        reason = f"no HTTP: {error}"
    except OSError as error:
        reason = reason_of(error)
    else:
        seconds = time.monotonic() - began
        return Result(Outcome.PASSED, f"passed in {seconds * 1000:.0f} ms", seconds)
    return Result(Outcome.FAILED, reason, time.monotonic() - began)


def target_of(address: str, port: int | None) -> Bind:
    """Where to ask: another port counts for TCP only."""
    bind = parse_bind(address)
    return Bind(kind="tcp", host=bind.host, port=port) if port is not None and bind.kind == "tcp" else bind


def reason_of(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return "its name is not known"
    text = os.strerror(error.errno) if error.errno else str(error)
    return text[:1].lower() + text[1:]


async def _ask(check: Check, target: Bind, header: bytes) -> None:
    reader, writer = await _connect(target)
    try:
        if header:
            writer.write(header)
        if check.type == "http":
            await _ask_http(check, target, reader, writer)
    except BaseException:
        writer.transport.abort()
        raise
    finally:
        writer.close()
    with contextlib.suppress(OSError):  # it answered well; how it hangs up is its own affair
        await writer.wait_closed()


async def _connect(target: Bind) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
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


async def _ask_http(check: Check, target: Bind, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAXIMUM_HEAD_BYTES)
    headers = [
        ("Host", check.host or _host_of(target)),
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
                raise _Failure("closed without an answer")
            connection.receive_data(data)
        elif isinstance(event, h11.Response):
            low, high = check.status
            if not low <= event.status_code <= high:
                raise _Failure(f"status {event.status_code}")
            if check.body is None:
                return
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
            if check.body is not None and check.body.encode() in body:
                return
            if len(body) >= MAXIMUM_BODY_BYTES:
                raise _Failure(f"body: {check.body!r} is not in its first {MAXIMUM_BODY_BYTES} bytes")
        elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
            raise _Failure(f"body: {check.body!r} is not in it")


def _host_of(target: Bind) -> str:
    if target.kind == "unix":
        return "localhost"
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(target.host).version == 6:
            return f"[{target.host}]:{target.port}"
    return f"{target.host}:{target.port}"
