"""The thread's side of the WSGI bridge: a few threads, one queue to them, one way back to the loop (PEP 3333)."""

from __future__ import annotations

import asyncio
import io
import logging
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Final, TypeAlias
from wsgiref.types import WSGIApplication

Message: TypeAlias = dict[str, Any]
ExcInfo: TypeAlias = tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None]

# How far a thread may run ahead of the client. Each chunk costs some bytes more than it is long, so that many
# tiny ones are bounded too.
UNSENT_LIMIT_BYTES: Final = 65536
CHUNK_OVERHEAD_BYTES: Final = 256
READ_BUFFER_BYTES: Final = 65536
NAME_CACHE_LIMIT: Final = 1024
NAME_CACHE_LENGTH_LIMIT: Final = 64

PULL: Final[Message] = {"type": "pull"}  # in an outbox: the thread waits for a piece of the request's body
END: Final[Message] = {"type": "end"}  # in an outbox: the application failed

# RFC 9110 7.6.1: what concerns this connection is the server's to say. `Connection: close` is allowed to pass.
_HOP_BY_HOP: Final = frozenset({b"keep-alive", b"te", b"trailer", b"trailers", b"transfer-encoding", b"upgrade"})
_illegal_name: Final = re.compile(rb"[^!#$%&'*+\-.^_`|~0-9a-z]").search
_illegal_value: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]").search


class ClientGone(ConnectionError):
    """The client left before its request was read, or before its answer was written."""


class ResponseNames:
    """Names of response headers as lower-case bytes, a bounded cache; None: a header that is not passed on."""

    def __init__(self) -> None:
        self._known: dict[str, bytes | None] = {}
        self.get = self._known.get

    def add(self, name: str) -> bytes | None:
        """Raises TypeError for what is no str, ValueError for what is no header's name."""
        if not isinstance(name, str):
            raise TypeError(f"response header {name!r}: names are str in WSGI, not {type(name).__name__}; decode it")
        encoded: bytes | None = name.strip().lower().encode("latin-1")
        assert encoded is not None
        if not encoded or _illegal_name(encoded):
            raise ValueError(f"response header {name!r}: not the name of a header; use letters, digits and hyphens")
        if encoded in _HOP_BY_HOP:
            encoded = None
        if len(self._known) < NAME_CACHE_LIMIT and len(name) <= NAME_CACHE_LENGTH_LIMIT:
            self._known[name] = encoded
        return encoded


class Returns:
    """The way from the threads to the loop: many posts that come close together cost one wake-up."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._posted: deque[Exchange] = deque()  # bounded by the number of requests that are running
        self._is_awake = False

    def post(self, exchange: Exchange) -> None:
        """From any thread: resolve the exchange's waiter soon. A closed loop hears nothing."""
        self._posted.append(exchange)
        # Appended before the flag is looked at, and the flag is cleared before the deque is emptied: nothing is lost.
        if not self._is_awake:
            self._is_awake = True
            self.call(self._deliver)

    def call(self, callback: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def _deliver(self) -> None:
        self._is_awake = False
        posted = self._posted
        while posted:
            waiter = posted.popleft().waiter
            if not waiter.done():
                waiter.set_result(None)


class Exchange:
    """One request and its answer, seen from the thread that runs the application.

    A short answer is left in `start` and `final`, and posted once. Everything else (chunks, asking for the body) goes
    through `outbox`, which the loop works off in order, paying for each chunk with a credit of its cost.
    The thread writes every field except `waiter` and `is_gone`, which are the loop's.
    """

    __slots__ = (
        "_credits", "_has_body", "_has_started", "_headers", "_is_over", "_left", "_logger", "_names", "_returns",
        "_status", "_unsent_bytes", "environ", "error", "final", "is_gone", "outbox", "start", "waiter",
    )  # fmt: skip

    def __init__(
        self,
        environ: dict[str, Any],
        returns: Returns,
        names: ResponseNames,
        logger: logging.Logger,
        waiter: asyncio.Future[None],
    ) -> None:
        self.environ = environ
        self.waiter = waiter
        self.is_gone = False
        self.outbox: deque[Message] | None = None  # bounded by UNSENT_LIMIT_BYTES
        self.error: BaseException | None = None
        self._returns = returns
        self._names = names
        self._logger = logger
        self._status = 0
        self._left: int | None = None
        self._has_started = False
        self._is_over = False

    # What the pool's thread calls

    def run(self, app: WSGIApplication) -> None:
        """Run the application and pass its answer on. Never raises."""
        if self.is_gone:
            return
        try:
            answer = app(self.environ, self.start_response)
            try:
                self._answer(answer)
            finally:
                close = getattr(answer, "close", None)
                if close is not None:
                    close()
        except BaseException as error:  # the application may raise anything: uvicorn logs it, or we do
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self._is_over and not self.is_gone:
            self._is_over = True
            self.error = error
            if self.outbox is not None:
                self.outbox.append(END)
            self._returns.post(self)
        elif not isinstance(error, ClientGone):
            path = self.environ.get("PATH_INFO")
            self._logger.error("WSGI application failed after its answer was over, path %s", path, exc_info=error)

    # What the application calls

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: ExcInfo | None = None, /
    ) -> Callable[[bytes], object]:
        if exc_info is not None:
            try:
                if (self._has_started or self._is_over) and exc_info[1] is not None:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None  # PEP 3333: no circular reference through the traceback
        elif self._status:
            raise AssertionError(
                "start_response: called a second time without exc_info; call it once, or pass exc_info"
            )
        if type(headers) is not list:
            raise TypeError(f"start_response: headers are a list of pairs, not {type(headers).__name__}")
        self._status = code = _status_code(status)
        self._has_body = has_body = code >= 200 and code != 204 and code != 304
        self._left = None
        known = self._names.get
        encoded: list[tuple[bytes, bytes]] = []
        self._headers = encoded
        for name, value in headers:
            key = known(name) or self._names.add(name)
            if key is None:
                continue
            if _illegal_value(value):
                raise ValueError(f"response header {name}: {value!r} has control characters; remove them")
            if key == b"content-length":
                if not has_body:
                    continue  # RFC 9110 8.6: none in 204; in 304 uvicorn would wait for a body as long as it says
                self._left = _length(value)
            encoded.append((key, value.encode("latin-1")))
        return self.write

    def write(self, chunk: bytes, /) -> None:
        """The old imperative way to send: blocks while the client is slow. Raises ClientGone."""
        if chunk:
            self._chunk(chunk)

    # From the application's answer to messages

    def _answer(self, answer: Iterable[bytes]) -> None:
        kind = type(answer)
        is_known = kind is list or kind is tuple or (hasattr(kind, "__len__") and len(answer) == 1)  # type: ignore[arg-type]
        if is_known and not self._has_started and not self._is_over:
            self._whole(b"".join(answer))
            return
        for chunk in answer:
            if not chunk:
                continue
            if self._is_over:
                if self._sends_body():
                    self._warn_surplus()
                return
            self._chunk(chunk)
        if self._is_over:
            return
        if self._has_started:
            self._last(b"")
        else:
            self._short(b"")

    def _whole(self, body: bytes) -> None:
        if self._left is not None and len(body) > self._left and self._sends_body():
            self._warn_surplus()
        self._short(body)

    def _sends_body(self) -> bool:
        return self._has_body and self.environ["REQUEST_METHOD"] != "HEAD"

    def _warn_surplus(self) -> None:
        path = self.environ["PATH_INFO"]
        self._logger.error("WSGI application sent more than its Content-Length, path %s: the rest is cut", path)

    def _short(self, body: bytes) -> None:
        """The whole answer is known: it goes to the loop in one hop."""
        if not self._status:
            raise AssertionError("WSGI application: it did not call start_response before its answer")
        if not self._has_body:
            body = b""
        elif self._left is None:
            if body or self.environ["REQUEST_METHOD"] != "HEAD":  # else the length of a GET is not known
                self._headers.append((b"content-length", b"%d" % len(body)))
        elif len(body) > self._left:
            body = body[: self._left]
        self._is_over = True
        self.start = {"type": "http.response.start", "status": self._status, "headers": self._headers}
        self.final = {"type": "http.response.body", "body": body}
        if self.outbox is not None:
            self.outbox.append(self.start)
            self.outbox.append(self.final)
        self._returns.post(self)

    def _chunk(self, chunk: bytes) -> None:
        if not isinstance(chunk, bytes):
            raise TypeError(f"WSGI application: its answer yields {type(chunk).__name__}, not bytes; encode it")
        if not self._status:
            raise AssertionError("WSGI application: it did not call start_response before its answer")
        if self._is_over:
            return
        left = self._left
        if not self._sends_body():
            left, chunk = 0, b""
        if left is not None and len(chunk) >= left:
            # Nothing can follow: the answer is complete before the application is asked for more, or closed.
            if self._has_started:
                self._last(chunk[:left])
            else:
                self._short(chunk)
            if len(chunk) > left:
                self._warn_surplus()
            return
        if left is not None:
            self._left = left - len(chunk)
        self._stream(chunk)

    def _stream(self, chunk: bytes) -> None:
        """Send a chunk that is not known to be the last, at once; wait while too much is unsent."""
        if self.is_gone:
            raise ClientGone("the client left before the whole answer was written")
        if not self._has_started:
            self._credits: SimpleQueue[int] = SimpleQueue()
            self._has_started = True  # after the queue is there: `abandon` looks at this
            self._unsent_bytes = 0
            if self.outbox is None:
                self.outbox = deque()
            self.outbox.append({"type": "http.response.start", "status": self._status, "headers": self._headers})
        assert self.outbox is not None
        self.outbox.append({"type": "http.response.body", "body": chunk, "more_body": True})
        self._returns.post(self)
        self._unsent_bytes += len(chunk) + CHUNK_OVERHEAD_BYTES
        while self._unsent_bytes > UNSENT_LIMIT_BYTES:
            if self.is_gone:
                raise ClientGone("the client left before the whole answer was written")
            self._unsent_bytes -= self._credits.get()

    def _last(self, chunk: bytes) -> None:
        self._is_over = True
        assert self.outbox is not None
        self.outbox.append({"type": "http.response.body", "body": chunk})
        self._returns.post(self)

    # What the loop, and the body, call

    def ask_for_body(self) -> None:
        """From the thread: one message of the request's body is wanted. Raises ClientGone when there is none to get."""
        if self.is_gone or self._is_over:
            raise ClientGone("the request's body can no longer be read; read it before the answer ends")
        if self.outbox is None:
            self.outbox = deque()
        self.outbox.append(PULL)
        self._returns.post(self)

    def credit(self, chunk: bytes) -> None:
        """From the loop: the chunk was taken by the transport."""
        self._credits.put(len(chunk) + CHUNK_OVERHEAD_BYTES)

    def abandon(self) -> None:
        """From the loop, at the end: nobody reads the outbox any more; a thread that waits for it wakes up."""
        self.is_gone = True
        if self._has_started:
            self._credits.put(0)


class Body(io.RawIOBase):
    """A request's body that is fetched from the loop in pieces, as far as the application reads it.

    The thread reads; the loop answers each `ask_for_body` with exactly one `put`. Wrap it in a BufferedReader.
    """

    def __init__(self) -> None:
        self._answers: SimpleQueue[tuple[bytes, bool] | None] = SimpleQueue()
        self._piece = memoryview(b"")
        self._has_more = True
        self.exchange: Exchange | None = None

    def put(self, piece: bytes, has_more: bool) -> None:
        """From the loop: what came."""
        self._answers.put((piece, has_more))

    def put_gone(self) -> None:
        """From the loop: nothing will come. Harmless where nobody waits."""
        self._answers.put(None)

    def preset(self, piece: bytes, has_more: bool) -> None:
        """Before the thread has it: a piece that is here already needs no asking."""
        self._piece = memoryview(piece)
        self._has_more = has_more

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Blocks until something is there; 0 at the end. Raises ClientGone for a body that was cut off."""
        while not self._piece and self._has_more:
            self._fetch()
        count = min(len(buffer), len(self._piece))
        buffer[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count

    def readall(self) -> bytes:
        pieces = [bytes(self._piece)]
        self._piece = memoryview(b"")
        while self._has_more:
            self._fetch()
            pieces.append(bytes(self._piece))
            self._piece = memoryview(b"")
        return b"".join(pieces)

    def _fetch(self) -> None:
        assert self.exchange is not None
        self.exchange.ask_for_body()
        answer = self._answers.get()
        if answer is None:
            raise ClientGone("the client left before the whole request was read")
        piece, self._has_more = answer
        self._piece = memoryview(piece)


class Threads:
    """A fixed number of threads that run exchanges in the order of their coming.

    The queue has no limit of its own: a connection has one request in it at most, so `--limit-concurrency` bounds it.
    The threads are daemons: one that hangs in the application never keeps the process.
    """

    def __init__(self, app: WSGIApplication, count: int) -> None:
        self._queue: SimpleQueue[Exchange | None] = SimpleQueue()
        self._workers = [_Worker(app, self._queue, number) for number in range(count)]
        self._submitted = 0

    def start(self, on_end: Callable[[], None]) -> None:
        """`on_end` is called by each thread as its last act."""
        for worker in self._workers:
            worker.on_end = on_end
            worker.start()

    def submit(self, exchange: Exchange) -> None:
        """From the loop only."""
        self._submitted += 1
        self._queue.put(exchange)

    @property
    def pending(self) -> int:
        """Requests that are queued or running; one counts until its iterable is closed."""
        return self._submitted - sum(worker.ended for worker in self._workers)

    def close(self) -> None:
        """The threads end when what is queued by now is done."""
        for _ in self._workers:
            self._queue.put(None)

    @property
    def paths(self) -> list[str]:
        """Where the threads are that still run."""
        environs = [worker.environ for worker in self._workers]
        return [str(environ.get("PATH_INFO")) for environ in environs if environ is not None]


class _Worker(threading.Thread):
    """`ended` is written by this thread only, so that no counter needs a lock."""

    def __init__(self, app: WSGIApplication, queue: SimpleQueue[Exchange | None], number: int) -> None:
        super().__init__(name=f"wsgi-{number}", daemon=True)
        self._app = app
        self._queue = queue
        self.ended = 0
        self.environ: dict[str, Any] | None = None
        self.on_end: Callable[[], None] = lambda: None

    def run(self) -> None:
        app, get = self._app, self._queue.get
        while (exchange := get()) is not None:
            self.environ = exchange.environ
            exchange.run(app)
            self.environ = None
            del exchange  # or the request would live until the next one comes
            self.ended += 1
        self.on_end()


def _status_code(status: str) -> int:
    if not isinstance(status, str):
        raise TypeError(f"start_response: status {status!r} is {type(status).__name__}; it is a str like '200 OK'")
    code = status[:3]
    if not (code.isascii() and code.isdigit() and status[3:4] in ("", " ")) or not 200 <= int(code) <= 599:
        raise ValueError(f"start_response: status {status!r} is none; it is a str like '200 OK', from 200 to 599")
    return int(code)


def _length(value: str) -> int:
    if not (value.isascii() and value.isdigit()):
        raise ValueError(f"response header Content-Length: {value!r} is not a number of bytes")
    return int(value)
