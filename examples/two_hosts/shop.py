"""What is deployed. `stage` puts the version in the place of @VERSION@."""

from __future__ import annotations

from typing import Any

VERSION = "@VERSION@"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Says its version. Version `broken` answers its health check with 500."""
    if scope["type"] != "http":
        raise RuntimeError("only HTTP")
    status = 500 if scope["path"] == "/health" and VERSION == "broken" else 200
    body = f"{VERSION}\n".encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
