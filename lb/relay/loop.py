"""The event loop of a relay worker: epoll, deadlines, and one clock reading for each turn.

On epoll itself: a client that waits is watched for its leaving (EPOLLRDHUP), which `selectors` has no name for, and a
callback by file descriptor is all that the hot path needs.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from time import monotonic

from lb.relay.timers import Timers

READ, WRITE = select.EPOLLIN | select.EPOLLRDHUP, select.EPOLLOUT
DATA = int(select.EPOLLIN)
"""The mask of an event for READ, as most are: nothing but that."""
ENDING = select.EPOLLRDHUP
"""In the mask of an event for READ: the end has come, behind what is still to be read."""
URGENT = select.EPOLLPRI
ONCE = READ | URGENT | select.EPOLLET
"""As READ, but told once, which is cheaper: who got less than there was room for has all that there was, but for what
lies behind an urgent byte."""
LEAVING = select.EPOLLRDHUP | select.EPOLLET
"""The other side has ended, or was reset. Told once."""
ERROR = select.EPOLLERR
"""It was reset, or cannot be reached any more. Told whatever is asked for."""
FAILING = select.EPOLLET
"""Nothing but that, and once."""
READABLE, WRITABLE = ~WRITE, ~READ
"""Masks of what is worth an attempt: errors and hang-ups are for reading and writing to find out."""
EVENTS_PER_TURN = 256
_FIRST_CALLBACKS = 1024

Callback = Callable[[int], None]


def _nothing(_mask: int) -> None:
    """For who is not watched any more."""


class Loop:
    """Owns its epoll. Callbacks get the mask of the event."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: list[Callback] = [_nothing] * _FIRST_CALLBACKS
        """By file descriptor."""
        self._closing: list[socket.socket] = []
        self.timers = Timers()
        self.now = monotonic()
        """Of this turn, in seconds."""
        self.timers.set_now(self.now)

    @property
    def is_idle(self) -> bool:
        """Nothing is watched."""
        return all(callback is _nothing for callback in self._callbacks)

    def watch(self, fd: int, mask: int, callback: Callback) -> None:
        """From now on call back for these events, and no others, of an open fd; a mask of 0 ends it."""
        callbacks = self._callbacks
        while fd >= len(callbacks):
            callbacks += [_nothing] * len(callbacks)
        is_watched = callbacks[fd] is not _nothing
        if not mask:  # unregistered, since epoll reports a hang-up even where nothing was asked for
            if is_watched:
                self._epoll.unregister(fd)
                callbacks[fd] = _nothing
        elif is_watched:
            self._epoll.modify(fd, mask)
            callbacks[fd] = callback
        else:
            self._epoll.register(fd, mask)
            callbacks[fd] = callback

    def call(self, fd: int, callback: Callback) -> None:
        """From now on call another one back, for the same events of an fd that is watched."""
        self._callbacks[fd] = callback

    def close(self, sock: socket.socket) -> None:
        """At the end of this turn, which leaves epoll as well: the number must not mean another socket before that."""
        fd = sock.fileno()
        if 0 <= fd < len(self._callbacks):
            self._callbacks[fd] = _nothing
        self._closing.append(sock)

    def turn(self, timeout: float | None) -> int:
        """Wait until something happens or is due, for at most `timeout` seconds. Returns how much happened."""
        due_at = self.timers.next_deadline()
        if due_at is not None:
            left = due_at - monotonic()
            if timeout is None or left < timeout:
                timeout = left if left > 0.0 else 0.0
        events = self._epoll.poll(timeout, EVENTS_PER_TURN)
        self.now = now = monotonic()
        if due_at is None or due_at - now > 1.0:
            self.timers.set_now(now)
        callbacks = self._callbacks
        for fd, mask in events:
            callbacks[fd](mask)
        if due_at is not None and due_at <= now:
            self.timers.check(now)
        if self._closing:
            self.close_now()
        return len(events)

    def close_now(self) -> None:
        """Close what waits for the end of the turn. Not within a callback."""
        closing, self._closing = self._closing, []
        for sock in closing:
            sock.close()

    def shut_down(self) -> None:
        self.close_now()
        self._callbacks = [_nothing]
        self._epoll.close()
