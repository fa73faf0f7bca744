"""A second port beside the application's: bound by handoff, so that a reload never finds it taken, and
served until the drain has ended, so that a reload loses no scrape.

handoff run main:app --chdir examples/metrics_port --bind web=127.0.0.1:8000 --bind metrics=127.0.0.1:9100
"""

from __future__ import annotations

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import handoff

answered = 0


class Metrics(BaseHTTPRequestHandler):
    timeout = 5  # seconds; a silent client must not keep the others waiting

    def do_GET(self) -> None:
        body = f"answered_total {answered}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not worth a line."""


def metrics_server() -> HTTPServer:
    server = HTTPServer(("127.0.0.1", 0), Metrics, bind_and_activate=False)
    server.socket.close()
    server.socket = handoff.listener("metrics")  # claimed: the application is not served on it
    return server


metrics = metrics_server()  # a listener is claimed while the application is imported


async def lifespan(receive: Any, send: Any) -> None:
    await receive()
    threading.Thread(target=metrics.serve_forever, args=(0.1,), daemon=True).start()
    await send({"type": "lifespan.startup.complete"})
    await receive()  # when the drain has ended
    await asyncio.to_thread(metrics.shutdown)  # waits for the scrape in progress
    await send({"type": "lifespan.shutdown.complete"})


async def app(scope: Any, receive: Any, send: Any) -> None:
    global answered
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
        return
    assert scope["type"] == "http"
    answered += 1
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"6")]})
    await send({"type": "http.response.body", "body": b"Hello\n"})
