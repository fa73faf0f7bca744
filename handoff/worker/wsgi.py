"""WSGI applications as ASGI 3 callables on the worker's loop: one thread hop there, one back for a short answer."""

from __future__ import annotations

import asyncio
import io
import logging
import sys
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, TypeAlias
from urllib.parse import unquote_to_bytes
from wsgiref.types import WSGIApplication
from wsgiref.util import FileWrapper as StandardFileWrapper

from handoff.worker.wsgi_threads import (
    END,
    NAME_CACHE_LENGTH_LIMIT,
    NAME_CACHE_LIMIT,
    PULL,
    READ_BUFFER_BYTES,
    Body,
    Exchange,
    ResponseNames,
    Returns,
    Threads,
)

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[Any], Awaitable[None]]

# A body up to this length is waited for on the loop: a slow client does not hold a thread for it.
WHOLE_BODY_LIMIT_BYTES: Final = 65536
# While an answer streams, this much unread body is taken in to learn whether the client is still there.
READ_AHEAD_LIMIT_BYTES: Final = 1024 * 1024
FILE_BLOCK_BYTES: Final = 65536
TEMPLATE_CACHE_LIMIT: Final = 64
SHUTDOWN_TIMEOUT_SECONDS: Final = 5.0


class WSGIBridge:
    """An ASGI 3 callable that runs a WSGI application in `threads` threads of its own. Belongs to one loop.

    Threads start with the lifespan, or with the first request. Context variables belong to the thread, as in other
    threaded WSGI servers. An exception of the application before its answer began is raised to the caller.
    """

    def __init__(
        self,
        app: WSGIApplication,
        *,
        threads: int,
        logger: logging.Logger,
        shutdown_timeout_seconds: float = SHUTDOWN_TIMEOUT_SECONDS,
    ) -> None:
        if threads < 1:
            raise ValueError(f"WSGI bridge: {threads} threads are too few; give 1 or more")
        self._threads = Threads(app, threads)
        self._thread_count = threads
        self._logger = logger
        self._shutdown_timeout_seconds = shutdown_timeout_seconds
        self._environs = Environs()
        self._names = ResponseNames()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._returns: Returns | None = None
        self._ended: asyncio.Future[None] | None = None
        self._running_count = 0
        self._is_closed = False

    @property
    def pending(self) -> int:
        """Requests queued for a thread or running in one, until their iterable is closed."""
        return self._threads.pending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._other(scope, receive, send)
            return
        if self._loop is None:
            self._start()
        assert self._loop is not None
        assert self._returns is not None
        environ = self._environs.make(scope)
        body: Body | None = None
        if "CONTENT_LENGTH" not in environ and "HTTP_TRANSFER_ENCODING" not in environ:
            environ["wsgi.input"] = io.BytesIO()
        elif not _is_short(environ):
            body = _open_body(environ, receive)
        elif not await _take_body(environ, receive):
            return
        if self._is_closed:  # looked at after the last wait: behind the close nobody takes from the queue
            await _refuse(send)
            return
        exchange = Exchange(environ, self._returns, self._names, self._logger, self._loop.create_future())
        if body is not None:
            body.exchange = exchange
        self._threads.submit(exchange)
        try:
            await exchange.waiter
            if exchange.outbox is not None:
                await self._relay(exchange, body, receive, send)
            elif exchange.error is None:
                await send(exchange.start)
                await send(exchange.final)
            else:
                _raise(exchange)
        finally:
            exchange.abandon()
            if body is not None:
                body.put_gone()

    async def _relay(self, exchange: Exchange, body: Body | None, receive: Receive, send: Send) -> None:
        """Work off what the thread put into the outbox, until its answer or the client is over."""
        outbox = exchange.outbox
        assert outbox is not None
        assert self._loop is not None
        ahead = _ReadAhead(receive)
        while True:
            if not outbox:
                # A post made before this is in the outbox; one made after it resolves this waiter.
                exchange.waiter = self._loop.create_future()
                if not outbox:
                    await exchange.waiter
                continue
            message = outbox.popleft()
            if message is PULL:
                assert body is not None
                if not await ahead.answer(body):
                    return
            elif message is END:
                _raise(exchange)
            else:
                try:
                    await send(message)
                except OSError:  # ASGI 2.4: how `send` says that the client is gone
                    return
                if message["type"] == "http.response.start":
                    continue
                if not message.get("more_body"):
                    return
                exchange.credit(message["body"])
                if ahead.sees_client_gone():
                    return

    async def _other(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            raise RuntimeError(
                f"WSGI bridge: a scope of type {scope['type']} cannot be served; use an ASGI application"
            )
        await receive()
        if self._loop is None:
            self._start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.aclose(self._shutdown_timeout_seconds)
        await send({"type": "lifespan.shutdown.complete"})

    def _start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._returns = Returns(self._loop)
        if self._is_closed:
            return
        self._ended = self._loop.create_future()
        self._running_count = self._thread_count
        returns = self._returns
        self._threads.start(lambda: returns.call(self._one_ended))

    def _one_ended(self) -> None:
        self._running_count -= 1
        if self._running_count == 0 and self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def close(self) -> None:
        """Take no more requests; the threads end when all that is queued is done. Does not wait."""
        if not self._is_closed:
            self._is_closed = True
            if self._ended is not None:
                self._threads.close()

    async def aclose(self, timeout_seconds: float) -> bool:
        """Close, and wait for the threads to end; after the timeout the log names the hung ones. True: all ended."""
        self.close()
        if self._ended is None:
            return True
        await asyncio.wait((self._ended,), timeout=timeout_seconds)
        if not self._ended.done():
            self._logger.warning(
                "WSGI bridge: %d of %d threads did not end within %g s, left behind; busy with: %s",
                self._running_count,
                self._thread_count,
                timeout_seconds,
                ", ".join(self._threads.paths) or "nothing",
            )
        return self._ended.done()


class Environs:
    """Makes a WSGI environ from an HTTP scope: templates per listener, names of headers from a bounded cache."""

    def __init__(self) -> None:
        self._templates: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._keys: dict[bytes, str] = {}

    def make(self, scope: Scope) -> dict[str, Any]:
        """Everything but `wsgi.input`. Header values, path and query are bytes as latin-1 (PEP 3333)."""
        kind = (scope["server"], scope["scheme"], scope["root_path"], scope["http_version"])
        template = self._templates.get(kind)
        if template is None:
            template = self._template(kind)
        environ = template.copy()
        environ["REQUEST_METHOD"] = scope["method"]
        environ["PATH_INFO"] = _path_info(scope)
        environ["QUERY_STRING"] = scope["query_string"].decode("latin-1")
        client = scope["client"]
        if client is not None:
            environ["REMOTE_ADDR"] = client[0]
            environ["REMOTE_PORT"] = str(client[1])
        keys = self._keys
        for name, value in scope["headers"]:
            key = keys.get(name)
            if key is None:
                key = self._key(name)
            if not key:
                continue
            if key in environ:
                # RFC 9110 5.3; RFC 6265 5.4 for cookies, whose values may hold commas
                separator = ";" if key == "HTTP_COOKIE" else ","
                environ[key] = f"{environ[key]}{separator}{' ' if separator == ';' else ''}{value.decode('latin-1')}"
            else:
                environ[key] = value.decode("latin-1")
        return environ

    def _key(self, name: bytes) -> str:
        """The environ's key for a header; empty for one that is dropped."""
        if b"_" in name or name == b"proxy":
            key = ""  # x_y would pose as x-y; Proxy would become HTTP_PROXY, which clients obey (CVE-2016-5385)
        elif name in (b"content-type", b"content-length"):
            key = name.decode("latin-1").upper().replace("-", "_")
        else:
            key = "HTTP_" + name.decode("latin-1").upper().replace("-", "_")
        if len(self._keys) < NAME_CACHE_LIMIT and len(name) <= NAME_CACHE_LENGTH_LIMIT:
            self._keys[name] = key
        return key

    def _template(self, kind: tuple[Any, ...]) -> dict[str, Any]:
        server, scheme, root_path, http_version = kind
        host, port = server or ("", None)
        if port is None:  # a unix socket: its path is no name of a server
            host, port = "localhost", 443 if scheme == "https" else 80
        template = {
            "SCRIPT_NAME": root_path.rstrip("/").encode("utf-8").decode("latin-1"),
            "SERVER_NAME": host,
            "SERVER_PORT": str(port),
            "SERVER_PROTOCOL": f"HTTP/{http_version}",
            "REMOTE_ADDR": "",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": scheme,
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": True,
            "wsgi.run_once": False,
            "wsgi.file_wrapper": FileWrapper,
            "wsgi.input_terminated": True,
        }
        if len(self._templates) >= TEMPLATE_CACHE_LIMIT:
            self._templates.clear()
        self._templates[kind] = template
        return template


class FileWrapper(StandardFileWrapper):
    """The standard one with blocks that are worth a hop to the loop."""

    def __init__(self, filelike: Any, blksize: int = FILE_BLOCK_BYTES) -> None:
        super().__init__(filelike, max(blksize, FILE_BLOCK_BYTES))


class _ReadAhead:
    """The only reader of `receive` while an answer is under way: for the thread, and to see the client leave."""

    __slots__ = ("_bytes", "_is_gone", "_pieces", "_receive")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._pieces: deque[MutableMapping[str, Any]] = deque()  # bounded by READ_AHEAD_LIMIT_BYTES
        self._bytes = 0
        self._is_gone = False

    async def answer(self, body: Body) -> bool:
        """Give the thread the next piece of the body. False: the client is gone."""
        if self._pieces:
            message = self._pieces.popleft()
            self._bytes -= len(message.get("body", b""))
        else:
            message = await self._receive()
        if message["type"] == "http.disconnect":
            return False
        body.put(message.get("body", b""), message.get("more_body", False))
        return True

    def sees_client_gone(self) -> bool:
        """Look once, without waiting. What nobody reads is taken in up to the limit."""
        if self._bytes >= READ_AHEAD_LIMIT_BYTES:
            return False
        message = _receive_at_once(self._receive)
        if message is None:
            return False
        if message["type"] == "http.disconnect":
            return True
        self._pieces.append(message)
        self._bytes += len(message.get("body", b""))
        return False


def _path_info(scope: Scope) -> str:
    """The path below the root path; from the raw path, because the decoded one has lost bytes that are not UTF-8."""
    raw: bytes | None = scope.get("raw_path")
    if raw is None:
        path: str = scope["path"].encode("utf-8").decode("latin-1")
    elif b"%" in raw:
        path = unquote_to_bytes(raw).decode("latin-1")
    else:
        path = raw.decode("latin-1")
    if scope["root_path"]:
        path = path.removeprefix(scope["root_path"].encode("utf-8").decode("latin-1"))
    return path


def _is_short(environ: dict[str, Any]) -> bool:
    """Whether the body is waited for before a thread is taken. A client that expects 100 waits for the application."""
    length = environ.get("CONTENT_LENGTH", "")
    return (
        length.isdigit()
        and int(length) <= WHOLE_BODY_LIMIT_BYTES
        and "HTTP_EXPECT" not in environ
        and "HTTP_TRANSFER_ENCODING" not in environ
    )


async def _take_body(environ: dict[str, Any], receive: Receive) -> bool:
    """Wait for the whole body. False: the client left in the middle of it."""
    message = await receive()
    whole: bytes = message.get("body", b"")
    while message["type"] == "http.request" and message.get("more_body", False):
        message = await receive()
        whole += message.get("body", b"")
    environ["wsgi.input"] = io.BytesIO(whole)
    return bool(message["type"] == "http.request")


def _open_body(environ: dict[str, Any], receive: Receive) -> Body:
    """A body that the thread asks for piece by piece; the first piece is taken along where it is here already."""
    body = Body()
    environ["wsgi.input"] = io.BufferedReader(body, READ_BUFFER_BYTES)
    if "HTTP_EXPECT" not in environ:  # asking would tell the client to go on
        message = _receive_at_once(receive)
        if message is not None and message["type"] == "http.request":
            body.preset(message.get("body", b""), message.get("more_body", False))
    return body


def _receive_at_once(receive: Receive) -> MutableMapping[str, Any] | None:
    """What `receive` has without waiting, or None: the awaitable is run to its first wait and then closed there.

    A receive that is cancelled loses nothing; that is what any ASGI application with a timeout relies on.
    """
    steps = receive().__await__()
    try:
        next(steps)
    except StopIteration as done:
        message: MutableMapping[str, Any] = done.value
        return message
    steps.close()  # a generator, or the wrapper of a coroutine
    return None


def _raise(exchange: Exchange) -> None:
    error = exchange.error
    exchange.error = None
    assert error is not None
    try:
        raise error
    finally:
        del error  # the traceback holds this frame


async def _refuse(send: Send) -> None:
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"0"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
