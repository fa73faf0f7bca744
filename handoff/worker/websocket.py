"""WebSockets of uvicorn, counted; with `--websockets hand-over` an open one moves between two messages.

Built on these internals of uvicorn (a test for each fails when one changes): WebSocketsSansIOProtocol's `conn`,
`queue`, `frames`, `response`, `handshake_complete`, `close_sent`, `disconnected`, `close_timer`, `stop_keepalive`,
`start_keepalive`, `run_asgi`, `shutdown`, `send_500_response`; and of websockets: ServerProtocol's `current_size` and
`state`, and that `accept` negotiates the same from the same request.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from uvicorn._types import ASGIReceiveEvent, ASGISendEvent
from uvicorn.config import Config
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory
from websockets.http11 import Request
from websockets.protocol import State as ConnectionState
from websockets.server import ServerProtocol

from handoff.core.messages import Hold
from handoff.core.moves import MAXIMUM_DATA_BYTES, MAXIMUM_STATE_BYTES, WEBSOCKET, WebSocketState
from handoff.counters import REFUSED
from handoff.worker.frames import FrameSplitter
from handoff.worker.protocol import HTTPProtocol
from handoff.worker.state import WorkerServerState, address

RESTART = 1012
MAXIMUM_HELD_BYTES = 64 * 1024
"""More than this is left in the kernel while the application has not accepted."""
MAXIMUM_BEGUN_BYTES = MAXIMUM_DATA_BYTES - 1024 * 1024
"""Of a frame that has begun: more, with the request and what comes until reading pauses, might fit no letter. The
connection moves when the frame is complete."""
_EXTENSIONS = "Sec-WebSocket-Extensions"


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """A drain leaves it alone until its deadline, or lets it move."""

    kind = WEBSOCKET

    def __init__(
        self,
        config: Config,
        server_state: WorkerServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        adopted: tuple[WebSocketState, bytes] | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.server_state = server_state
        self.began_at = self.loop.time()
        self.is_leaving = False
        self._adopted = adopted
        self._request = b""
        self._subprotocol: str | None = None
        self._is_waiting = False
        """The application waits in `receive` with nothing queued."""
        self._has_told = False
        self._letter: tuple[WebSocketState, bytes] | None = None
        self._held: list[bytes] = []
        """What came while nobody could take it."""
        self._is_held_back = False
        self._splitter: FrameSplitter | None = None
        if server_state.hands_websockets_over:
            self._splitter = FrameSplitter(config.ws_max_size)
            self.conn = ServerProtocol(
                extensions=_independent_frames() if config.ws_per_message_deflate else [],
                max_size=config.ws_max_size,
                logger=logging.getLogger("uvicorn.error"),
            )

    # --- the connection ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        before = self.transport.get_protocol()
        if isinstance(before, HTTPProtocol):  # it may know the client from a PROXY header, or from another worker
            self.client = before.client
        if self._adopted is not None:
            self.server_state.connection_made()
            self._take_over(*self._adopted)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.server_state.connection_lost()

    def data_received(self, data: bytes) -> None:
        if self._splitter is None:
            super().data_received(data)
        elif not self._request:
            self._request = data  # the whole of it: the HTTP protocol passes it on
            super().data_received(data)
        elif self._has_told or not self.handshake_complete:
            self._held.append(data)
            if not (self._has_told or self._is_held_back) and sum(map(len, self._held)) > MAXIMUM_HELD_BYTES:
                self._is_held_back = True
                self.transport.pause_reading()
        else:
            frames = self._splitter.add(data)
            if frames:
                super().data_received(frames)
            self._tell_if_quiet()

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if self._splitter is not None and self.response.status_code == HTTPStatus.SWITCHING_PROTOCOLS:
            state = self._adopted[0].state if self._adopted is not None else {}
            self.scope["extensions"]["handoff"] = {"state": state}

    def resume_writing(self) -> None:
        super().resume_writing()
        self._tell_if_quiet()

    # --- what the application does ----------------------------------------------------------------------------------

    async def run_asgi(self) -> None:
        await super().run_asgi()
        if self._has_told:
            self._post()

    async def receive(self) -> ASGIReceiveEvent:
        self._is_waiting = True
        if self.is_leaving:
            self.loop.call_soon(self._tell_if_quiet)
        try:
            return await super().receive()
        finally:
            self._is_waiting = False

    async def send(self, message: ASGISendEvent) -> None:
        if self._splitter is None or self.handshake_complete or self.initial_response is not None:
            await super().send(message)
            return
        if message["type"] == "websocket.accept":
            if self._adopted is None:
                self._subprotocol = message.get("subprotocol")
                await super().send(message)
            else:
                self._go_on()
            self._release_held()
        elif self._adopted is None:
            await super().send(message)
        else:  # it denies what its predecessor had accepted
            self._go_on()
            await super().send({"type": "websocket.close", "code": 1000})

    def send_500_response(self) -> None:
        """Of an application that failed before its accept. A client that was accepted is told in a frame."""
        if self._adopted is None or self.handshake_complete:
            super().send_500_response()
            return
        self._go_on()
        if not self.close_sent:
            self._close_for_restart("its application failed before it accepted")

    # --- taking over ------------------------------------------------------------------------------------------------

    def _take_over(self, state: WebSocketState, data: bytes) -> None:
        """Go through the same handshake again, without a word to the client; the application's accept ends it."""
        if state.client is not None:
            self.client = state.client
        self._subprotocol = state.subprotocol
        self._held.append(data[state.request_bytes :])
        self.data_received(data[: state.request_bytes])

    def _go_on(self) -> None:
        """The connection is open, as it was for the predecessor; nothing is written."""
        assert self._adopted is not None
        self.handshake_complete = True
        if self._subprotocol:
            self.response.headers["Sec-WebSocket-Protocol"] = self._subprotocol
        self.conn.send_response(self.response)
        self.conn.data_to_send()
        if self.response.headers.get(_EXTENSIONS, "") != self._adopted[0].extensions:
            self._close_for_restart("another compression is negotiated here")
            return
        self.start_keepalive()

    def _release_held(self) -> None:
        held, self._held = self._held, []
        if self._is_held_back and not self.transport.is_closing():
            self._is_held_back = False
            self.transport.resume_reading()
        for data in held:
            if data and not self.transport.is_closing():
                self.data_received(data)

    def _close_for_restart(self, reason: str) -> None:
        """It cannot move; the client is asked to come back."""
        self.logger.warning("a WebSocket could not move: %s", reason)
        self.server_state.counters[REFUSED] += 1
        self.queue.put_nowait({"type": "websocket.disconnect", "code": RESTART})
        if self.conn.state is ConnectionState.OPEN:
            self.conn.send_close(RESTART)
            self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.transport.close()

    # --- moving -----------------------------------------------------------------------------------------------------

    def begin_move(self) -> None:
        """Move at the next boundary between messages at which the application waits for one."""
        if self._splitter is None or self.transport.get_extra_info("sslcontext") is not None:
            return
        self.is_leaving = True
        self._tell_if_quiet()

    def begin_drain(self) -> None:
        """It runs on; at the deadline `cut_off` says 1012, which asks clients to come back."""
        self.is_leaving = False

    def _tell_if_quiet(self) -> None:
        """End the application's task, whose place is in the next worker; it moves when that has ended."""
        if not self.is_leaving or self._has_told or not self._is_quiet():
            return
        if self.transport.get_write_buffer_size():
            self.transport.set_write_buffer_limits(high=0)  # so that resume_writing says when it is empty
            return
        self._has_told = True
        self.transport.pause_reading()
        self.stop_keepalive()
        self.disconnected = True  # what the application still sends goes nowhere, and it is told so
        self.close_timer = self.loop.call_later(0, lambda: None)  # or the end of the task would close the connection
        self.queue.put_nowait({"type": "websocket.disconnect", "code": RESTART})

    def _is_quiet(self) -> bool:
        return (
            self.handshake_complete
            and self._is_waiting
            and not (self.close_sent or self.disconnected or self.frames or self.transport.is_closing())
            and self.queue.empty()
            and self.conn.current_size is None
            and self.conn.state is ConnectionState.OPEN
            and self._splitter is not None
            and self._splitter.rest_bytes <= MAXIMUM_BEGUN_BYTES
        )

    def _post(self) -> None:
        try:
            text = json.dumps(self.scope["extensions"]["handoff"]["state"], allow_nan=False)
            state = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            self._close_for_restart(f"its state is no JSON: {error}")
            return
        if not isinstance(state, dict) or len(text) > MAXIMUM_STATE_BYTES // 2:
            self._close_for_restart(f"its state has {len(text)} bytes; at most {MAXIMUM_STATE_BYTES // 2}")
            return
        assert self._splitter is not None
        letter = WebSocketState(
            client=self.client,
            scheme=self.scheme,
            request_bytes=len(self._request),
            subprotocol=self._subprotocol,
            extensions=self.response.headers.get(_EXTENSIONS, ""),
            state=state,
        )
        self.transport.pause_reading()  # receiving the disconnect may have resumed it
        self._letter = (letter, self._request + self._splitter.rest + b"".join(self._held))
        self.server_state.mover.post(self)

    def letter(self) -> tuple[WebSocketState, bytes, Sequence[int]] | None:
        if self._letter is None or self.transport.is_closing():
            return None
        return *self._letter, (self.transport.get_extra_info("socket").fileno(),)

    def waits(self) -> None:
        """Reading is paused already."""

    def moved(self) -> None:
        self.transport.abort()

    def refused(self) -> None:
        self.server_state.counters[REFUSED] -= 1  # the mover has counted it already
        self._close_for_restart("too much data for a letter")

    # --- ending -----------------------------------------------------------------------------------------------------

    def observe(self, now: float) -> None:
        """Its age is that of the connection."""

    def cut_off(self) -> None:
        self.shutdown()

    def hold(self, now: float) -> Hold | None:
        path = self.scope["path"] if self.handshake_initiated else ""
        return Hold("websocket", address(self.client), path, now - self.began_at)


def _independent_frames() -> list[ServerPerMessageDeflateFactory]:
    """As uvicorn's, without context take-over: each message can be read without those before it."""
    return [
        ServerPerMessageDeflateFactory(
            server_no_context_takeover=True,
            client_no_context_takeover=True,
            server_max_window_bits=12,
            client_max_window_bits=12,
            compress_settings={"memLevel": 5},
        )
    ]
