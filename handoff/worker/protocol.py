"""uvicorn's protocols with a drain that loses nothing, and with nothing added to the path of a request until then.

Built on these internals of uvicorn (a test for each fails when one changes): HttpToolsProtocol's `cycle`, `pipeline`,
`scope`, `connections`, `on_response_complete`, and that each request is started by `self._start_asgi_task(cycle, app)`;
RequestResponseCycle's `keep_alive`, `response_started`, `response_complete`, `on_response`, `transport`, that it has no
slots, that `send` sets `response_started` before it asks for `keep_alive`, and that it calls `transport.close()` after
a response without keep-alive; WebSocketsSansIOProtocol's `shutdown`.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import termios
from typing import Any

from uvicorn._types import ASGI3Application
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from handoff.core.messages import Hold
from handoff.worker.state import WorkerServerState

LINGER_CLOSE_SECONDS = 2.0
"""How long unread input of a client is taken after our FIN, so that no RST overtakes the answer (RFC 9112, 9.6)."""


class HTTPProtocol(HttpToolsProtocol):
    """HTTP/1.1 of uvicorn; `begin_drain` lets the connection finish and then end."""

    server_state: WorkerServerState

    def __init__(
        self,
        config: Config,
        server_state: WorkerServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.seen_cycle: RequestResponseCycle | None = None
        self.seen_at = 0.0
        """When `observe` first saw this cycle, or the connection was made (the loop's time)."""

    # --- the connection ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.seen_at = self.loop.time()
        self.server_state.connection_made()
        if self.server_state.is_draining:
            self._start_asgi_task = self._start_last  # type: ignore[method-assign]

    def connection_lost(self, exc: Exception | None) -> None:
        was_ours = self in self.connections
        super().connection_lost(exc)
        if was_ours:  # an upgraded connection belongs to the WebSocket protocol
            self.server_state.connection_lost()

    def observe(self, now: float) -> None:
        """Called twice a second, so that a request's age is known without a timestamp in the path of each."""
        if self.cycle is not self.seen_cycle:
            self.seen_cycle, self.seen_at = self.cycle, now

    # --- draining ---------------------------------------------------------------------------------------------------

    @property
    def is_answered(self) -> bool:
        """Every request that has begun is answered, and there was at least one."""
        return self.cycle is not None and self.cycle.response_complete and self.cycle.scope is self.scope

    def begin_drain(self) -> None:
        """Finish what has begun, announce the end, and close. A connection that never got an answer is waited for."""
        self._start_asgi_task = self._start_last  # type: ignore[method-assign]
        if self.cycle is not None and not self.cycle.response_complete:
            for cycle in (self.cycle, *(waiting for waiting, _ in self.pipeline)):
                LastCycle.make(cycle, self)
        elif self.is_answered:
            self.linger()

    def _start_last(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        LastCycle.make(cycle, self)
        HttpToolsProtocol._start_asgi_task(self, cycle, app)

    def linger(self) -> None:
        """An idle client may have a request on the wire: give it time before the connection ends."""
        self.loop.call_later(self.server_state.linger_seconds, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if not self.is_answered or self.transport.is_closing():
            return
        if _unread_bytes(self.transport):
            return  # a request came in this turn; its answer will end the connection
        self.close_gently()

    def close_gently(self) -> None:
        """Send what is written and a FIN, then take (and drop) input until the client closes, too."""
        if self.transport.is_closing():
            return
        self.pipeline.clear()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.set_protocol(_Discard(self))
            self.transport.write_eof()
            self.loop.call_later(LINGER_CLOSE_SECONDS, self.transport.close)
        else:
            self.transport.close()

    def cut_off(self) -> None:
        """The drain's deadline: the connection ends now, whatever it is doing."""
        self.transport.abort()

    def hold(self, now: float) -> Hold | None:
        """What this connection holds a drain with; None when it is idle."""
        self.observe(now)
        if self.is_answered:
            return None
        path, kind = "", "connection"
        if self.cycle is not None and not self.cycle.response_complete:
            path, kind = self.cycle.scope["path"], "request"
        return Hold(kind, _address(self.client), path, now - self.seen_at)


class LastCycle(RequestResponseCycle):
    """A response while its connection drains: the last one says `Connection: close` and ends the connection.

    Which one is the last is decided when it starts to be sent: pipelined requests that are there are answered first.
    """

    protocol: HTTPProtocol
    wants_keep_alive: bool
    is_last: bool | None

    @staticmethod
    def make(cycle: RequestResponseCycle, protocol: HTTPProtocol) -> None:
        """Turn a cycle into one of these, or, where its head is sent already, let the idle connection linger after."""
        if isinstance(cycle, LastCycle) or cycle.response_complete:
            return
        if cycle.response_started:
            cycle.on_response = _Unannounced(protocol)
            return
        wants_keep_alive = cycle.__dict__.pop("keep_alive")
        cycle.__class__ = LastCycle
        assert isinstance(cycle, LastCycle)
        cycle.protocol, cycle.is_last, cycle.wants_keep_alive = protocol, None, wants_keep_alive
        cycle.transport = _GentleTransport(protocol)  # type: ignore[assignment]

    @property
    def keep_alive(self) -> bool:
        if self.is_last is None and self.response_started:
            self.is_last = not self.protocol.pipeline
        return self.wants_keep_alive and not self.is_last

    @keep_alive.setter
    def keep_alive(self, value: bool) -> None:
        self.wants_keep_alive = value


class _Unannounced:
    """After a response that could not announce the end any more."""

    def __init__(self, protocol: HTTPProtocol) -> None:
        self._protocol = protocol

    def __call__(self) -> None:
        self._protocol.on_response_complete()
        if not self._protocol.pipeline and not self._protocol.transport.is_closing():
            self._protocol.linger()


class _GentleTransport:
    """Stands in for the transport of a response that may end its connection: closing it half-closes first."""

    def __init__(self, protocol: HTTPProtocol) -> None:
        self.write = protocol.transport.write
        self.is_closing = protocol.transport.is_closing
        self.close = protocol.close_gently


class _Discard(asyncio.Protocol):
    """Takes and drops what a client still sends after our FIN; the connection's end reaches the real protocol."""

    def __init__(self, protocol: HTTPProtocol) -> None:
        self.connection_lost = protocol.connection_lost  # type: ignore[method-assign]
        self.pause_writing = protocol.pause_writing  # type: ignore[method-assign]
        self.resume_writing = protocol.resume_writing  # type: ignore[method-assign]


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """WebSockets of uvicorn, counted; a drain leaves them alone until its deadline."""

    def __init__(
        self,
        config: Config,
        server_state: WorkerServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.server_state = server_state
        self.began_at = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.server_state.connection_lost()

    def observe(self, now: float) -> None:
        """Its age is that of the connection."""

    def begin_drain(self) -> None:
        """It runs on; at the deadline `cut_off` says 1012, which asks clients to come back."""

    def cut_off(self) -> None:
        self.shutdown()

    def hold(self, now: float) -> Hold | None:
        path = self.scope["path"] if self.handshake_initiated else ""
        return Hold("websocket", _address(self.client), path, now - self.began_at)


def _unread_bytes(transport: asyncio.Transport) -> int:
    """What the kernel has for us that the event loop has not read yet (FIONREAD, tcp(7))."""
    connection = transport.get_extra_info("socket")
    count = array.array("i", [0])
    fcntl.ioctl(connection.fileno(), termios.FIONREAD, count)
    return count[0]


def _address(client: tuple[str, int] | None) -> str:
    return f"{client[0]}:{client[1]}" if client else "unix"
