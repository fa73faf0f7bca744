"""The master's loop: one thread, one selector, and a fixed order inside a turn."""

from __future__ import annotations

import enum
import selectors
from collections.abc import Callable
from typing import NamedTuple, Protocol


class Order(enum.IntEnum):
    """What is looked at first in a turn: a worker's last message must be read before its exit is handled."""

    CHANNEL = 0
    EXIT = 1
    CONTROL = 2
    SIGNAL = 3


class HasFileno(Protocol):
    def fileno(self) -> int: ...


class _Watch(NamedTuple):
    order: Order
    callback: Callable[[], None]
    on_failure: Callable[[Exception], None] | None


class Loop:
    """Callbacks for readable (and, for control peers, writable) files. Borrows the files."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def watch(
        self,
        file: HasFileno | int,
        order: Order,
        callback: Callable[[], None],
        *,
        readable: bool = True,
        writable: bool = False,
        on_failure: Callable[[Exception], None] | None = None,
    ) -> None:
        """Call back when `file` is readable, or writable, where that is asked for. Replaces a watch.

        `on_failure` takes what the callback raises: one peer's trouble must not end the service. It is to stop the
        watch, or the trouble comes again in the next turn.
        """
        events = (selectors.EVENT_READ if readable else 0) | (selectors.EVENT_WRITE if writable else 0)
        watch = _Watch(order, callback, on_failure)
        fd = file if isinstance(file, int) else file.fileno()
        if fd in self._selector.get_map():
            self._selector.modify(fd, events, watch)
        else:
            self._selector.register(fd, events, watch)

    def forget(self, file: HasFileno | int) -> None:
        """Must come before the file is closed: a moved or closed fd would stay in epoll as a ghost."""
        self._selector.unregister(file if isinstance(file, int) else file.fileno())

    def turn(self, timeout_seconds: float | None) -> None:
        """Wait for something, at most so long, and call back in order."""
        ready = [key for key, _ in self._selector.select(timeout_seconds)]
        for key in sorted(ready, key=lambda key: key.data.order):
            # A callback before this one may have forgotten the file, and its number may be in use again.
            now = self._selector.get_map().get(key.fd)
            if now is not None and now.data is key.data:
                _call(key.data)

    def close(self) -> None:
        self._selector.close()


def _call(watch: _Watch) -> None:
    try:
        watch.callback()
    except Exception as error:
        if watch.on_failure is None:
            raise
        watch.on_failure(error)
