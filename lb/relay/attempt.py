"""A client that has no backend yet: its PROXY header is read, and its ClientHello where pools depend on that; it waits
in the queue; a connection is made for it.

Another backend is tried as long as nothing was written to one. The client is watched: one that leaves gives its place
back at once.
"""

from __future__ import annotations

import enum
import errno
import os
import socket
from typing import TYPE_CHECKING

import msgspec

from handoff.core.proxy_protocol import (
    V2_MAXIMUM_BYTES,
    Absent,
    Address,
    Header,
    Incomplete,
    ProxyError,
    encode_v1,
    encode_v2,
    read_header,
)
from lb.core.client_hello import (
    MAXIMUM_HELLO_BYTES,
    ClientHello,
    ClientHelloReader,
    Malformed,
    NotTLS,
    read_client_hello,
)
from lb.core.client_hello import Incomplete as IncompleteHello
from lb.page import CONNECT_NANOSECONDS, FAILED, TOTAL
from lb.relay import connecting
from lb.relay.dispatcher import RETRY_SECONDS, Dispatcher, Nobody
from lb.relay.loop import ERROR, LEAVING, READ, WRITE, Loop
from lb.relay.relay import reset_at_close
from lb.relay.targets import Target

if TYPE_CHECKING:
    from lb.relay.engine import Engine

HEADER_SECONDS = 5.0
LOOK_SECONDS = 0.02
"""A connection that takes longer to make is worth a look at whether the client is still there."""
_OURS = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL, errno.EAGAIN))
"""No fault of the backend: fds, memory or ports of ours; EAGAIN: a unix socket whose queue is full just now."""


class Phase(enum.Enum):
    """For the log: in which phase it ended."""

    HEADER = "R"
    HELLO = "H"
    QUEUE = "Q"
    CONNECT = "C"


_QUEUE, _CONNECT = Phase.QUEUE, Phase.CONNECT  # an attribute of an enum is slow to find


class AttemptState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What another process must know to go on with it. Times are of the monotonic clock, which all share."""

    phase: Phase
    """QUEUE for HELLO, which not every release knows."""
    began_at: float
    deadline: float
    first: bytes = b""
    source: Address | None = None
    destination: Address | None = None
    is_reading_hello: bool = False
    has_no_hello: bool = False
    """It was waited for, or something else came."""


class Attempt:
    """Owns the client's socket until it is relayed or closed. The engine hears how it ended."""

    __slots__ = (
        *("_began_connecting", "_deadline", "_dispatcher", "_engine", "_first", "_is_watched", "_loop", "_server"),
        *("_failure", "_last", "_reader", "_target", "_tried", "began_at", "bucket", "client", "counted_as"),
        *("destination", "due_at", "hello", "is_over", "phase", "source"),
    )

    def __init__(self, client: socket.socket, peer: object, dispatcher: Dispatcher, engine: Engine, loop: Loop) -> None:
        self.client, self._dispatcher, self._engine, self._loop = client, dispatcher, engine, loop
        self.source: Address | None = (peer[0], peer[1]) if isinstance(peer, tuple) else None
        """The client's address, as its proxy says; None on a unix socket."""
        self.destination: Address | None = None
        """What it connected to, where a proxy says it."""
        self.counted_as: str | None = None
        """The source whose count it is in."""
        self.hello: ClientHello | NotTLS | None = None
        """What it asks for, where the table wants that known; NotTLS: nothing that could be read."""
        self.phase = _QUEUE
        self.began_at = loop.now
        self.is_over = False
        self._first = b""
        self._is_watched = False
        self.bucket: int | None = None
        self.due_at: float | None = None
        self._deadline = 0.0
        """Of the phase."""
        self._server: socket.socket | None = None
        self._target: Target | None = None
        self._last: Target | None = None
        """It is being connected to, or was tried last."""
        self._tried: tuple[Target, ...] = ()
        self._failure = 0
        """Why the last of them could not be connected to."""
        self._began_connecting = 0.0

    @property
    def target(self) -> Target | None:
        """It is being connected to."""
        return self._target

    @property
    def backend(self) -> str | None:
        """The name of the one that it is being connected to, or that was tried last; for the log."""
        return None if self._last is None or self.phase is not _CONNECT else self._last.endpoint.name

    @property
    def dispatcher(self) -> Dispatcher:
        return self._dispatcher

    @property
    def service(self) -> str:
        return self._dispatcher.route.service

    def begin(self, reads_header: bool) -> None:
        if reads_header:
            self.phase = Phase.HEADER
            self._set_deadline(HEADER_SECONDS)
            self._watch_client(READ)
        else:
            self._begin_connecting()

    def begin_with(self, target: Target, server: socket.socket | None, failure: int) -> None:
        """In place of `begin`, where the engine has begun to connect. Takes ownership of the socket and the place."""
        if not self._has_begun(target, server, failure):
            self._connect_somewhere()

    # --- moving -----------------------------------------------------------------------------------------------------

    def state(self) -> AttemptState:
        """For another process, between two turns. A connection that is being made will be made there."""
        return AttemptState(
            phase=_QUEUE if self.phase is Phase.HELLO else self.phase,
            began_at=self.began_at,
            deadline=self._deadline,
            first=self._first,
            source=self.source,
            destination=self.destination,
            is_reading_hello=self.phase is Phase.HELLO,
            has_no_hello=isinstance(self.hello, NotTLS),
        )

    def let_go(self) -> None:
        """The client is another process's now: nothing is sent, the engine hears nothing. Between two turns."""
        self.is_over = True
        self._give_up()
        self._watch_client(0)  # first, and then closed: the connection lives on, and epoll would keep it
        self._loop.timers.forget(self)
        self.client.close()

    def go_on(self, state: AttemptState) -> None:
        """From where another process was, in place of `begin`."""
        self.began_at, self._first = state.began_at, state.first
        self.source, self.destination = state.source, state.destination
        if state.phase is Phase.HEADER:
            self.phase = Phase.HEADER
            self._set_deadline(max(0.0, state.deadline - self._loop.now))
            self._watch_client(READ)
            return
        self._engine.count_source(self, self._dispatcher, is_let_in=True)
        left = state.deadline - self._loop.now
        if self._dispatcher.reads_hello:
            if state.is_reading_hello:
                self._begin_hello(left)
                return
            self.hello = NotTLS() if state.has_no_hello else _complete(read_client_hello(self._first))
        if not self._connect_somewhere(is_queued=True):
            is_in_queue = state.phase is _QUEUE and not state.is_reading_hello
            self._wait(is_let_in=True, seconds=left if is_in_queue else None)

    # --- the header of a proxy --------------------------------------------------------------------------------------

    def _header_event(self) -> None:
        if not self._receive(V2_MAXIMUM_BYTES):
            return
        try:
            reading = read_header(self._first)
        except ProxyError as error:
            self.end("proxy", str(error))
            return
        match reading:
            case Incomplete():
                return
            case Header(size, source, destination):
                self._first = self._first[size:]
                self.source, self.destination = source or self.source, destination
            case Absent() if self._dispatcher.route.accept_proxy == "require":
                self.end("proxy", "no PROXY header")
                return
        self._header_is_done()

    def _header_is_done(self) -> None:
        self._watch_client(0)
        self._begin_connecting()

    def _receive(self, size: int) -> bytes:
        """What has come, which is in `_first` now. Nothing: there is none yet, or the client has left."""
        try:
            data = self.client.recv(size)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        self._first += data
        if not data:
            self.end("client", "left")
        return data

    # --- the ClientHello ----------------------------------------------------------------------------------------------

    def _begin_hello(self, seconds: float | None = None) -> None:
        """`seconds`: so long is left for it; None: the time of the service."""
        self.phase, self._reader = Phase.HELLO, ClientHelloReader()
        if self._first and self._has_hello(self._first):
            return
        timeout = self._dispatcher.route.timeouts.client_hello_seconds
        self._set_deadline(timeout if seconds is None else max(0.0, seconds))
        self._watch_client(READ)

    def _hello_event(self) -> None:
        data = self._receive(MAXIMUM_HELLO_BYTES)
        if data:
            self._has_hello(data)

    def _has_hello(self, data: bytes) -> bool:
        """Whether it is known now what the client asks for, or that it asks for nothing."""
        is_required = self._dispatcher.route.tls == "require"
        match self._reader.feed(data):
            case IncompleteHello():
                return False
            case ClientHello() as hello:
                self._hello_is(hello)
            case NotTLS() if is_required:
                self.end("proxy", "no TLS")
            case Malformed(reason) if is_required:
                self.end("proxy", reason)
            case _:
                self._hello_is(NotTLS())
        return True

    def _hello_is_late(self) -> None:
        if self._dispatcher.route.tls == "require" or self._first:
            self.end("client", "no ClientHello in time", is_late=True)
        else:  # its protocol may be one in which the server speaks first
            self._hello_is(NotTLS())

    def _hello_is(self, hello: ClientHello | NotTLS) -> None:
        self.hello = hello
        self._watch_client(0)
        self._connect_somewhere()

    # --- a backend --------------------------------------------------------------------------------------------------

    def try_again(self) -> bool:
        """From the front of the queue. False: it must wait on, in its place."""
        return self.is_over or self._connect_somewhere(is_queued=True)

    def table_changed(self) -> None:
        """An attempt that the present table does not allow is given up for another one."""
        if self._target is not None and not self._dispatcher.allows(self._target, self.hello):
            self._give_up()
            self._last = None
            self._connect_somewhere()
        elif self.phase is Phase.HELLO and not self._dispatcher.reads_hello:
            self._watch_client(0)
            self._connect_somewhere()

    def _begin_connecting(self) -> None:
        if self._engine.count_source(self, self._dispatcher):
            self._connect_somewhere()
        else:
            self.end("proxy", "too many of one source")

    def _connect_somewhere(self, is_queued: bool = False) -> bool:
        """False: there is no place, and it stays in the queue, where it was."""
        if self._dispatcher.reads_hello and self.hello is None:
            self._begin_hello()
            return True
        source = self.source[0] if self.source is not None else ""
        while True:
            try:
                target = self._dispatcher.choose(source, self._tried, self._loop.now, self.hello)
            except Nobody:
                self._end_without_backend()
                return True
            if target is None:
                if is_queued:
                    return False
                self._wait()
                return True
            if self._connect(target):
                return True
            is_queued = False

    def _end_without_backend(self) -> None:
        if self._tried:
            self.end("server", os.strerror(self._failure).lower(), is_late=self._failure == errno.ETIMEDOUT)
        else:
            self.end("server", "no backend")

    def _wait(self, is_let_in: bool = False, seconds: float | None = None) -> None:
        """`is_let_in`: whatever the limit of the queue, for so many seconds, None for those of the service."""
        self.phase = _QUEUE
        route = self._dispatcher.route
        if self._dispatcher.waiting >= route.maximum_queue and not is_let_in:
            self.end("proxy", "the queue is full")
            return
        self._dispatcher.wait(self)
        self._set_deadline(route.timeouts.queue_seconds if seconds is None else max(0.0, seconds))
        self._watch_client(LEAVING)
        self._engine.queued(self._dispatcher)

    def _connect(self, target: Target) -> bool:
        """False: it failed at once, and another one may be tried. The target's place is ours."""
        silent_seconds = self._dispatcher.route.timeouts.silent_seconds
        speaks = bool(self._first) or self._engine.is_spoken_to_first(self._dispatcher)
        return self._has_begun(target, *connecting.begin(target, silent_seconds, speaks))

    def _has_begun(self, target: Target, server: socket.socket | None, failure: int) -> bool:
        """As `_connect`, with what `connecting.begin` has made of it."""
        self.phase, self._target, self._last, self._server = _CONNECT, target, target, server
        self._began_connecting = self._loop.now
        if failure == connecting.PENDING:
            assert server is not None
            self._loop.watch(server.fileno(), WRITE, self._server_event)
            self._set_deadline(self._dispatcher.route.timeouts.connect_seconds, look_after=LOOK_SECONDS)
            return True
        if failure == 0:
            self._connected()
            return True
        return self._failed(failure)

    def _server_event(self, _mask: int) -> None:
        assert self._server is not None
        failure = self._server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failure == 0:
            self._connected()
        elif not self._failed(failure):
            self._connect_somewhere()

    def _failed(self, failure: int) -> bool:
        """False: another backend may be tried now. True: this attempt goes on by itself."""
        target = self._target
        assert target is not None
        self._give_up()
        if failure in _OURS:
            left = self.began_at + self._dispatcher.route.timeouts.connect_seconds - self._loop.now
            if left <= 0:
                self.end("proxy", os.strerror(failure).lower())
            else:
                self._watch_client(LEAVING)
                self._set_deadline(min(RETRY_SECONDS, left))
            return True
        target.cells[FAILED] += 1
        if self._dispatcher.measures:
            target.latency.observe(self._dispatcher.route.timeouts.connect_seconds, self._loop.now)
        self._engine.connect_failed(target, os.strerror(failure).lower())
        self._tried += (target,)
        self._failure = failure
        return self.is_over

    def _connected(self) -> None:
        target, server = self._target, self._server
        assert target is not None
        assert server is not None
        self.due_at = self._target = self._server = None
        self.is_over = True
        target.cells[TOTAL] += 1
        if self._dispatcher.measures:
            target.latency.observe(self._loop.now - self._began_connecting, self._loop.now)
        target.cells[CONNECT_NANOSECONDS] += int((self._loop.now - self._began_connecting) * 1e9)
        first = self._proxy_header() + self._first
        self._engine.connected(self, target, server, first, len(self._first))

    def _proxy_header(self) -> bytes:
        version = self._dispatcher.route.send_proxy
        if version == "off":
            return b""
        destination = self.destination
        if destination is None and self.source is not None:
            name = self.client.getsockname()
            destination = (name[0], name[1]) if isinstance(name, tuple) else None
        return (encode_v1 if version == "v1" else encode_v2)(self.source, destination)

    # --- time -------------------------------------------------------------------------------------------------------

    def is_due(self, now: float) -> None:
        if now < self._deadline:  # time for a look
            self._watch_client(LEAVING)
            self.due_at = self._deadline
            return
        self.due_at = None
        match self.phase:
            case Phase.HEADER if self._dispatcher.route.accept_proxy == "require" or self._first:
                self.end("client", "no PROXY header in time", is_late=True)
            case Phase.HEADER:
                self._header_is_done()
            case Phase.HELLO:
                self._hello_is_late()
            case Phase.QUEUE:
                self.end("server", "no place in time", is_late=True)
            case Phase.CONNECT:
                if self._target is None or not self._failed(errno.ETIMEDOUT):
                    self._connect_somewhere()

    def _set_deadline(self, seconds: float, look_after: float | None = None) -> None:
        now = self._loop.now
        self._deadline = now + seconds
        self.due_at = now + min(seconds, look_after or seconds)
        self._loop.timers.arm(self)

    # --- the end ----------------------------------------------------------------------------------------------------

    def _watch_client(self, mask: int) -> None:
        if mask or self._is_watched:
            self._is_watched = bool(mask)
            self._loop.watch(self.client.fileno(), mask, self._client_event)

    def _client_event(self, mask: int) -> None:
        if self.is_over:
            return
        if self.phase is Phase.HEADER:
            self._header_event()
            return
        if self.phase is Phase.HELLO:
            self._hello_event()
            return
        try:  # it has sent a FIN, or a reset; a FIN may be half of a conversation: then it has said something before
            is_there = not mask & ERROR and bool(self._first or self.client.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return
        except OSError:
            is_there = False
        if not is_there:
            self.end("client", "left")

    def end(self, side: str, reason: str, is_late: bool = False) -> None:
        """The client is closed, with a reset unless it has left by itself."""
        if self.is_over:
            return
        self.is_over = True
        self._give_up()
        if side != "client" or is_late:
            reset_at_close(self.client)
        self._loop.close(self.client)
        self._engine.ended(self, side, reason, is_late, self._dispatcher)

    def _give_up(self) -> None:
        """The connection that is being made, and the place at the backend."""
        self.due_at = None
        if self._server is not None:
            self._loop.close(self._server)
            self._server = None
        if self._target is not None:
            target, self._target = self._target, None
            target.give_back()


def _complete(reading: object) -> ClientHello | None:
    return reading if isinstance(reading, ClientHello) else None
