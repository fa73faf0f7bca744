"""`--metrics`: requests counted by status and duration. Without it none of this is in a request's path."""

from __future__ import annotations

import time
from bisect import bisect_left

from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, Scope
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from handoff.counters import (
    DURATION_BOUNDS,
    DURATION_NANOSECONDS,
    DURATIONS,
    FIRST_STATUS,
    STATUS_COUNT,
    STATUSES,
)
from handoff.worker.protocol import HTTPProtocol

CLIENT_CLOSED = 499
"""Shown for a request whose client went away before it was answered, as nginx does."""


class MeasuredHTTPProtocol(HTTPProtocol):
    """The same protocol; each request writes down how it ended in this worker's row of the shared page."""

    __slots__ = ()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        super()._start_asgi_task(cycle, _Measured(app, cycle, self.server_state.counters).run)

    def send_400_response(self, msg: str) -> None:
        super().send_400_response(msg)
        count(self.server_state.counters, 400)


class _Measured:
    """One request, from the end of its head to the end of its response. (What runs on after that is not counted.)"""

    __slots__ = ("_app", "_counters", "_cycle", "_is_counted", "_send", "_started_at", "_status")

    def __init__(self, app: ASGI3Application, cycle: RequestResponseCycle, counters: memoryview) -> None:
        self._app = app
        self._cycle = cycle
        self._counters = counters
        self._status = 0
        self._is_counted = False
        self._started_at = time.perf_counter_ns()

    async def run(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        self._send = send
        try:
            await self._app(scope, receive, self._watched_send)
        finally:
            if not self._is_counted:  # uvicorn answers 500 for an application that did not
                self._count(self._status or (CLIENT_CLOSED if self._cycle.disconnected else 500))

    async def _watched_send(self, message: ASGISendEvent) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            await self._send(message)
            return
        await self._send(message)
        if self._cycle.response_complete and not self._is_counted:
            self._count(self._status)

    def _count(self, status: int) -> None:
        self._is_counted = True
        count(self._counters, status)
        nanoseconds = time.perf_counter_ns() - self._started_at
        self._counters[DURATION_NANOSECONDS] += nanoseconds
        self._counters[DURATIONS + bisect_left(DURATION_BOUNDS, nanoseconds / 1e9)] += 1


def count(counters: memoryview, status: int) -> None:
    """One more answer with this status; one that is no status of HTTP counts as 500."""
    index = status - FIRST_STATUS if FIRST_STATUS <= status < FIRST_STATUS + STATUS_COUNT else 500 - FIRST_STATUS
    counters[STATUSES + index] += 1
