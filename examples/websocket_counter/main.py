"""A counter for each WebSocket that goes on counting when the connection moves to a new worker.

handoff run main:app --chdir examples/websocket_counter --bind 127.0.0.1:8000 --websockets hand-over

What the application leaves in the state of its scope, its successor in the new worker finds there.
"""

from __future__ import annotations

from typing import Any

PAGE = b"Hello! Connect with a WebSocket, and each message is answered with its number.\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await count(scope, receive, send)
    elif scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(PAGE))]})
        await send({"type": "http.response.body", "body": PAGE})


async def count(scope: Any, receive: Any, send: Any) -> None:
    state = scope["extensions"]["handoff"]["state"]  # JSON; empty for a connection that is new
    await receive()  # websocket.connect, also for one that moved here
    await send({"type": "websocket.accept"})  # says nothing to a client that was accepted already
    while (await receive())["type"] == "websocket.receive":
        state["count"] = state.get("count", 0) + 1
        await send({"type": "websocket.send", "text": str(state["count"])})
