"""Backends that are called by a name: looked up off the loop; the last good answer is kept."""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
from collections.abc import Callable
from functools import partial

from lb.relay.loop import READ, Loop
from lb.relay.targets import Address, Target, look_up

RETRY_SECONDS = 5.0

_LOG = logging.getLogger("handoff.lb")


class Names:
    """One thread, started with the first name. `on_found` is called on the loop when a target has its address."""

    def __init__(self, loop: Loop, on_found: Callable[[], None]) -> None:
        self._loop, self._on_found = loop, on_found
        self._asked: set[Target] = set()
        self._questions: queue.SimpleQueue[Target | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Target, Address | OSError]] = queue.SimpleQueue()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._thread: threading.Thread | None = None

    def ask(self, target: Target) -> None:
        if target in self._asked or not target.is_listed:
            return
        self._asked.add(target)
        if self._thread is None:
            self._loop.watch(self._wake_reader.fileno(), READ, self._answered)
            self._thread = threading.Thread(target=self._work, name="names", daemon=True)
            self._thread.start()
        self._questions.put(target)

    def _work(self) -> None:
        while (target := self._questions.get()) is not None:
            try:
                answer: Address | OSError = look_up(target.endpoint.address)
            except OSError as error:
                answer = error
            self._answers.put((target, answer))
            with contextlib.suppress(BlockingIOError):
                self._wake_writer.send(b"\0")

    def _answered(self, _mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_reader.recv(4096)
        while not self._answers.empty():
            target, answer = self._answers.get()
            self._asked.discard(target)
            if isinstance(answer, OSError):
                _LOG.warning("%s: its name is not known: %s", target.endpoint.identity, answer.strerror)
                self._loop.timers.call_at(self._loop.now + RETRY_SECONDS, partial(self.ask, target))
            else:
                target.address = answer
        self._on_found()
