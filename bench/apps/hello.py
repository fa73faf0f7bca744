"""What every server serves: `app` is ASGI, `wsgi` is WSGI. BOOT_SLEEP and BOOT_SPIN make importing slow."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

HELLO = b"Hello from the bench!\n"
STREAM_CHUNKS = 30
STREAM_PAUSE_SECONDS = 0.1


def stream_chunk(number: int) -> bytes:
    return b"%06d\n" % number * 16


time.sleep(float(os.environ.get("BOOT_SLEEP", "0")))
_until = time.perf_counter() + float(os.environ.get("BOOT_SPIN", "0"))
while time.perf_counter() < _until:
    pass


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
            await send({"type": "http.response.body", "body": stream_chunk(number), "more_body": True})
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
        yield stream_chunk(number)
        time.sleep(STREAM_PAUSE_SECONDS)
