"""`bench.apps.hello`, and how long its event loop once stood still: a line for each worker in BENCH_DIR/stalls."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from bench.apps import hello

_TICK_SECONDS = 0.002


class Ticking:
    """Asks to be called all the time; whatever comes later than asked for is a stall, by the clock of the wall."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.longest_seconds = 0.0
        self._then = time.monotonic()
        self._handle = self._loop.call_later(_TICK_SECONDS, self._tick)

    def _tick(self) -> None:
        now = time.monotonic()
        self.longest_seconds = max(self.longest_seconds, now - self._then - _TICK_SECONDS)
        self._then = now
        self._handle = self._loop.call_later(_TICK_SECONDS, self._tick)

    def stop(self) -> None:
        self._handle.cancel()


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] != "lifespan":
        await hello.app(scope, receive, send)
        return
    await receive()
    ticking = Ticking()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    ticking.stop()
    with (Path(os.environ["BENCH_DIR"]) / "stalls").open("a") as file:
        file.write(f"{hello.VERSION} {ticking.longest_seconds * 1000:.1f}\n")
    await send({"type": "lifespan.shutdown.complete"})
