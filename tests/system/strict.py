"""Clients that forgive nothing: none tries again, and each failure, and each connection that is closed, is kept."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Self

from tests.system.harness import DEADLINE_SECONDS, read_response

PACE_SECONDS = 0.05
Address = tuple[str, int]
Exchange = Callable[[], None]


class StrictClients:
    """Threads that ask, each on and on at one of the addresses. A context manager.

    `new`: each request on a connection of its own. `kept`: one connection for all requests, which nobody may close.
    `short`: some requests on a connection, which the client closes then.
    """

    REQUESTS = 20
    """Of a short connection."""

    def __init__(self, addresses: Sequence[Address], *, new: int = 2, kept: int = 0, short: int = 0) -> None:
        self._addresses = addresses
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self.answers: Counter[str] = Counter()
        """By what was said: `web1 v1`."""
        self.failures: list[str] = []
        """Requests without a good answer."""
        self.closed: list[str] = []
        """Kept connections that were closed between two requests, or announced to be."""
        self.last: dict[int, str] = {}
        """What each client of a kept connection heard last."""
        kinds = [self._new] * new + [self._kept] * kept + [self._short] * short
        self._threads = [
            threading.Thread(target=kind, args=(number, addresses[number % len(addresses)]))
            for number, kind in enumerate(kinds)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(DEADLINE_SECONDS)

    @property
    def done(self) -> int:
        return sum(self.answers.values()) + len(self.failures)

    def more(self, count: int) -> None:
        """Wait for so many more requests."""
        with self._changed:
            goal = self.done + count
            assert self._changed.wait_for(lambda: self.done >= goal, DEADLINE_SECONDS), "clients make no progress"

    def heard(self, *answers: str) -> None:
        """Wait until each of these was said."""
        with self._changed:
            assert self._changed.wait_for(lambda: set(answers) <= set(self.answers), DEADLINE_SECONDS), self.answers

    def versions(self) -> set[str]:
        return {answer.partition(" ")[2] for answer in self.answers}

    def forget(self) -> None:
        """From now on anew."""
        with self._changed:
            self.answers.clear()

    def assert_none_failed(self) -> None:
        assert self.done > 0
        assert not self.failures, f"{len(self.failures)} of {self.done} failed: {self.failures[:5]}"
        assert not self.closed, self.closed

    # --- one client -------------------------------------------------------------------------------------------------

    def _new(self, number: int, address: Address) -> None:
        while not self._stop.wait(PACE_SECONDS):
            with self._judged("new"), _connected(address) as connection:
                self._ask(connection, "Connection: close\r\n")

    def _short(self, number: int, address: Address) -> None:
        while not self._stop.is_set():
            with self._judged("short"), _connected(address) as connection:
                for _ in range(self.REQUESTS):
                    self._ask(connection, "")
                    self._stop.wait(PACE_SECONDS)

    def _kept(self, number: int, address: Address) -> None:
        while not self._stop.is_set():
            with self._judged("kept"), _connected(address) as connection:
                while not self._stop.wait(PACE_SECONDS):
                    if select.select([connection], [], [], 0)[0]:
                        with self._changed:
                            self.closed.append(f"between two requests, after {self.last.get(number)}")
                        break
                    self.last[number] = self._ask(connection, "")

    def _ask(self, connection: socket.socket, headers: str) -> str:
        connection.sendall(f"GET / HTTP/1.1\r\nHost: shop\r\n{headers}\r\n".encode())
        status, found, body = read_response(connection)
        if status != 200:
            raise ValueError(f"status {status}")
        answer = body.decode().strip()
        with self._changed:
            self.answers[answer] += 1
            if not headers and found.get("connection", "").lower() == "close":
                self.closed.append(f"announced by {answer}")
            self._changed.notify_all()
        return answer

    @contextlib.contextmanager
    def _judged(self, kind: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a strict client keeps whatever went wrong
            with self._changed:
                self.failures.append(f"{kind}: {type(error).__name__}: {error}")
                self._changed.notify_all()
            self._stop.wait(PACE_SECONDS)


def _connected(address: Address) -> contextlib.closing[socket.socket]:
    connection = socket.create_connection(address, DEADLINE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return contextlib.closing(connection)
