"""Looking names up, off the loop: `getaddrinfo` may take as long as it likes."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
import threading
from collections.abc import Callable
from typing import NamedTuple

MAXIMUM_THREADS = 8
"""So many names are looked up at once; the others wait."""

LookUp = Callable[[str], list[str]]
"""The addresses of a host. Blocks. Raises OSError, UnicodeError."""


def look_up(host: str) -> list[str]:
    """As everything on this machine does, by its nsswitch.conf. Raises OSError, UnicodeError (no IDNA)."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]


class _Question(NamedTuple):
    host: str
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[list[str]]


class Resolver:
    """Its threads are daemons: an end of the process does not wait for a server that does not answer."""

    def __init__(self, look_up: LookUp = look_up) -> None:
        self._look_up = look_up
        self._questions: queue.SimpleQueue[_Question | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._open = 0
        """Questions without an answer."""

    def ask(self, host: str) -> asyncio.Future[list[str]]:
        """The future has the addresses, or OSError or UnicodeError."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[str]] = loop.create_future()
        self._open += 1
        answer.add_done_callback(self._count)
        if len(self._threads) < min(self._open, MAXIMUM_THREADS):
            self._threads.append(threading.Thread(target=self._work, name="names", daemon=True))
            self._threads[-1].start()
        self._questions.put(_Question(host, loop, answer))
        return answer

    def close(self) -> None:
        for _ in self._threads:
            self._questions.put(None)

    def _count(self, _: asyncio.Future[list[str]]) -> None:
        self._open -= 1

    def _work(self) -> None:
        while (question := self._questions.get()) is not None:
            try:
                found: list[str] | Exception = self._look_up(question.host)
            except (OSError, UnicodeError) as error:
                found = error
            with contextlib.suppress(RuntimeError):  # the loop is closed
                question.loop.call_soon_threadsafe(_answer, question.answer, found)


def _answer(future: asyncio.Future[list[str]], found: list[str] | Exception) -> None:
    if future.done():  # nobody waits any more
        return
    if isinstance(found, Exception):
        future.set_exception(found)
    else:
        future.set_result(found)
