"""uvicorn's protocols with a drain that loses nothing.

Built on these internals of uvicorn (a test for each fails when one changes): HttpToolsProtocol's `cycle`, `pipeline`,
`scope`, `on_headers_complete` and `connections`; RequestResponseCycle's `keep_alive`, `response_started`,
`response_complete`, `transport` and that it calls `transport.close()` after a response without keep-alive;
WebSocketsSansIOProtocol's `shutdown`.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import termios
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from handoff.core.messages import Hold
from handoff.worker.state import WorkerServerState

LINGER_CLOSE_SECONDS = 2.0
"""How long unread input of a client is taken after our FIN, so that no RST overtakes the answer (RFC 9112, 9.6)."""


class _GentleTransport:
    """Stands in for the transport of the last response of a connection: closing it half-closes first."""

    def __init__(self, protocol: HTTPProtocol, transport: asyncio.Transport) -> None:
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = protocol.close_gently


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
        self.began_at = 0.0
        """When the connection was made, or its latest request began (the loop's time)."""
        self.is_discarding = False
        self.last_cycle: RequestResponseCycle | None = None
        """While draining: the response that will announce the end of the connection."""

    # --- the connection ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.began_at = self.loop.time()
        self.server_state.connection_made()

    def connection_lost(self, exc: Exception | None) -> None:
        was_ours = self in self.connections
        super().connection_lost(exc)
        if was_ours:  # an upgraded connection belongs to the WebSocket protocol
            self.server_state.connection_lost()

    def data_received(self, data: bytes) -> None:
        if not self.is_discarding:
            super().data_received(data)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self.began_at = self.loop.time()
        if self.server_state.is_draining:
            self._announce_close()

    # --- draining ---------------------------------------------------------------------------------------------------

    @property
    def is_answered(self) -> bool:
        """Every request that has begun is answered, and there was at least one."""
        return self.cycle is not None and self.cycle.response_complete and self.cycle.scope is self.scope

    def begin_drain(self) -> None:
        """Finish what has begun, announce the end, and close. A connection that never got an answer is waited for."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._announce_close()
        elif self.is_answered:
            self._linger()

    def _announce_close(self) -> None:
        """The newest request's response says `Connection: close` and ends the connection, if it can still say so."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return  # an upgrade
        if cycle.response_started:
            cycle.on_response = self._answered_without_announcing
            return
        previous = self.last_cycle
        if previous is not None and not previous.response_started:
            previous.keep_alive, previous.transport = True, self.transport
        cycle.keep_alive = False
        cycle.transport = _GentleTransport(self, self.transport)  # type: ignore[assignment]
        self.last_cycle = cycle

    def _answered_without_announcing(self) -> None:
        self.on_response_complete()
        if not self.transport.is_closing():
            self._linger()

    def _linger(self) -> None:
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
        if self.is_discarding or self.transport.is_closing():
            return
        self.is_discarding = True
        self.pipeline.clear()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.loop.call_later(LINGER_CLOSE_SECONDS, self.transport.close)
        else:
            self.transport.close()

    def cut_off(self) -> None:
        """The drain's deadline: the connection ends now, whatever it is doing."""
        self.transport.abort()

    def hold(self, now: float) -> Hold | None:
        """What this connection holds a drain with; None when it is idle."""
        if self.is_answered:
            return None
        path, kind = "", "connection"
        if self.cycle is not None and not self.cycle.response_complete:
            path, kind = self.cycle.scope["path"], "request"
        return Hold(kind, _address(self.client), path, now - self.began_at)


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
