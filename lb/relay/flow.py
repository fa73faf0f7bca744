"""One direction of a relayed connection: bytes from a source socket to a sink socket, in order, with the same ending.

Small exchanges are received and sent. Once the direction turns out to be bulk its bytes go through a pipe with
splice(2), and never into this process. At most one chunk, or one pipe, lies between the two sockets.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import os
import socket
from collections.abc import Sequence
from typing import Protocol

import msgspec

from lb.relay.loop import DATA, Loop

CHUNK_BYTES = 64 * 1024
PIPE_BYTES = 1024 * 1024
LARGE_BYTES = 32 * 1024
"""Of one chunk. Not the whole: who reads as quickly as the other writes gets a segment, of loopback 65,483 bytes."""
BULK_CHUNKS = 4
"""So many large chunks more than others make a direction bulk. A pipe for each connection would cost too much."""
SPLICES_PER_TURN = 2
_SPLICE_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class Result(enum.Enum):
    """Of one `pump` or `flush`."""

    OPEN = "open"
    """Nothing to do but wait for the source."""
    MORE = "more"
    """The same, but there may be something already, of which nobody will tell: watch the source anew."""
    BLOCKED = "blocked"
    """The sink takes no more for now: do not read on, flush when it can be written."""
    ENDED = "ended"
    """The source sends no more, and all of it is delivered: shut the sink's writing down."""
    RESET = "reset"
    """The source was reset, and what came before is delivered: reset the sink."""
    SINK_GONE = "sink gone"
    """The sink takes nothing any more. What comes from it may still be worth reading."""


_OPEN, _BLOCKED, _ENDED = Result.OPEN, Result.BLOCKED, Result.ENDED  # an attribute of an enum is slow to find


class FlowState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What another process must know to go on with it."""

    total: int = 0
    pending: bytes = b""
    is_read: bool = True
    is_written: bool = True
    full_chunks: int = 0
    is_bulk: bool = False
    piped: int = 0
    """Bytes in the pipe, whose ends come along only if there are any."""
    is_reset: bool = False


# What was received goes on before anything else is: one buffer is enough, and nothing is allocated for an exchange.
_BUFFER = memoryview(bytearray(CHUNK_BYTES))
_SMALL_BYTES = 4096
_VIEWS: dict[int, memoryview] = {}
"""Of the buffer's begin, by their size, from the first of it on: exchanges are small, and of few sizes."""


class Owner(Protocol):
    """Of a flow."""

    def event(self, flow: Flow, mask: int) -> None:
        """At the flow's source, and it is not just data, or none is wanted."""

    def act(self, flow: Flow, result: Result) -> None:
        """Data has come, and the flow does not simply go on."""


class Nobody:
    """The owner of a flow that is over."""

    def event(self, flow: Flow, mask: int) -> None:
        pass

    def act(self, flow: Flow, result: Result) -> None:
        pass


NOBODY = Nobody()


class Flow:
    """Borrows both sockets, which do not block. Owns its pipe."""

    __slots__ = (
        *("_full_chunks", "_is_reset", "_loop", "_pending", "_pipe", "_piped", "_sink", "_small_bytes", "_source"),
        *("has_pending", "is_quick", "is_read", "is_watched", "is_written", "last_at", "owner", "total"),
    )

    def __init__(self, source: socket.socket, sink: socket.socket, is_quick: bool, loop: Loop, owner: Owner) -> None:
        """`is_quick`: the kernel returns less than it was asked for only where it has no more, but for urgent bytes."""
        self._source, self._sink, self._loop = source, sink, loop
        self.owner = owner
        self.is_quick = is_quick
        """It need be told only once of data: there is no large amount, and nothing to stop at before its end."""
        self.is_read = self.is_written = self.is_watched = True
        """The source has not ended; the sink is not shut down; data is to be read when it comes."""
        self.has_pending = self._is_reset = False
        """Something waits for the sink; splice(2) has taken the source's error away: what looks like an end is that
        reset."""
        self._pending: memoryview | None = None
        self._pipe: tuple[int, int] | None = None
        self._piped = self._full_chunks = self.total = 0
        """Bytes in the pipe; see BULK_CHUNKS; bytes taken from the source."""
        self._small_bytes = LARGE_BYTES
        """A chunk that is smaller does not change whether the direction is bulk; 0: each one does, or it is bulk."""
        self.last_at = loop.now
        """When something happened at the source, on the monotonic clock."""

    @property
    def is_bulk(self) -> bool:
        return self._pipe is not None

    def put(self, data: bytes) -> None:
        """Bytes that go before everything else. Only before the first pump; flush then."""
        assert not self.has_pending
        if data:
            self._pending = memoryview(data)
            self.has_pending = True

    def state(self) -> tuple[FlowState, tuple[int, ...]]:
        """For another process, between two calls; and the ends of the pipe, borrowed, if something is in it."""
        state = FlowState(
            total=self.total,
            pending=bytes(self._pending) if self._pending is not None else b"",
            is_read=self.is_read,
            is_written=self.is_written,
            full_chunks=self._full_chunks,
            is_bulk=self._pipe is not None,
            piped=self._piped,
            is_reset=self._is_reset,
        )
        return state, self._pipe if self._pipe is not None and self._piped else ()

    def go_on(self, state: FlowState, pipe: Sequence[int]) -> None:
        """From where another process was. Takes ownership of both ends, if they are given."""
        self.put(state.pending)
        self.total, self._full_chunks = state.total, state.full_chunks
        if self._full_chunks or state.is_bulk:
            self._small_bytes, self.is_quick = 0, False
        self.is_read, self.is_written, self._is_reset = state.is_read, state.is_written, state.is_reset
        if pipe:
            self._pipe, self._piped, self.has_pending = (pipe[0], pipe[1]), state.piped, True
        elif state.is_bulk:
            self._pipe = _pipe()

    def event(self, mask: int) -> None:
        """Something happened at the source: data of a small exchange, as a rule, which the sink takes as a whole."""
        self.last_at = self._loop.now
        if mask != DATA or not self.is_watched or not self._small_bytes:
            self.owner.event(self, mask)
            return
        size = 0
        try:
            size = self._source.recv_into(_BUFFER)
            sent = self._sink.send(_VIEWS[size])
        except (OSError, KeyError) as error:
            result = self._failed(size, error)
        else:
            self.total += size
            if sent == size:
                return
            result = self._stored(_VIEWS[size], sent)
        if result is not _OPEN:
            self.owner.act(self, result)

    def _failed(self, size: int, error: OSError | KeyError) -> Result:
        """In the path above: to receive, if nothing was; to find a view, for an end and for a new size; or to send."""
        if isinstance(error, KeyError):
            return self._pass_on(size)
        if not size:
            return _OPEN if isinstance(error, BlockingIOError) else Result.RESET
        self.total += size
        return self._stored(_VIEWS[size], 0) if isinstance(error, BlockingIOError) else Result.SINK_GONE

    def pump(self) -> Result:
        """The source can be read, and nothing is pending."""
        if self._pipe is not None:
            result = self._splice(*self._pipe)
            if result is not None:
                return result
        try:
            size = self._source.recv_into(_BUFFER)
        except BlockingIOError:
            return _OPEN
        except OSError:
            return Result.RESET
        return self._pass_on(size)

    def _pass_on(self, size: int) -> Result:
        """What was received."""
        if size == 0:
            return Result.RESET if self._is_reset else _ENDED
        self.total += size
        view = _VIEWS.get(size)
        if view is None:
            view = _BUFFER[:size]
            if size < _SMALL_BYTES:
                _VIEWS[size] = view
        try:
            sent = self._sink.send(view)
        except BlockingIOError:
            sent = 0
        except OSError:
            return Result.SINK_GONE
        return _OPEN if sent == size < self._small_bytes else self._stored(view, sent)

    def _stored(self, view: memoryview, sent: int) -> Result:
        """Of a chunk that is large, or comes after large ones, or that the sink did not take as a whole."""
        was_quick = self.is_quick
        if len(view) >= LARGE_BYTES:
            self._full_chunks += 1
            self.is_quick = False
            if self._full_chunks == BULK_CHUNKS and self._pipe is None:
                self._pipe = _pipe()
        elif self._full_chunks:
            self._full_chunks -= 1
        self._small_bytes = 0 if self._full_chunks else LARGE_BYTES
        if sent < len(view):
            self._pending = memoryview(bytes(view[sent:]))
            self.has_pending = True
            return _BLOCKED
        return Result.MORE if was_quick and not self.is_quick else _OPEN

    def flush(self) -> Result:
        """The sink can be written."""
        try:
            if self._pending is not None:
                sent = self._sink.send(self._pending)
                if sent < len(self._pending):
                    self._pending = self._pending[sent:]
                    return _BLOCKED
                self._pending = None
            if self._piped and self._pipe is not None:
                self._piped -= os.splice(self._pipe[0], self._sink.fileno(), self._piped, flags=_SPLICE_FLAGS)
        except BlockingIOError:
            return _BLOCKED
        except OSError:
            return Result.SINK_GONE
        if self._piped:
            return _BLOCKED
        self.has_pending = False
        return _OPEN

    def end(self) -> None:
        """Nothing happens any more. Its owner and it do not keep each other alive."""
        self.owner, self.is_watched = NOBODY, False

    def close(self) -> None:
        """Let go of what is on its way."""
        if self._pipe is not None:
            for end in self._pipe:
                os.close(end)
            self._pipe, self._piped = None, 0
        self._pending = None
        self.has_pending = False

    def _splice(self, reader: int, writer: int) -> Result | None:
        """None: it takes nothing, and recv is to say why. Of a socket that can be read, splice(2) takes nothing where
        its next byte is urgent (tcp(7)), and calls that an end when a FIN has come as well."""
        source, sink = self._source.fileno(), self._sink.fileno()
        for turn in range(SPLICES_PER_TURN):
            try:
                taken = os.splice(source, writer, PIPE_BYTES, flags=_SPLICE_FLAGS)
            except BlockingIOError:
                return _OPEN if turn else None
            except OSError:
                self._is_reset = True  # which is told once; what has come before it may still be there for recv
                return None
            if taken == 0:
                return None
            self.total += taken
            self._piped, self.has_pending = taken, True
            try:
                self._piped -= os.splice(reader, sink, taken, flags=_SPLICE_FLAGS)
            except BlockingIOError:
                return _BLOCKED
            except OSError:
                return Result.SINK_GONE
            if self._piped:
                return _BLOCKED
            self.has_pending = False
        return _OPEN


def _pipe() -> tuple[int, int] | None:
    """None where there can be none: then the direction goes on as it did."""
    try:
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with contextlib.suppress(OSError):  # pipe(7): past the user's limit of pages it stays small
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return reader, writer
