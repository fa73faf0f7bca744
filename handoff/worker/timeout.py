"""`--request-timeout`: a request that is not answered in time gets 504, or its connection ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_BODY = b"Gateway Timeout"


class RequestTimeout:
    """An ASGI 3 application around another. The time counts to the end of the response; WebSockets have none."""

    def __init__(self, application: Application, seconds: float) -> None:
        self._application = application
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        has_started = False

        async def watched_send(message: MutableMapping[str, Any]) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            async with asyncio.timeout(self._seconds) as timeout:
                await self._application(scope, receive, watched_send)
        except TimeoutError:
            # Not ours, or too late for another answer: uvicorn logs it and ends the connection.
            if has_started or not timeout.expired():
                raise
            headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(_BODY))]
            await send({"type": "http.response.start", "status": 504, "headers": headers})
            await send({"type": "http.response.body", "body": _BODY})
