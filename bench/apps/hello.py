"""What every server serves: `app` is ASGI, `wsgi` is WSGI. BOOT_SLEEP and BOOT_SPIN make importing slow.

Every body begins with six digits, the version, and has one right content for each version.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from bench.apps import deployed

STREAM_CHUNKS = 30
STREAM_PAUSE_SECONDS = 0.1


def hello_body(version: int) -> bytes:
    return b"%06d Hello from the bench!\n" % version


def stream_chunk(version: int, number: int) -> bytes:
    return b"%06d %06d\n" % (version, number) * 8


def stream_body(version: int) -> bytes:
    return b"".join(stream_chunk(version, number) for number in range(STREAM_CHUNKS))


VERSION = deployed.version()
HELLO = hello_body(VERSION)
time.sleep(float(os.environ.get("BOOT_SLEEP", "0")))
_until = time.perf_counter() + float(os.environ.get("BOOT_SPIN", "0"))
while time.perf_counter() < _until:
    pass
deployed.announce(VERSION)


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    path = scope["path"]
    if path == "/slow":
        await asyncio.sleep(float(scope["query_string"] or b"1"))
    if path == "/stream":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(STREAM_CHUNKS):
            await send({"type": "http.response.body", "body": stream_chunk(VERSION, number), "more_body": True})
            await asyncio.sleep(STREAM_PAUSE_SECONDS)
        await send({"type": "http.response.body", "body": b""})
        return
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(HELLO))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": HELLO})


def wsgi(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    path = environ["PATH_INFO"]
    if path == "/slow":
        time.sleep(float(environ["QUERY_STRING"] or "1"))
    if path == "/stream":
        start_response("200 OK", [("content-type", "text/plain")])
        return _stream()
    start_response("200 OK", [("content-type", "text/plain"), ("content-length", str(len(HELLO)))])
    return [HELLO]


def _stream() -> Iterator[bytes]:
    for number in range(STREAM_CHUNKS):
        yield stream_chunk(VERSION, number)
        time.sleep(STREAM_PAUSE_SECONDS)
