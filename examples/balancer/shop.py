"""What stands behind the balancer: an ASGI application that says which one it is. See README.md."""

from __future__ import annotations

import os
from typing import Any

NAME = os.environ.get("HANDOFF_NAME", "shop")


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    assert scope["type"] == "http"
    body = b"ok\n" if scope["path"] == "/health" else f"this is {NAME}\n".encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
