"""Accepting: so many at a time, with a pause where the machine has no room for more."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable

from lb.relay.loop import READ, Loop

ACCEPTED_PER_TURN = 64
PAUSE_SECONDS = 0.1
"""After an accept that failed for want of fds or memory: the listener stays readable, and would keep us busy."""
_NO_ROOM = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS))

_LOG = logging.getLogger("handoff.lb")


class Acceptor:
    """Of one listener, which is borrowed. `on_client` gets the socket, which does not block, and the peer's address."""

    def __init__(self, listener: socket.socket, loop: Loop, on_client: Callable[[socket.socket, object], None]) -> None:
        self._listener, self._loop, self._on_client = listener, loop, on_client
        self._family, self._type, self._proto = int(listener.family), int(listener.type), listener.proto
        self._is_open = False
        self._is_paused = False
        self.pauses = 0
        """How often there was no room."""

    def open(self) -> None:
        self._is_open = True
        # Urgent bytes stay where they are among the others (tcp(7)); what is accepted inherits that.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        self._loop.watch(self._listener.fileno(), READ, self._event)

    def close(self) -> None:
        """Accept nothing more; the listener stays open, others share it."""
        self._is_open = False
        self._loop.watch(self._listener.fileno(), 0, self._event)

    def accept_queued(self) -> None:
        """Let in those that wait on a listener that nobody accepts from any more."""
        while self._accept_some() == ACCEPTED_PER_TURN:
            pass

    def _event(self, _mask: int) -> None:
        self._accept_some()

    def _accept_some(self) -> int:
        accept = self._listener._accept  # type: ignore[attr-defined]  # socket.accept without its detours: see the test
        for count in range(ACCEPTED_PER_TURN):
            try:
                fd, peer = accept()
            except BlockingIOError:
                return count
            except OSError as error:
                if error.errno in _NO_ROOM:
                    self._pause(error)
                    return count
                continue  # ECONNABORTED and its like: this one has gone, the next may be there: accept(2)
            client = socket.SocketType(self._family, self._type, self._proto, fd)
            client.setblocking(False)
            self._on_client(client, peer)  # type: ignore[arg-type]  # the plain class of C: half the cost
        return ACCEPTED_PER_TURN

    def _pause(self, error: OSError) -> None:
        self.pauses += 1
        if self._is_paused or not self._is_open:
            return
        if self.pauses == 1:
            _LOG.warning("accepting pauses: %s; raise the limit of open files", (error.strerror or "").lower())
        self._is_paused = True
        self._loop.watch(self._listener.fileno(), 0, self._event)
        self._loop.timers.call_at(self._loop.now + PAUSE_SECONDS, self._go_on)

    def _go_on(self) -> None:
        self._is_paused = False
        if self._is_open:
            self.open()
