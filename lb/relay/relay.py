"""One relayed connection: a client, a backend, and what flows between them.

Its end is passed on as it came: a FIN as a FIN in its direction, a reset as a reset, after the data before it. Neither
side is ever shown a clean end where the other one was cut off.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import socket
import struct
import termios
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from lb.relay.flow import Flow, FlowState, Result
from lb.relay.loop import DATA, ENDING, ERROR, FAILING, ONCE, READ, READABLE, URGENT, WRITABLE, WRITE, Loop
from lb.relay.timers import PATIENT_SECONDS

RESET_SECONDS = 2.0
"""How long a side may take to acknowledge what came before the reset that it is to see."""
LOOK_SECONDS = 0.02
_RESET_AT_CLOSE = struct.pack("ii", 1, 0)  # struct linger: socket(7)


class Limits:
    """Seconds; None: none. `idle`: nothing either way; `fin`: the same once one side has ended, or is gone.

    `first_byte`: of the server's, from the beginning. `tunnel`: in place of `idle` when both sides have said something.
    """

    __slots__ = ("fin_seconds", "first_byte_seconds", "idle_seconds", "is_patient", "tunnel_seconds")

    def __init__(
        self,
        idle_seconds: float | None = 3600.0,
        fin_seconds: float | None = 60.0,
        first_byte_seconds: float | None = None,
        tunnel_seconds: float | None = None,
    ) -> None:
        self.idle_seconds, self.fin_seconds = idle_seconds, fin_seconds
        self.first_byte_seconds, self.tunnel_seconds = first_byte_seconds, tunnel_seconds
        self.is_patient = all(one is None or one >= PATIENT_SECONDS for one in self.all_seconds)
        """None is reached so soon that a new relay must be looked at at once."""

    @property
    def all_seconds(self) -> tuple[float | None, float | None, float | None, float | None]:
        """As the constructor takes them."""
        return self.idle_seconds, self.fin_seconds, self.first_byte_seconds, self.tunnel_seconds


class Closed(msgspec.Struct, frozen=True, gc=False):
    """How it ended: `cause` is "end", "idle", "fin", "first byte", "closed" by us, or "reset".

    `side`: whose doing that was, "client", "server" or "" for ours; bytes from the client, and to it.
    """

    cause: str
    side: str
    sent_bytes: int
    received_bytes: int


class RelayState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What another process must know to go on with it. Times are of the monotonic clock, which all share."""

    up: FlowState
    down: FlowState
    began_at: float
    last_at: float
    shut_at: float | None = None
    is_gone: bool = False
    resetting: str = ""
    """"client" or "server": it is to see a reset, once it has what came before."""
    ending_at: float = 0.0


class Relay:
    """Owns both sockets, which do not block and are connected. Calls `on_close` once, at its very end."""

    __slots__ = (
        *("_client", "_client_mask", "_down", "_ending_at", "_is_closed", "_is_gone", "_limits"),
        *(
            "_loop",
            "_look_at",
            "_on_answer",
            "_on_close",
            "_resetting",
            "_server",
            "_server_mask",
            "_shut_at",
            "_up",
            "began_at",
        ),
        *("bucket", "context"),
    )

    def __init__(
        self,
        client: socket.socket,
        server: socket.socket,
        loop: Loop,
        limits: Limits,
        on_close: Callable[[Relay, Closed], None],
        first: bytes = b"",
        taken: int = 0,
        context: Any = None,
        moved: tuple[RelayState, Sequence[int]] | None = None,
        on_answer: Callable[[Relay, bool], None] | None = None,
    ) -> None:
        """`first`: bytes for the server that go before what the client sends; `taken` of them are the client's.
        `context`: the owner's. `moved`: where another process was, and the ends of its pipes, which are ours now.
        `on_answer`: is told when the server first says something, and whether the client had said nothing before."""
        self.context = context
        self.bucket: int | None = None
        self._client, self._server = client, server
        self._up = Flow(client, server, client.family != _UNIX, loop, self)
        self._down = Flow(server, client, server.family != _UNIX, loop, self)
        self._loop, self._limits, self._on_close, self._on_answer = loop, limits, on_close, on_answer
        self._is_closed = self._is_gone = False
        self._resetting: socket.socket | None = None
        """It is to see a reset, when all that was sent to it is acknowledged: a reset throws away what is not."""
        self._ending_at = self._look_at = 0.0
        self.began_at = loop.now
        self._shut_at: float | None = None
        self._client_mask = self._server_mask = 0
        if first:
            self._up.put(first)
            self._up.total = taken
        if moved is not None:
            self._go_on(*moved)
        if moved is None and not first:  # as most are
            self._client_mask = client_mask = ONCE if self._up.is_quick else READ
            self._server_mask = server_mask = ONCE if self._down.is_quick else READ
            loop.watch(client.fileno(), client_mask, self._up.event)
            loop.watch(server.fileno(), server_mask, self._down.event if on_answer is None else self._answered)
        elif self._resetting is None:
            self._watch()
        if limits.is_patient and moved is None:
            loop.timers.arm_later(self)
        else:
            loop.timers.arm(self)

    # --- moving -----------------------------------------------------------------------------------------------------

    def state(self) -> tuple[RelayState, tuple[int, ...]]:
        """For another process, between two turns; and the fds that go along, borrowed: client, server, pipes."""
        (up, up_pipe), (down, down_pipe) = self._up.state(), self._down.state()
        state = RelayState(
            up=up,
            down=down,
            began_at=self.began_at,
            last_at=self._last_at,
            shut_at=self._shut_at,
            is_gone=self._is_gone,
            resetting="" if self._resetting is None else "client" if self._resetting is self._client else "server",
            ending_at=self._ending_at,
        )
        return state, (self._client.fileno(), self._server.fileno(), *up_pipe, *down_pipe)

    def let_go(self) -> None:
        """It is another process's now: nothing is sent, `on_close` is not called. Between two turns."""
        self._is_closed = True
        self._watch_for(0, 0)  # first, and then closed: the connections live on, and epoll would keep them
        self._up.end()
        self._down.end()
        self._up.close()
        self._down.close()
        self._loop.timers.forget(self)
        self._client.close()
        self._server.close()

    def _go_on(self, state: RelayState, pipes: Sequence[int]) -> None:
        split = 2 if state.up.piped else 0
        self._up.go_on(state.up, pipes[:split])
        self._down.go_on(state.down, pipes[split:])
        self.began_at, self._shut_at = state.began_at, state.shut_at
        self._up.last_at = self._down.last_at = state.last_at
        self._is_gone, self._ending_at = state.is_gone, state.ending_at
        if state.resetting:
            self._resetting = self._client if state.resetting == "client" else self._server

    # --- events -----------------------------------------------------------------------------------------------------

    def _answered(self, mask: int) -> None:
        """The first event at the server."""
        assert self._on_answer is not None
        self._loop.call(self._server.fileno(), self._down.event)
        if mask & DATA:
            self._on_answer(self, not self._up.total)
        self._down.event(mask)

    def event(self, flow: Flow, mask: int) -> None:
        """At the source of a flow, which is the sink of the other one."""
        other, watched = (self._down, self._client_mask) if flow is self._up else (self._up, self._server_mask)
        if mask & WRITABLE and other.has_pending:
            self.act(other, other.flush())
        if mask & URGENT and flow.is_quick:  # reading stops there, whatever comes behind it
            flow.is_quick = False
            if not self._is_closed and self._resetting is None:
                self._watch()
        if mask & READABLE and flow.is_read and not flow.has_pending and not self._is_closed:
            before, result = flow.total, flow.pump()
            if result is _OPEN and mask & ENDING:  # it is next: one turn less, and need not be asked for
                # What was asked for when the relay was not yet there says nothing of urgent bytes.
                is_new = self._loop.now == self.began_at
                is_told_all = watched == ONCE and flow.is_quick and not is_new and not mask & ERROR
                result = _ENDED if is_told_all and flow.total > before else flow.pump()
            if result is not _OPEN:
                self.act(flow, result)
            if result is not _ENDED:
                return
        if mask & ERROR and not self._is_closed and self._resetting is None:
            self.act(other, _SINK_GONE)  # reset while nothing is read of it, or behind its end: that is told once

    def act(self, flow: Flow, result: Result) -> None:
        """What became of a flow's data."""
        if result is _ENDED and not self._is_gone:
            flow.is_read = flow.is_watched = False
            self._shut(flow)
            if flow.is_quick and not (self._down if flow is self._up else self._up).has_pending:
                return  # an end is told once: nothing changes
        elif result is _ENDED or result is _RESET:
            # A send that failed took the error away: what looks like an end, after it, is the reset.
            self._reset(self._server if flow is self._up else self._client)
            return
        elif result is _SINK_GONE:
            self._sink_gone(flow)
        if not self._is_closed and self._resetting is None:
            self._watch()

    def _sink_gone(self, flow: Flow) -> None:
        """Nothing goes there any more; what that side said before it went is still delivered, then its reset."""
        flow.close()
        self._is_gone = True
        flow.is_read = flow.is_written = False
        other = self._down if flow is self._up else self._up
        if not other.is_read:
            self._reset(self._client if flow is self._up else self._server)
        else:
            self._loop.timers.arm(self)

    def _reset(self, sock: socket.socket) -> None:
        """This side is to see the reset that the other one sent; what came before it goes first."""
        self._up.is_read = self._down.is_read = False
        self._up.close()
        self._down.close()
        self._watch_for(0, 0)
        now = self._loop.now
        self._resetting, self._ending_at = sock, now + RESET_SECONDS
        if not self._has_reset(now):
            self._loop.timers.arm(self)

    def _has_reset(self, now: float) -> bool:
        sock = self._resetting
        assert sock is not None
        if now < self._ending_at and _unacknowledged_bytes(sock):
            self._look_at = now + LOOK_SECONDS
            return False
        self._pass_on_reset(is_client=sock is self._client)
        return True

    def _pass_on_reset(self, is_client: bool) -> None:
        self._close("reset", "server" if is_client else "client", reset_client=is_client, reset_server=not is_client)

    def _shut(self, flow: Flow) -> None:
        """All is delivered and no more comes: FIN."""
        flow.is_written = False
        is_up = flow is self._up
        if not (self._down if is_up else self._up).is_written:
            self._close("end", "client" if is_up else "server")
            return
        try:  # noqa: SIM105  # suppress costs a microsecond, for each connection
            (self._server if is_up else self._client).shutdown(_SHUT_WR)
        except OSError:  # it was reset meanwhile; its own flow will tell
            pass
        self._shut_at = now = self._loop.now
        seconds = self._limits.fin_seconds
        if seconds is not None:
            self._loop.timers.arm_at(self, now + seconds)

    # --- interest ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        up, down = self._up, self._down
        up.is_watched, down.is_watched = up.is_read and not up.has_pending, down.is_read and not down.has_pending
        self._watch_for(_interest(up, down), _interest(down, up))

    def _watch_for(self, client_mask: int, server_mask: int) -> None:
        if client_mask != self._client_mask:
            self._client_mask = client_mask
            self._loop.watch(self._client.fileno(), client_mask, self._up.event)
        if server_mask != self._server_mask:
            self._server_mask = server_mask
            self._loop.watch(self._server.fileno(), server_mask, self._down.event)

    # --- time and the end -------------------------------------------------------------------------------------------

    @property
    def _last_at(self) -> float:
        """When something happened at either side."""
        return max(self._up.last_at, self._down.last_at)

    @property
    def totals(self) -> tuple[int, int]:
        """Bytes from the client, and to it, so far."""
        return self._up.total, self._down.total

    @property
    def due_at(self) -> float | None:
        """When a limit is reached if nothing happens until then."""
        if self._is_closed:
            return None
        if self._resetting is not None:
            return self._look_at
        limits = self._limits
        is_plain = self._shut_at is None and limits.first_byte_seconds is None and limits.tunnel_seconds is None
        if is_plain and not self._is_gone:
            return None if limits.idle_seconds is None else self._last_at + limits.idle_seconds  # as most are
        return min((at for at, _ in self._deadlines()), default=None)

    def is_due(self, now: float) -> None:
        """A limit is reached: both sides are cut off, and see that."""
        if self._resetting is not None:
            self._has_reset(now)
            return
        for at, cause in self._deadlines():
            if at <= now and cause == "reset":
                self._pass_on_reset(is_client=not self._up.is_written)
                return
            if at <= now:
                self._close(cause, self._who_is_late(), reset_client=True, reset_server=True)
                return

    def close(self) -> None:
        """At once: both sides see a reset."""
        if not self._is_closed:
            self._close("closed", "", reset_client=True, reset_server=True)

    def _deadlines(self) -> list[tuple[float, str]]:
        limits, found = self._limits, []
        has_answer = self._down.total > 0
        if limits.fin_seconds is not None and (self._is_gone or self._shut_at is not None):
            found.append((self._last_at + limits.fin_seconds, "reset" if self._is_gone else "fin"))
        if limits.first_byte_seconds is not None and not has_answer:
            found.append((self.began_at + limits.first_byte_seconds, "first byte"))
        is_tunnel = limits.tunnel_seconds is not None and has_answer and self._up.total > 0
        idle = limits.tunnel_seconds if is_tunnel else limits.idle_seconds
        if idle is not None:
            found.append((self._last_at + idle, "idle"))
        return found

    def _who_is_late(self) -> str:
        return "server" if not self._up.is_read or not self._down.total else "client"

    def _close(self, cause: str, side: str, reset_client: bool = False, reset_server: bool = False) -> None:
        self._is_closed = True
        if reset_client:
            self._client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
        if reset_server:
            self._server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
        if self._up.has_pending or self._up.is_bulk:
            self._up.close()
        if self._down.has_pending or self._down.is_bulk:
            self._down.close()
        self._up.end()
        self._down.end()
        self._loop.timers.forget(self)
        self._loop.close(self._client)
        self._loop.close(self._server)
        self._on_close(self, Closed(cause, side, self._up.total, self._down.total))


_OPEN, _ENDED, _RESET, _SINK_GONE = Result.OPEN, Result.ENDED, Result.RESET, Result.SINK_GONE
_SHUT_WR, _UNIX = int(socket.SHUT_WR), int(socket.AF_UNIX)


def _interest(flow: Flow, other: Flow) -> int:
    """What is to be told of the source of a flow, which is the sink of the other one."""
    if other.has_pending:
        return READ | WRITE if flow.is_watched else WRITE
    if flow.is_quick and not flow.has_pending:  # an end is told once, too: it changes nothing here
        return ONCE
    return READ if flow.is_watched else FAILING


def reset_at_close(sock: socket.socket) -> None:
    """Who is at the other side is to see a reset, and no clean end."""
    with contextlib.suppress(OSError):  # a unix socket, or gone already
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)


def _unacknowledged_bytes(sock: socket.socket) -> int:
    """What was sent and has not reached the other side (SIOCOUTQ: tcp(7)); 0 where that cannot be told."""
    count = array.array("i", [0])
    try:
        fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, count)
    except OSError:
        return 0
    return count[0]
