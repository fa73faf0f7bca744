"""One relayed connection: a client, a backend, and what flows between them.

Its end is passed on as it came: a FIN as a FIN in its direction, a reset as a reset, after the data before it. Neither
side is ever shown a clean end where the other one was cut off.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import selectors
import socket
import struct
import termios
from collections.abc import Callable
from typing import NamedTuple

from lb.relay.flow import Flow, Result
from lb.relay.timers import Timers

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
RESET_SECONDS = 2.0
"""How long a side may take to acknowledge what came before the reset that it is to see."""
LOOK_SECONDS = 0.02
_RESET_AT_CLOSE = struct.pack("ii", 1, 0)  # struct linger: socket(7)


class Limits(NamedTuple):
    """Seconds; None: none. `idle`: nothing either way; `fin`: one side has ended, and the other goes on alone."""

    idle_seconds: float | None = 3600.0
    fin_seconds: float | None = 60.0


class Closed(NamedTuple):
    """How it ended: `cause` is "end", "reset", "idle" or "fin"; bytes from the client, and to it."""

    cause: str
    sent_bytes: int
    received_bytes: int


class Relay:
    """Owns both sockets, which do not block and are connected. Calls `on_close` once, at its very end."""

    __slots__ = (
        "_client",
        "_down",
        "_is_closed",
        "_is_gone",
        "_last_at",
        "_limits",
        "_look_at",
        "_masks",
        "_now",
        "_on_close",
        "_reading",
        "_reset_until",
        "_resetting",
        "_selector",
        "_server",
        "_shut_at",
        "_timers",
        "_up",
        "_writing",
    )

    def __init__(
        self,
        client: socket.socket,
        server: socket.socket,
        selector: selectors.BaseSelector,
        limits: Limits,
        timers: Timers,
        now: Callable[[], float],
        on_close: Callable[[Relay, Closed], None],
        first: bytes = b"",
    ) -> None:
        """`first`: bytes for the server that go before what the client sends."""
        self._client, self._server = client, server
        self._up, self._down = Flow(client, server), Flow(server, client)
        self._selector, self._limits, self._now, self._on_close = selector, limits, now, on_close
        self._timers = timers
        self._is_closed = self._is_gone = False
        self._resetting: socket.socket | None = None
        """It is to see a reset, when all that was sent to it is acknowledged: a reset throws away what is not."""
        self._reset_until = self._look_at = 0.0
        self._last_at = now()
        self._shut_at: float | None = None
        self._masks: dict[socket.socket, int] = {client: 0, server: 0}
        self._reading: set[Flow] = {self._up, self._down}
        """Flows whose source is read, unless something is pending."""
        self._writing: set[Flow] = {self._up, self._down}
        """Flows whose sink is not shut down."""
        self._up.put(first)
        self._watch()
        timers.arm(self)

    # --- events -----------------------------------------------------------------------------------------------------

    def client_event(self, mask: int) -> None:
        self._event(mask, self._up, self._down)

    def server_event(self, mask: int) -> None:
        self._event(mask, self._down, self._up)

    def _event(self, mask: int, outgoing: Flow, incoming: Flow) -> None:
        """Of a socket that is the source of `outgoing` and the sink of `incoming`."""
        if self._is_closed or self._resetting is not None:
            return
        self._last_at = self._now()
        if mask & WRITE and incoming.has_pending:
            self._act(incoming, incoming.flush())
        if mask & READ and not self._is_closed and outgoing in self._reading and not outgoing.has_pending:
            result = outgoing.pump()
            if result is not Result.OPEN:
                self._act(outgoing, result)

    def _act(self, flow: Flow, result: Result) -> None:
        match result:
            case Result.ENDED if not self._is_gone:
                self._reading.discard(flow)
                self._shut(flow)
            case Result.RESET | Result.ENDED:
                # A send that failed took the error away: what looks like an end, after it, is the reset.
                self._reset(self._server if flow is self._up else self._client)
                return
            case Result.SINK_GONE:
                self._sink_gone(flow)
            case Result.OPEN | Result.BLOCKED:
                pass
        if not self._is_closed:
            self._watch()

    def _sink_gone(self, flow: Flow) -> None:
        """Nothing goes there any more; what that side said before it went is still delivered, then its reset."""
        flow.close()
        self._is_gone = True
        self._reading.discard(flow)
        self._writing.discard(flow)
        other = self._down if flow is self._up else self._up
        if other not in self._reading:
            self._reset(self._client if flow is self._up else self._server)

    def _reset(self, sock: socket.socket) -> None:
        """This side is to see the reset that the other one sent; what came before it goes first."""
        for one in (self._client, self._server):
            self._set_mask(one, 0, self.client_event)
        self._resetting, self._reset_until = sock, self._now() + RESET_SECONDS
        if not self._has_reset(self._now()):
            self._timers.arm(self)

    def _has_reset(self, now: float) -> bool:
        sock = self._resetting
        assert sock is not None
        if now < self._reset_until and _unacknowledged_bytes(sock):
            self._look_at = now + LOOK_SECONDS
            return False
        self._close("reset", reset_client=sock is self._client, reset_server=sock is self._server)
        return True

    def _shut(self, flow: Flow) -> None:
        """All is delivered and no more comes: FIN."""
        self._writing.discard(flow)
        sink = self._server if flow is self._up else self._client
        with contextlib.suppress(OSError):  # it was reset meanwhile; its own flow will tell
            sink.shutdown(socket.SHUT_WR)
        if self._shut_at is None:
            self._shut_at = self._now()
            self._timers.arm(self)
        if not self._writing:
            self._close("end")

    # --- interest ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        up, down = self._up, self._down
        self._set_mask(self._client, self._mask(up, down), self.client_event)
        self._set_mask(self._server, self._mask(down, up), self.server_event)

    def _mask(self, outgoing: Flow, incoming: Flow) -> int:
        mask = READ if outgoing in self._reading and not outgoing.has_pending else 0
        return mask | WRITE if incoming.has_pending else mask

    def _set_mask(self, sock: socket.socket, mask: int, callback: Callable[[int], None]) -> None:
        before = self._masks[sock]
        if mask == before:
            return
        self._masks[sock] = mask
        if not mask:  # unregistered, since epoll reports a hang-up even where nothing was asked for
            self._selector.unregister(sock)
        elif not before:
            self._selector.register(sock, mask, callback)
        else:
            self._selector.modify(sock, mask, callback)

    # --- time and the end -------------------------------------------------------------------------------------------

    @property
    def due_at(self) -> float | None:
        """When a limit is reached if nothing happens until then."""
        if self._is_closed:
            return None
        if self._resetting is not None:
            return self._look_at
        limits = []
        if self._limits.idle_seconds is not None:
            limits.append(self._last_at + self._limits.idle_seconds)
        if self._shut_at is not None and self._limits.fin_seconds is not None:
            limits.append(self._shut_at + self._limits.fin_seconds)
        return min(limits, default=None)

    def is_due(self, now: float) -> None:
        """A limit is reached: both sides are cut off, and see that."""
        if self._resetting is not None:
            self._has_reset(now)
            return
        is_fin = self._shut_at is not None and self._limits.fin_seconds is not None
        is_fin = is_fin and (self._shut_at or 0.0) + (self._limits.fin_seconds or 0.0) <= now
        self._close("fin" if is_fin else "idle", reset_client=True, reset_server=True)

    def close(self) -> None:
        """At once: both sides see a reset."""
        if not self._is_closed:
            self._close("reset", reset_client=True, reset_server=True)

    def _close(self, cause: str, reset_client: bool = False, reset_server: bool = False) -> None:
        self._is_closed = True
        for sock, is_reset in ((self._client, reset_client), (self._server, reset_server)):
            self._set_mask(sock, 0, self.client_event)
            if is_reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
        totals = self._up.total, self._down.total
        self._up.close()
        self._down.close()
        self._client.close()
        self._server.close()
        self._on_close(self, Closed(cause, *totals))


def _unacknowledged_bytes(sock: socket.socket) -> int:
    """What was sent and has not reached the other side (SIOCOUTQ: tcp(7)); 0 where that cannot be told."""
    count = array.array("i", [0])
    try:
        fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, count)
    except OSError:
        return 0
    return count[0]
