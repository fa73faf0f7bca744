"""uvicorn's HTTP protocol with a drain that loses nothing, and connections that can move to another worker.

Built on these internals of uvicorn (a test for each fails when one changes): HttpToolsProtocol's `cycle`, `pipeline`,
`scope`, `connections`, `flow`, `timeout_keep_alive_task`, `timeout_keep_alive_handler`, `on_response_complete`,
`send_400_response`, `_unset_keepalive_if_required`, the bodies of `connection_made`, `data_received`, `on_body` and
`on_message_complete`, that a message's scope is made at its begin and its cycle at the end of its head, and that each
request is started by `self._start_asgi_task(cycle, app)`;
RequestResponseCycle's `keep_alive`, `response_started`, `response_complete`, `on_response`, `transport`, that it has
no slots, that `send` sets `response_started` before it asks for `keep_alive`, and that it calls `transport.close()`
after a response without keep-alive.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import termios
import time
from collections.abc import Sequence
from typing import Any

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from handoff.core.messages import Hold
from handoff.core.moves import HTTP, HTTPState
from handoff.worker.acceptors import fd_of
from handoff.worker.ending import Discard, LastCycle
from handoff.worker.state import WorkerServerState, address
from handoff.worker.unparsed import BodySplitter, after_last_message

LINGER_CLOSE_SECONDS = 2.0
"""How long unread input of a client is taken after our FIN, so that no RST overtakes the answer (RFC 9112, 9.6)."""
MAXIMUM_HEAD_BYTES = 256 * 1024
"""Of a request; more, without an end of it, is answered 400. Neither uvicorn nor its parser has a limit."""
MAXIMUM_UNFED_BYTES = 64 * 1024
"""More than this is left in the kernel while a connection waits for its quiet moment."""


class HTTPProtocol(HttpToolsProtocol):
    """HTTP/1.1 of uvicorn, whose connection can move between two messages (`begin_move`), or end (`begin_drain`)."""

    kind = HTTP
    server_state: WorkerServerState
    # Slots: with more than 30 attributes CPython gives up the fast layout of an instance's __dict__.
    __slots__ = (
        "_adopted",
        "_body_bytes",
        "_body_of",
        "_head",
        "_head_after",
        "_head_bytes",
        "_is_ending",
        "_is_posted",
        "_mailbox",
        "_splitter",
        "_unfed",
        "_was_answered",
        "is_leaving",
        "parsed",
        "seen_at",
        "seen_cycle",
    )

    def __init__(
        self,
        config: Config,
        server_state: WorkerServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        adopted: tuple[HTTPState, bytes] | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.seen_cycle: RequestResponseCycle | None = None
        self.seen_at = 0.0
        """When `observe` first saw this cycle, or the connection was made (the loop's time)."""
        self._adopted = adopted
        self._was_answered = adopted is not None and adopted[0].is_answered
        self.parsed: RequestResponseCycle | None = None
        """The last cycle whose message was parsed to its end; while it is not `cycle`, a body is going on."""
        self._head: list[bytes] = []
        """What was parsed, from the begin of a message on, and ends within a head."""
        self._head_after: RequestResponseCycle | None = None
        """The last cycle before that head."""
        self._head_bytes = 0
        self._splitter: BodySplitter | None = None
        self._body_of: RequestResponseCycle | None = None
        self._body_bytes = 0
        self.is_leaving = False
        self._is_ending = False
        self._is_posted = False
        self._mailbox: int | None = None
        self._unfed: list[bytes] = []
        """What came while the connection was leaving and belongs to later messages."""

    # --- the connection ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if self._adopted is None or self._adopted[0].server is None:
            super().connection_made(transport)
        else:  # the same, but for the addresses: to ask for them takes as long as all the rest
            self.connections.add(self)
            self.transport, self.flow = transport, FlowControl(transport)
            self.server = self._adopted[0].server
        self.seen_at = self.loop.time()
        self.server_state.connection_made()
        if self._adopted is not None:
            self._take_over(*self._adopted)
        elif fd_of(transport) >= self.server_state.crowded_from:
            self.server_state.on_crowded()
        if self.server_state.leave is not None and self in self.connections:  # not one that was upgraded at once
            self.server_state.leave(self)

    def _take_over(self, state: HTTPState, data: bytes) -> None:
        """Go on where another worker stopped; before reading starts."""
        self._adopted = None
        if state.client is not None:
            self.client = state.client
        self.scheme = "https" if state.scheme == "https" else "http"
        if state.keep_alive_until is not None:
            left = min(max(0.0, state.keep_alive_until - time.monotonic()), self.timeout_keep_alive)
            self.timeout_keep_alive_task = self.loop.call_later(left, self.timeout_keep_alive_handler)
        if data:
            self.data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        was_ours = self in self.connections
        super().connection_lost(exc)
        if was_ours:  # an upgraded connection belongs to the WebSocket protocol
            self.server_state.connection_lost()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """A client that sends no more still gets the answers that are due. (TLS has no half-close.)"""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or self.parsed is not cycle or self.scheme == "https":
            return bool(self._unfed) and not self.transport.is_closing()
        if not self._unfed:  # otherwise the next reader of this socket finds its end again
            cycle.keep_alive = False
        self.loop.call_later(self.timeout_keep_alive, self._still_unanswered, cycle, not self.pipeline)
        return True

    def _still_unanswered(self, cycle: RequestResponseCycle, was_alone: bool) -> None:
        """The client sends no more, or has gone away altogether: without a write nobody knows, so this has a limit."""
        if self.transport.is_closing() or cycle.response_started:
            return
        if was_alone:
            self.transport.abort()
        else:  # those before it were being answered: a client that is gone would have been noticed
            self.loop.call_later(self.timeout_keep_alive, self._still_unanswered, cycle, not self.pipeline)

    def timeout_keep_alive_handler(self) -> None:
        if self.is_leaving and (self._unfed or _unread_bytes(self.transport)):
            self.timeout_keep_alive_task = None
            return
        super().timeout_keep_alive_handler()

    def observe(self, now: float) -> None:
        """Called twice a second, so that a request's age is known without a timestamp in the path of each."""
        if self.cycle is not self.seen_cycle:
            self.seen_cycle, self.seen_at = self.cycle, now

    # --- what arrives: never parsed beyond the message in progress, once the connection is leaving -------------------

    def data_received(self, data: bytes) -> None:
        if self.is_leaving or self.parsed is not self.cycle:
            self._feed_carefully(data)
            return
        # uvicorn's, without its calls: they would be felt, beside what is added below.
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
            self.timeout_keep_alive_task = None
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._parser_stopped(error)
        cycle = self.cycle
        if self.parsed is cycle and cycle is not None and cycle.scope is self.scope:
            if self._head:
                self._head = []
        else:
            self._is_incomplete(data)

    def _parser_stopped(self, error: Exception) -> None:
        """uvicorn's: what is no HTTP is answered with 400, and an upgrade is made or warned of."""
        if isinstance(error, httptools.HttpParserUpgrade):
            if self._should_upgrade():
                self.handle_websocket_upgrade()
            else:
                self._unsupported_upgrade_warning()
            return
        text = "Invalid HTTP request received."
        self.logger.warning(text)
        self.send_400_response(text)

    def _is_incomplete(self, data: bytes) -> None:
        """Keep what is needed to know, later, where the message in progress began or ends."""
        if self.cycle is None or self.cycle.scope is not self.scope:
            self._head.append(data)
            if self._head_after is not self.cycle:  # whole messages lie before the head that has begun
                self._head_after = self.cycle
                self._head = [after_last_message(b"".join(self._head))]
                self._head_bytes = 0
            self._head_bytes += len(self._head[-1])
            if self._head_bytes > MAXIMUM_HEAD_BYTES:
                self._refuse_head()
        else:
            self._head = []
            self._splitter = BodySplitter(self.cycle.scope["headers"], data)  # type: ignore[arg-type]

    def _refuse_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self.flow.pause_reading()  # the answers that are due come first; their end resumes it
        elif not self.transport.is_closing():
            self._head = []
            self.logger.warning("A request's head has more than %d bytes.", MAXIMUM_HEAD_BYTES)
            self.send_400_response("Request head too large.")

    def _feed_carefully(self, data: bytes) -> None:
        """Within a body, or leaving: parse to the end of the body, and no further in one call."""
        while data and self.parsed is not self.cycle and not self.transport.is_closing():
            assert self._splitter is not None
            size = self._splitter.piece(data, self._body_bytes if self._body_of is self.cycle else 0)
            HttpToolsProtocol.data_received(self, data[:size])
            data = data[size:]
        if self.transport.is_closing():
            return
        if not self.is_leaving:
            if data:
                self.data_received(data)
            return
        if data:
            self._unset_keepalive_if_required()
            self._unfed.append(data)
            if sum(map(len, self._unfed)) > MAXIMUM_UNFED_BYTES:
                self.flow.pause_reading()
        self._move_soon()

    def on_body(self, body: bytes) -> None:
        """uvicorn's, and the bytes are counted."""
        if self._body_of is not self.cycle:
            self._body_of, self._body_bytes = self.cycle, 0
        self._body_bytes += len(body)
        if (self.parser.should_upgrade() and self._should_upgrade()) or self.cycle.response_complete:
            return
        self.cycle.body += body
        if len(self.cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        self.cycle.message_event.set()

    def on_message_complete(self) -> None:
        """uvicorn's, and the end of the message is noted; a frame more for each request would be felt."""
        self.parsed = self.cycle
        if (self.parser.should_upgrade() and self._should_upgrade()) or self.cycle.response_complete:
            return
        self.cycle.more_body = False
        self.cycle.message_event.set()

    # --- moving -----------------------------------------------------------------------------------------------------

    @property
    def is_movable(self) -> bool:
        """The state of TLS lies in this process and stays here."""
        return self.transport.get_extra_info("sslcontext") is None

    def begin_move(self, mailbox: int | None = None) -> None:
        """Move at the first quiet moment: when what has begun is answered, and every byte of it is written.

        `mailbox`: to this receiver rather than to any.
        """
        if self.is_leaving or self._is_ending:
            return
        if not self.is_movable:
            self.begin_drain()
            return
        self.is_leaving, self._mailbox = True, mailbox
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.on_response = self._answered  # the newest; those before it are answered first
        self._move_soon()

    def _answered(self) -> None:
        self.on_response_complete()
        self._move_soon()

    def _move_soon(self) -> None:
        self.loop.call_soon(self._move_if_quiet)

    def _move_if_quiet(self) -> None:
        if not self._is_quiet or self._is_posted:
            return
        if self.transport.get_write_buffer_size():
            self.flow.pause_reading()
            self.transport.set_write_buffer_limits(high=0)  # so that resume_writing says when it is empty
            return
        self._is_posted = True
        self.server_state.mover.post(self, self._mailbox)

    @property
    def _is_quiet(self) -> bool:
        if not self.is_leaving or self.pipeline or self.transport.is_closing():
            return False
        cycle = self.cycle
        return cycle is None or (cycle.response_complete and self.parsed is cycle)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.is_leaving:
            self._move_soon()

    def letter(self) -> tuple[HTTPState, bytes, Sequence[int]] | None:
        """The connection as another worker takes it over; the fd is borrowed."""
        if not self._is_posted or not self._is_quiet:
            return None
        data = after_last_message(b"".join(self._head)) + b"".join(self._unfed)
        timer, until = self.timeout_keep_alive_task, None
        if timer is not None and not data:
            until = time.monotonic() + timer.when() - self.loop.time()
        state = HTTPState(
            client=self.client,
            server=_with_port(self.server),
            scheme=self.scheme or "http",
            is_answered=self._was_answered or self.cycle is not None,
            keep_alive_until=until,
        )
        return state, data, (self.transport.get_extra_info("socket").fileno(),)

    def waits(self) -> None:
        if self._is_posted and not self.transport.is_closing():  # it may stay after all
            self.flow.pause_reading()

    def moved(self) -> None:
        self._unset_keepalive_if_required()
        self.transport.abort()  # nothing is left to be written; the connection lives on in the letter

    def refused(self) -> None:
        """It cannot move, so it ends here."""
        self.begin_drain()

    def cancel_move(self) -> None:
        """Where there was no quiet moment, or no room, until now."""
        if self.is_leaving and not self.transport.is_closing():
            self._stay()

    def is_busy(self) -> bool:
        """A request is in progress, or begun."""
        return not self.is_answered

    def _stay(self) -> None:
        """Not leaving any more: what came meanwhile is parsed after all."""
        self.is_leaving = self._is_posted = False
        data, self._unfed = b"".join(self._unfed), []
        self.flow.resume_reading()
        if data:
            self.data_received(data)

    # --- ending -----------------------------------------------------------------------------------------------------

    @property
    def is_answered(self) -> bool:
        """Every request that has begun is answered, and there was at least one."""
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is None:
            return self._was_answered and self.scope is None
        return cycle.response_complete and cycle.scope is self.scope

    def begin_drain(self) -> None:
        """Finish what has begun, announce the end, and close. A connection that never got an answer is waited for."""
        if self._is_ending:
            return
        self._is_ending = True
        self._start_asgi_task = self._start_last  # type: ignore[method-assign]
        if self.is_leaving:
            self._stay()
        if self.cycle is not None and not self.cycle.response_complete:
            for cycle in (self.cycle, *(waiting for waiting, _ in self.pipeline)):
                LastCycle.make(cycle, self)
        elif self.is_answered:
            self.linger()

    def _start_last(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        LastCycle.make(cycle, self)
        type(self)._start_asgi_task(self, cycle, app)

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
            self.transport.set_protocol(Discard(self))
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
        return Hold(kind, address(self.client), path, now - self.seen_at)


def _with_port(address: tuple[str, int | None] | None) -> tuple[str, int] | None:
    """None for the path of a unix socket, which may be no text that a letter can hold."""
    return None if address is None or address[1] is None else (address[0], address[1])


def _unread_bytes(transport: asyncio.Transport) -> int:
    """What the kernel has for us that the event loop has not read yet (FIONREAD, tcp(7))."""
    connection = transport.get_extra_info("socket")
    count = array.array("i", [0])
    fcntl.ioctl(connection.fileno(), termios.FIONREAD, count)
    return count[0]
