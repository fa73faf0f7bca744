"""Running the description command of a service for a reload, while the service goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from handoff.description import Description
from handoff.errors import HandoffError
from handoff.master.loop import Loop, Order
from handoff.settings import Launch

Outcome = dict[str, Any] | HandoffError


class Describing:
    """At most one run at a time. Owns it."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._running: Description | None = None
        self._on_end: Callable[[Outcome], None] = lambda outcome: None

    def start(self, launch: Launch, on_end: Callable[[Outcome], None]) -> None:
        """`on_end` gets what was printed, or why there is nothing; it is not called after a `cancel`."""
        self.cancel()
        self._on_end = on_end
        try:
            self._running = Description(launch)
        except HandoffError as error:
            on_end(error)
            return
        self._loop.watch(self._running, Order.EXIT, self._ended)

    def pids(self) -> frozenset[int]:
        """Of the process that runs, if one does."""
        return frozenset(() if self._running is None else {self._running.pid})

    def next_deadline(self) -> float | None:
        return None if self._running is None else self._running.deadline

    def check(self, now: float) -> None:
        if self._running is not None and self._running.deadline <= now:
            self._ended()

    def cancel(self) -> None:
        if self._running is not None:
            self._loop.forget(self._running)
            self._running.kill()
            self._running = None

    def _ended(self) -> None:
        running, self._running = self._running, None
        assert running is not None
        self._loop.forget(running)
        try:
            outcome: Outcome = running.finish()
        except HandoffError as error:
            outcome = error
        self._on_end(outcome)
