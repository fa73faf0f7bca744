"""The WSGI bridge on real uvicorn protocols and both loops, seen by clients on raw sockets."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import logging
import queue
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.validate import validator

import pytest
import uvloop
from a2wsgi import WSGIMiddleware
from uvicorn.config import Config
from uvicorn.lifespan.on import LifespanOn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from handoff.worker.wsgi import READ_AHEAD_LIMIT_BYTES, Environs, WSGIBridge
from handoff.worker.wsgi_threads import NAME_CACHE_LIMIT

DEADLINE_SECONDS = 20.0
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
LOGGER = logging.getLogger("uvicorn.error")
MEBIBYTE = 1024 * 1024
TEXT = [("Content-Type", "text/plain")]


class Serving:
    """An ASGI application on a loop in a thread of its own, until the end of the `with` block."""

    def __init__(self, app: Any, loop: str, root_path: str = "", unix_path: str | None = None) -> None:
        self.app = app
        self._factory = LOOPS[loop]
        self._unix_path = unix_path
        config = Config(app, http=HttpToolsProtocol, ws="none", lifespan="off", log_config=None, root_path=root_path)
        config.load()
        state = ServerState()
        self.tasks = state.tasks
        self._protocol = lambda: HttpToolsProtocol(config=config, server_state=state, app_state={})
        self._started: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="serving")

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=self._factory) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        if self._unix_path:
            server: Any = await self.loop.create_unix_server(self._protocol, self._unix_path)
        else:
            server = await self.loop.create_server(self._protocol, "127.0.0.1", 0)
        self._started.put(server.sockets[0].getsockname())
        await self._stop.wait()
        server.close()
        if isinstance(self.app, WSGIBridge):
            self.all_ended = await self.app.aclose(DEADLINE_SECONDS)

    def __enter__(self) -> Serving:
        self._thread.start()
        self.address = self._started.get(timeout=DEADLINE_SECONDS)
        return self

    def __exit__(self, *error: object) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(DEADLINE_SECONDS)
        assert not self._thread.is_alive()

    def connect(self, receive_buffer_bytes: int | None = None) -> socket.socket:
        family = socket.AF_UNIX if self._unix_path else socket.AF_INET
        client = socket.socket(family, socket.SOCK_STREAM)
        client.settimeout(DEADLINE_SECONDS)
        if receive_buffer_bytes is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        client.connect(self.address)
        return client

    def ask(self, head: str = "GET / HTTP/1.1", *headers: str, body: bytes = b"") -> Answer:
        with self.connect() as client:
            send(client, head, *headers, body=body)
            return Answer(client, head.split()[0])


class Answer:
    """One complete answer, read from the client's socket. `error` is set where it was cut off."""

    def __init__(self, client: socket.socket, method: str = "GET") -> None:
        with contextlib.closing(http.client.HTTPResponse(client, method=method)) as response:
            response.begin()
            self.status = response.status
            self.headers = response.headers
            self.error: Exception | None = None
            try:
                self.body = response.read()
            except http.client.IncompleteRead as error:
                self.body = error.partial
                self.error = error


def send(client: socket.socket, head: str, *headers: str, body: bytes = b"") -> None:
    lines = [head, "Host: example", *headers]
    client.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def read_until(client: socket.socket, end: bytes) -> bytes:
    data = b""
    while end not in data:
        piece = client.recv(65536)
        assert piece, f"closed before {end!r}: {data!r}"
        data += piece
    return data


@pytest.fixture(params=sorted(LOOPS))
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextlib.contextmanager
def bridged(app: Any, loop: str, threads: int = 2, valid: bool = True, **options: Any) -> Iterator[Serving]:
    bridge = WSGIBridge(validator(app) if valid else app, threads=threads, logger=LOGGER)
    with Serving(bridge, loop, **options) as serving:
        yield serving
    assert serving.all_ended
    assert bridge.pending == 0


class Closing:
    """An iterable that notes that it was closed, and in which thread."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self.closed = threading.Event()
        self.thread = ""

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self._chunks)

    def close(self) -> None:
        self.thread = threading.current_thread().name
        self.closed.set()


def hello(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [*TEXT])
    return [b"hello"]


def echo(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [*TEXT])
    return [environ["wsgi.input"].read(-1)]


# environ


def environ_of(loop: str, head: str, *headers: str, **options: Any) -> dict[str, Any]:
    seen: list[dict[str, Any]] = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        seen.append(environ)
        return hello(environ, start_response)

    with bridged(app, loop, **options) as serving:
        assert serving.ask(head, *headers).body == b"hello"
    return seen[0]


def test_the_environ_has_what_pep_3333_asks_for(loop: str) -> None:
    environ = environ_of(loop, "GET /a/b?x=1&y=%20 HTTP/1.1", "Content-Type: text/x", "X-One: 1")
    expected = {
        "REQUEST_METHOD": "GET",
        "SCRIPT_NAME": "",
        "PATH_INFO": "/a/b",
        "QUERY_STRING": "x=1&y=%20",
        "CONTENT_TYPE": "text/x",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": "127.0.0.1",
        "HTTP_HOST": "example",
        "HTTP_X_ONE": "1",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
        "wsgi.input_terminated": True,
    }
    assert {key: environ.get(key) for key in expected} == expected
    assert "HTTP_CONTENT_TYPE" not in environ
    assert environ["SERVER_PORT"].isdigit()
    assert environ["REMOTE_PORT"].isdigit()


@pytest.mark.parametrize("root_path", ["/app", "/app/", "/"])
def test_the_root_path_is_the_script_name_and_not_in_the_path(loop: str, root_path: str) -> None:
    environ = environ_of(loop, "GET /app/x HTTP/1.1", root_path=root_path)
    assert environ["SCRIPT_NAME"] == root_path.rstrip("/")
    assert environ["PATH_INFO"] == "/app/x"


def test_a_path_is_its_bytes_as_latin_1_whether_utf_8_or_not(loop: str) -> None:
    assert environ_of(loop, "GET /%C3%BC%20%E2%82%AC HTTP/1.1")["PATH_INFO"] == "/ü €".encode().decode("latin-1")
    assert environ_of(loop, "GET /%FF%2F HTTP/1.1")["PATH_INFO"] == "/\xff/"


def test_repeated_headers_are_joined(loop: str) -> None:
    environ = environ_of(loop, "GET / HTTP/1.1", "X-A: 1", "X-A: 2", "Cookie: a=1", "Cookie: b=2")
    assert environ["HTTP_X_A"] == "1,2"
    assert environ["HTTP_COOKIE"] == "a=1; b=2"


def test_headers_that_could_pose_as_others_are_dropped(loop: str) -> None:
    environ = environ_of(loop, "GET / HTTP/1.1", "X_Real_IP: 6.6.6.6", "X-Real-IP: 1.1.1.1", "Proxy: evil")
    assert environ["HTTP_X_REAL_IP"] == "1.1.1.1"
    assert "HTTP_PROXY" not in environ


def test_a_unix_socket_gives_a_valid_environ(loop: str, tmp_path: Path) -> None:
    environ = environ_of(loop, "GET / HTTP/1.1", unix_path=str(tmp_path / "s"))
    assert (environ["SERVER_NAME"], environ["SERVER_PORT"], environ["REMOTE_ADDR"]) == ("localhost", "80", "")


def test_names_of_headers_are_cached_up_to_a_limit() -> None:
    environs = Environs()
    scope: dict[str, Any] = {"server": ("h", 1), "scheme": "http", "root_path": "", "http_version": "1.1"}
    scope |= {"method": "GET", "path": "/", "raw_path": b"/", "query_string": b"", "client": None}
    for number in range(NAME_CACHE_LIMIT + 10):
        environ = environs.make({**scope, "headers": [(b"x-%d" % number, b"v")]})
        assert environ[f"HTTP_X_{number}"] == "v"
    assert len(environs._keys) == NAME_CACHE_LIMIT


# Requests


def test_a_short_answer_has_its_length_and_keeps_the_connection(loop: str) -> None:
    with bridged(hello, loop, valid=False) as serving, serving.connect() as client:
        for _ in range(3):
            send(client, "GET / HTTP/1.1")
            answer = Answer(client)
            assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"hello", "5")


def test_pipelined_requests_are_answered_in_order(loop: str) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [*TEXT])
        return [environ["PATH_INFO"].encode()]

    with bridged(app, loop) as serving, serving.connect() as client:
        client.sendall(b"".join(b"GET /p%d HTTP/1.1\r\nHost: x\r\n\r\n" % number for number in range(5)))
        data = read_until(client, b"/p4")
        assert [data.index(b"/p%d" % number) for number in range(5)] == sorted(
            data.index(b"/p%d" % number) for number in range(5)
        )


READERS: dict[str, Callable[[Any], list[bytes]]] = {
    "read": lambda stream: [stream.read(-1)],
    "read_n": lambda stream: list(iter(lambda: stream.read(1000), b"")),
    "readline": lambda stream: list(iter(stream.readline, b"")),
    "readlines": lambda stream: stream.readlines(),
    "iteration": lambda stream: list(stream),
}


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("size", [0, 12, 3000, 3 * MEBIBYTE])
@pytest.mark.parametrize("reader", sorted(READERS))
def test_a_body_is_read_whole_in_every_way(loop: str, reader: str, size: int, is_chunked: bool) -> None:
    body = (b"0123456789abcde\n" * (size // 16 + 1))[:size]
    seen: list[bytes] = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        seen.extend(READERS[reader](environ["wsgi.input"]))
        assert environ["wsgi.input"].read(10) == b""
        return hello(environ, start_response)

    wire = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts(body, 50_000)) + b"0\r\n\r\n"
    with bridged(app, loop) as serving:
        if is_chunked:
            answer = serving.ask("POST / HTTP/1.1", "Transfer-Encoding: chunked", body=wire)
        else:
            answer = serving.ask("POST / HTTP/1.1", f"Content-Length: {size}", body=body)
    assert answer.status == 200
    assert b"".join(seen) == body
    if reader in ("readline", "readlines", "iteration"):
        assert seen == body.splitlines(keepends=True)


def parts(body: bytes, size: int) -> list[bytes]:
    return [body[start : start + size] for start in range(0, len(body), size)]


def test_a_body_goes_in_while_the_answer_goes_out(loop: str) -> None:
    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [*TEXT])
        return iter(lambda: environ["wsgi.input"].read(10_000), b"")

    body = bytes(range(256)) * 12_000
    with bridged(app, loop, valid=False) as serving, serving.connect() as client:
        sender = threading.Thread(target=send, args=(client, "POST / HTTP/1.1", f"Content-Length: {len(body)}"))
        sender.start()
        sender.join(DEADLINE_SECONDS)
        sender = threading.Thread(target=client.sendall, args=(body,))
        sender.start()
        assert Answer(client).body == body
        sender.join(DEADLINE_SECONDS)


def test_continue_is_sent_only_when_the_body_is_read(loop: str) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        if environ["PATH_INFO"] == "/refuse":
            start_response("413 Content Too Large", [*TEXT, ("Connection", "close")])
            return [b"no"]
        return echo(environ, start_response)

    with bridged(app, loop, valid=False) as serving:
        with serving.connect() as client:
            send(client, "POST /refuse HTTP/1.1", "Content-Length: 4", "Expect: 100-continue")
            assert read_until(client, b"\r\n\r\n").startswith(b"HTTP/1.1 413")
        with serving.connect() as client:
            send(client, "POST / HTTP/1.1", "Content-Length: 4", "Expect: 100-continue")
            assert read_until(client, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.sendall(b"body")
            assert Answer(client).body == b"body"


def test_a_short_body_that_is_cut_off_never_reaches_the_application(loop: str) -> None:
    paths: list[str] = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        paths.append(environ["PATH_INFO"])
        return hello(environ, start_response)

    with bridged(app, loop) as serving:
        with serving.connect() as client:
            send(client, "POST /cut HTTP/1.1", "Content-Length: 10", body=b"12345")
        assert serving.ask("GET /next HTTP/1.1").status == 200
    assert paths == ["/next"]


def test_reading_a_long_body_that_is_cut_off_raises_an_os_error(loop: str) -> None:
    errors: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
    started = threading.Event()

    def app(environ: Any, start_response: Any) -> list[bytes]:
        started.set()
        try:
            environ["wsgi.input"].read(-1)
        except OSError as error:
            errors.put(error)
            raise
        return hello(environ, start_response)

    with bridged(app, loop) as serving:
        with serving.connect() as client:
            send(client, "POST / HTTP/1.1", f"Content-Length: {MEBIBYTE}", body=b"12345")
            assert started.wait(DEADLINE_SECONDS)
        assert "left before the whole request was read" in str(errors.get(timeout=DEADLINE_SECONDS))
        assert serving.ask("POST / HTTP/1.1", "Content-Length: 2", body=b"ok").status == 200


def test_a_body_that_nobody_reads_is_passed_over(loop: str) -> None:
    with bridged(hello, loop) as serving, serving.connect() as client:
        for size in (10, MEBIBYTE):
            send(client, "POST / HTTP/1.1", f"Content-Length: {size}", body=b"x" * size)
            assert Answer(client).body == b"hello"


# Answers


def test_the_first_chunk_goes_out_before_the_second_is_made(loop: str) -> None:
    got_first = threading.Event()

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [*TEXT])
        yield b"first"
        assert got_first.wait(DEADLINE_SECONDS)
        yield b""
        yield b"second"

    with bridged(app, loop) as serving, serving.connect() as client:
        send(client, "GET / HTTP/1.1")
        assert b"chunked" in read_until(client, b"first\r\n")
        got_first.set()
        assert read_until(client, b"0\r\n\r\n") == b"6\r\nsecond\r\n0\r\n\r\n"


def test_with_its_length_sent_an_answer_is_complete_before_the_iterable_is_closed(loop: str) -> None:
    got_answer = threading.Event()

    class Slow(Closing):
        def close(self) -> None:
            assert got_answer.wait(DEADLINE_SECONDS)
            super().close()

    answer = Slow([b"he", b"llo"])

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [*TEXT, ("Content-Length", "5")])
        return answer

    with bridged(app, loop, valid=False) as serving:
        assert serving.ask().body == b"hello"
        assert serving.app.pending == 1
        got_answer.set()
        assert answer.closed.wait(DEADLINE_SECONDS)
    assert answer.thread.startswith("wsgi-")


@pytest.mark.parametrize("is_list", [False, True])
def test_a_huge_answer_arrives_whole_at_a_slow_reader(loop: str, is_list: bool) -> None:
    chunks = [bytes([number]) * MEBIBYTE for number in range(12)]

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [*TEXT])
        return list(chunks) if is_list else iter(chunks)

    with bridged(app, loop) as serving, serving.connect(receive_buffer_bytes=4096) as client:
        send(client, "GET / HTTP/1.1")
        assert Answer(client).body == b"".join(chunks)


def test_many_tiny_chunks_arrive_in_order(loop: str) -> None:
    chunks = [b"%d," % number for number in range(3000)]

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [*TEXT])
        return iter(chunks)

    with bridged(app, loop) as serving:
        assert serving.ask().body == b"".join(chunks)


def test_a_file_wrapper_sends_the_file_and_closes_it(loop: str, tmp_path: Path) -> None:
    content = b"0123456789" * 100_000
    (tmp_path / "file").write_bytes(content)
    files: list[Any] = []

    def app(environ: Any, start_response: Any) -> Any:
        files.append((tmp_path / "file").open("rb"))
        start_response("200 OK", [*TEXT])
        return environ["wsgi.file_wrapper"](files[0], 512)

    with bridged(app, loop, valid=False) as serving:
        assert serving.ask().body == content
    assert files[0].closed


def endless(answer_of: Callable[[Iterable[bytes]], Any]) -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        if environ["PATH_INFO"] != "/endless":
            return hello(environ, start_response)
        start_response("200 OK", [*TEXT])
        return answer_of(iter(lambda: b"x" * 20_000, b""))

    return app


@pytest.mark.parametrize("upload", [0, 100_000, 4 * READ_AHEAD_LIMIT_BYTES])
def test_a_client_that_vanishes_in_mid_stream_ends_the_iteration(loop: str, upload: int) -> None:
    made: queue.SimpleQueue[Closing] = queue.SimpleQueue()

    def keep(chunks: Iterable[bytes]) -> Closing:
        answer = Closing(chunks)
        made.put(answer)
        return answer

    with bridged(endless(keep), loop, threads=1, valid=False) as serving:
        client = serving.connect()
        body = b"u" * min(upload, MEBIBYTE // 8)
        send(client, "POST /endless HTTP/1.1", f"Content-Length: {upload}", body=body)
        assert client.recv(1000)
        reset(client)  # some of the answer waits in a full buffer: nobody reads it
        answer = made.get(timeout=DEADLINE_SECONDS)
        assert answer.closed.wait(DEADLINE_SECONDS)
        assert answer.thread == "wsgi-0"
        assert serving.ask().body == b"hello"


def test_a_stream_that_waits_for_its_client_leaves_the_other_threads_free(loop: str) -> None:
    with bridged(endless(Closing), loop, valid=False) as serving:
        client = serving.connect(receive_buffer_bytes=4096)
        try:
            send(client, "GET /endless HTTP/1.1")
            assert client.recv(1000)
            for _ in range(20):
                assert serving.ask().body == b"hello"
            assert serving.app.pending, "the stream is there still"
        finally:
            reset(client)


def test_write_sends_at_once_and_comes_before_the_iterable(loop: str) -> None:
    got_first = threading.Event()

    def app(environ: Any, start_response: Any) -> list[bytes]:
        write = start_response("200 OK", [*TEXT])
        write(b"first,")
        assert got_first.wait(DEADLINE_SECONDS)
        write(b"second,")
        return [b"third"]

    with bridged(app, loop) as serving, serving.connect() as client:
        send(client, "GET / HTTP/1.1")
        read_until(client, b"first,")
        got_first.set()
        data = read_until(client, b"0\r\n\r\n")
        assert data.index(b"second,") < data.index(b"third")


def test_write_raises_when_the_client_is_gone(loop: str) -> None:
    errors: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def app(environ: Any, start_response: Any) -> list[bytes]:
        write = start_response("200 OK", [*TEXT])
        try:
            while True:
                write(b"x" * 20_000)
        except OSError as error:
            errors.put(error)
            raise

    with bridged(app, loop) as serving:
        client = serving.connect()
        send(client, "GET / HTTP/1.1")
        client.recv(1000)
        reset(client)
        assert "client left" in str(errors.get(timeout=DEADLINE_SECONDS))


# Errors


def test_an_exception_before_the_answer_is_logged_and_becomes_500(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [*TEXT])
        raise ZeroDivisionError("on purpose")

    with bridged(app, loop) as serving:
        assert serving.ask().status == 500
    assert "ZeroDivisionError: on purpose" in caplog.text


@pytest.mark.parametrize("where", ["generator", "close"])
def test_an_exception_in_the_iterable_before_its_first_chunk_becomes_500(loop: str, where: str) -> None:
    class Failing(Closing):
        def __next__(self) -> bytes:
            raise ZeroDivisionError("on purpose")

    answer = Failing([])

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [*TEXT])
        return answer

    with bridged(app, loop, valid=False) as serving:
        assert serving.ask().status == 500
    assert answer.closed.is_set()


@pytest.mark.parametrize("headers", [[], [("Content-Length", "100")]])
def test_an_exception_after_the_answer_began_closes_the_connection(loop: str, headers: list[Any]) -> None:
    closed = threading.Event()

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [*TEXT, *headers])
        try:
            yield b"part"
            raise ZeroDivisionError("on purpose")
        finally:
            closed.set()

    with bridged(app, loop) as serving:
        answer = serving.ask()
    assert isinstance(answer.error, http.client.IncompleteRead)
    assert (answer.status, answer.body) == (200, b"part")
    assert closed.is_set()


def test_an_exception_after_the_answer_is_only_logged(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Closing):
        def close(self) -> None:
            raise ZeroDivisionError("on purpose")

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [*TEXT, ("Content-Length", "2")])
        return Failing([b"ok"])

    with bridged(app, loop, valid=False) as serving:
        assert serving.ask().body == b"ok"
    assert "failed after its answer was over, path /" in caplog.text


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), StopIteration()])
def test_not_even_an_exit_ends_a_thread(loop: str, error: BaseException) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        raise error

    with bridged(app, loop, threads=1) as serving:
        assert [serving.ask().status for _ in range(3)] == [500, 500, 500]


def test_exc_info_replaces_an_answer_that_has_not_begun(loop: str) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [*TEXT, ("Content-Length", "5")])
        try:
            raise ZeroDivisionError("on purpose")
        except ZeroDivisionError:
            start_response("500 Oops", [*TEXT, ("X-Why", "zero")], sys.exc_info())
        return [b"sorry about that"]

    with bridged(app, loop) as serving:
        answer = serving.ask()
    assert (answer.status, answer.body, answer.headers["x-why"]) == (500, b"sorry about that", "zero")


def test_exc_info_is_raised_once_the_answer_has_begun(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [*TEXT])
        yield b"part"
        try:
            raise ZeroDivisionError("on purpose")
        except ZeroDivisionError:
            start_response("500 Oops", [*TEXT], sys.exc_info())
        yield b"never"

    with bridged(app, loop) as serving:
        answer = serving.ask()
    assert answer.error is not None
    assert answer.body == b"part"
    assert "ZeroDivisionError: on purpose" in caplog.text


BAD_STARTS: dict[str, Callable[[Any], Any]] = {
    "called a second time": lambda start: (start("200 OK", [*TEXT]), start("200 OK", [*TEXT])),
    "did not call start_response": lambda start: None,
    "is a str like '200 OK'": lambda start: start("fine", [*TEXT]),
    "it is a str like": lambda start: start(200, [*TEXT]),
    "headers are a list of pairs": lambda start: start("200 OK", tuple(TEXT)),
    "names are str in WSGI": lambda start: start("200 OK", [(b"X-A", "b")]),
    "has control characters": lambda start: start("200 OK", [("X-A", "b\r\nX-Evil: 1")]),
    "not the name of a header": lambda start: start("200 OK", [("X A", "b")]),
    "is not a number of bytes": lambda start: start("200 OK", [("Content-Length", "many")]),
    "latin-1": lambda start: start("200 OK", [("X-A", "€")]),
}


@pytest.mark.parametrize("words", sorted(BAD_STARTS))
def test_a_wrong_start_response_becomes_500_and_says_why(words: str, caplog: pytest.LogCaptureFixture) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        BAD_STARTS[words](start_response)
        return [b"body"]

    with bridged(app, "uvloop", valid=False) as serving:
        assert serving.ask().status == 500
    assert words in caplog.text


@pytest.mark.parametrize("is_generator", [False, True])
def test_text_instead_of_bytes_becomes_500(is_generator: bool) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [*TEXT])
        return iter(["text"]) if is_generator else ["text"]

    with bridged(app, "uvloop", valid=False) as serving:
        assert serving.ask().status == 500


def test_what_goes_beyond_the_content_length_is_cut(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [*TEXT, ("Content-Length", "4")])
        return {"/list": [b"12345"], "/one": iter([b"12345"]), "/two": iter([b"123", b"45"])}.get(
            environ["PATH_INFO"], iter([b"1234", b"5"])
        )

    with bridged(app, loop, valid=False) as serving, serving.connect() as client:
        for path in ("/list", "/one", "/two", "/late"):
            send(client, f"GET {path} HTTP/1.1")
            assert Answer(client).body == b"1234"
    for path in ("/list", "/one", "/two", "/late"):
        assert f"more than its Content-Length, path {path}" in caplog.text


@pytest.mark.parametrize("is_list", [False, True])
def test_less_than_the_content_length_closes_the_connection(loop: str, is_list: bool) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [*TEXT, ("Content-Length", "9")])
        return [b"1234"] if is_list else iter([b"12", b"34"])

    with bridged(app, loop, valid=False) as serving:
        answer = serving.ask()
    assert answer.error is not None
    assert answer.body == b"1234"


# HEAD and answers without a body


def test_head_has_the_headers_and_no_body(loop: str) -> None:
    closed = threading.Event()

    def stream() -> Iterable[bytes]:
        try:
            while True:
                yield b"x"
        finally:
            closed.set()

    def app(environ: Any, start_response: Any) -> Any:
        match environ["PATH_INFO"]:
            case "/length":
                start_response("200 OK", [*TEXT, ("Content-Length", "50")])
                return []
            case "/list":
                start_response("200 OK", [*TEXT])
                return [b"hello"]
            case _:
                start_response("200 OK", [*TEXT])
                return stream()

    with bridged(app, loop, valid=False) as serving, serving.connect() as client:
        lengths = []
        for path in ("/length", "/list", "/stream", "/list"):
            send(client, f"HEAD {path} HTTP/1.1")
            answer = Answer(client, "HEAD")
            assert (answer.status, answer.body) == (200, b"")
            lengths.append(answer.headers["content-length"])
        assert lengths == ["50", "5", None, "5"]
    assert closed.wait(DEADLINE_SECONDS)


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
@pytest.mark.parametrize("answer", [[], [b"body"], (b"a", b"b")])
def test_answers_without_a_body_have_none(loop: str, status: str, answer: Any) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        start_response(status, [("X-A", "b"), ("Content-Length", "4")])
        return answer

    with bridged(app, loop, valid=False) as serving, serving.connect() as client:
        for _ in range(2):
            send(client, "GET / HTTP/1.1")
            head = read_until(client, b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 " + status[:3].encode())
            assert head.endswith(b"\r\n\r\n")
            assert b"content-length" not in head


def test_hop_by_hop_headers_are_the_servers_but_close_is_heard(loop: str) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        hop_by_hop = [("Transfer-Encoding", "chunked"), ("Keep-Alive", "timeout=1"), ("Connection", "close")]
        start_response("200 OK", [*TEXT, *hop_by_hop])
        return [b"hello"]

    with bridged(app, loop, valid=False) as serving, serving.connect() as client:
        send(client, "GET / HTTP/1.1")
        answer = Answer(client)
        assert (answer.body, answer.headers["content-length"], answer.headers["keep-alive"]) == (b"hello", "5", None)
        assert client.recv(1) == b""


# Real applications, and a2wsgi


def test_flask_answers_reads_forms_and_streams(loop: str) -> None:
    from flask import Flask, request

    flask = Flask(__name__)
    flask.add_url_rule("/", "root", view_func=lambda: "hello")
    flask.add_url_rule("/form", "form", methods=["POST"], view_func=lambda: request.form["name"] * 2)
    flask.add_url_rule("/upload", "upload", methods=["POST"], view_func=lambda: str(len(request.files["f"].read())))
    flask.add_url_rule("/stream", "stream", view_func=lambda: iter(["a", "b", "c"]))
    multipart = (
        b'--X\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\n' + b"z" * MEBIBYTE + b"\r\n--X--\r\n"
    )
    with bridged(flask, loop, valid=False) as serving:
        assert serving.ask().body == b"hello"
        form = ("Content-Type: application/x-www-form-urlencoded", "Content-Length: 7")
        assert serving.ask("POST /form HTTP/1.1", *form, body=b"name=ab").body == b"abab"
        upload = ("Content-Type: multipart/form-data; boundary=X", f"Content-Length: {len(multipart)}")
        assert serving.ask("POST /upload HTTP/1.1", *upload, body=multipart).body == str(MEBIBYTE).encode()
        assert serving.ask("GET /stream HTTP/1.1").body == b"abc"
        assert serving.ask("HEAD / HTTP/1.1").headers["content-length"] == "5"
        assert serving.ask("GET /none HTTP/1.1").status == 404


@pytest.fixture(scope="module")
def django_app() -> Any:
    from django.conf import settings
    from django.core.wsgi import get_wsgi_application
    from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
    from django.urls import path

    def plain(request: HttpRequest, rest: str) -> HttpResponse:
        return HttpResponse(f"{request.method} {request.path} {len(request.body)}")

    def stream(request: HttpRequest) -> StreamingHttpResponse:
        return StreamingHttpResponse(iter([b"a", b"b", b"c"]))

    urls = type(sys)("urls_of_test")
    urls.urlpatterns = [path("stream", stream), path("<path:rest>", plain)]  # type: ignore[attr-defined]
    settings.configure(ROOT_URLCONF=urls, ALLOWED_HOSTS=["*"], SECRET_KEY="x", DEBUG=False, LOGGING_CONFIG=None)
    return get_wsgi_application()


def test_django_answers_reads_bodies_and_streams(loop: str, django_app: Any) -> None:
    with bridged(django_app, loop, root_path="/site") as serving:
        assert serving.ask("GET /a%C3%BC HTTP/1.1").body.decode() == "GET /site/aü 0"
        size = MEBIBYTE
        post = ("Content-Type: text/plain", f"Content-Length: {size}")
        assert serving.ask("POST /b HTTP/1.1", *post, body=b"x" * size).body == f"POST /site/b {size}".encode()
        assert serving.ask("GET /stream HTTP/1.1").body == b"abc"


def test_clients_cannot_tell_the_bridge_from_a2wsgi() -> None:
    def app(environ: Any, start_response: Any) -> Any:
        body = environ["wsgi.input"].read(-1)
        path = environ["PATH_INFO"]
        start_response(
            "404 Not Found" if path == "/404" else "200 OK", [*TEXT, ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")]
        )
        names = ("REQUEST_METHOD", "PATH_INFO", "QUERY_STRING", "CONTENT_LENGTH", "CONTENT_TYPE", "HTTP_X_A")
        text = repr([environ.get(name) for name in names]).encode() + body
        return iter([text, b"more"]) if path == "/stream" else [text]

    heads = [
        "GET / HTTP/1.1",
        "GET /404?a=b HTTP/1.1",
        "GET /stream HTTP/1.1",
        "GET /%C3%BC HTTP/1.1",
        "HEAD / HTTP/1.1",
    ]
    cases = [(head, ["X-A: 1", "X-A: 2"], b"") for head in heads]
    cases.append(("POST /x HTTP/1.1", ["Content-Type: text/x", "Content-Length: 200000"], b"x" * 200_000))
    cases.append(("POST /x HTTP/1.1", ["Transfer-Encoding: chunked"], b"3\r\nabc\r\n0\r\n\r\n"))
    with bridged(app, "asyncio", valid=False) as ours, Serving(WSGIMiddleware(app), "asyncio") as theirs:
        for head, headers, body in cases:
            mine, other = ours.ask(head, *headers, body=body), theirs.ask(head, *headers, body=body)
            assert (mine.status, mine.body) == (other.status, other.body)
            assert mine.headers.get_all("set-cookie") == other.headers.get_all("set-cookie")


# The bridge itself: lifespan, drain, cancellation


def scope_of(path: str = "/", **more: Any) -> dict[str, Any]:
    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode()}
    scope |= {"query_string": b"", "root_path": "", "headers": [], "server": ("h", 80), "client": None}
    return scope | {"scheme": "http", "http_version": "1.1"} | more


async def until(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, DEADLINE_SECONDS)


class Client:
    """The two callables of an ASGI request; `send` waits while `is_open` is not set."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.is_open = asyncio.Event()
        self.is_open.set()
        self.never = asyncio.Event()

    async def receive(self) -> Any:
        await self.never.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await self.is_open.wait()
        self.messages.append(message)


def run(loop: str, main: Any) -> None:
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(asyncio.wait_for(main, DEADLINE_SECONDS))


def test_a_lifespan_starts_the_threads_and_ends_them(loop: str) -> None:
    async def main() -> None:
        bridge = WSGIBridge(hello, threads=3, logger=LOGGER)
        lifespan = LifespanOn(Config(bridge, log_config=None, lifespan="on"))
        before = threads_named_wsgi()
        await lifespan.startup()
        assert threads_named_wsgi() == before + 3
        assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("wsgi-"))
        await lifespan.shutdown()
        assert not lifespan.should_exit
        assert await bridge.aclose(DEADLINE_SECONDS)

    run(loop, main())
    for thread in threading.enumerate():
        if thread.name.startswith("wsgi-"):
            thread.join(DEADLINE_SECONDS)
    assert threads_named_wsgi() == 0


def threads_named_wsgi() -> int:
    return sum(thread.name.startswith("wsgi-") for thread in threading.enumerate())


def test_requests_that_are_queued_at_a_close_finish_and_later_ones_are_refused(loop: str) -> None:
    entered, release = threading.Event(), threading.Event()

    def app(environ: Any, start_response: Any) -> list[bytes]:
        entered.set()
        assert release.wait(DEADLINE_SECONDS)
        return hello(environ, start_response)

    async def main() -> None:
        bridge = WSGIBridge(app, threads=1, logger=LOGGER)
        clients = [Client() for _ in range(5)]
        tasks = [asyncio.create_task(bridge(scope_of(), client.receive, client.send)) for client in clients]
        await until(entered)
        assert bridge.pending == 5
        bridge.close()
        late = Client()
        await bridge(scope_of(), late.receive, late.send)
        assert late.messages[0]["status"] == 503
        release.set()
        assert await bridge.aclose(DEADLINE_SECONDS)
        await asyncio.gather(*tasks)
        assert [client.messages[0]["status"] for client in clients] == [200] * 5
        assert bridge.pending == 0

    run(loop, main())


def test_a_request_whose_body_comes_after_the_close_is_refused(loop: str) -> None:
    async def main() -> None:
        bridge = WSGIBridge(hello, threads=1, logger=LOGGER)
        client = Client()

        async def receive() -> Any:
            bridge.close()
            return {"type": "http.request", "body": b"12345"}

        await bridge(scope_of(headers=[(b"content-length", b"5")]), receive, client.send)
        assert client.messages[0]["status"] == 503
        assert await bridge.aclose(DEADLINE_SECONDS)

    run(loop, main())


def test_a_bridge_that_was_closed_before_it_began_starts_no_thread(loop: str) -> None:
    async def main() -> None:
        bridge = WSGIBridge(hello, threads=1, logger=LOGGER)
        bridge.close()
        client = Client()
        await bridge(scope_of(), client.receive, client.send)
        assert client.messages[0]["status"] == 503
        assert await bridge.aclose(DEADLINE_SECONDS)

    before = threading.active_count()
    run(loop, main())
    assert threading.active_count() <= before


def test_a_hung_thread_does_not_hold_the_shutdown_and_is_named(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    entered, release = threading.Event(), threading.Event()

    def app(environ: Any, start_response: Any) -> list[bytes]:
        entered.set()
        assert release.wait(DEADLINE_SECONDS)
        return hello(environ, start_response)

    async def main() -> None:
        bridge = WSGIBridge(app, threads=2, logger=LOGGER)
        client = Client()
        task = asyncio.create_task(bridge(scope_of("/hung"), client.receive, client.send))
        await until(entered)
        assert not await bridge.aclose(0.0)
        release.set()
        await task
        assert await bridge.aclose(DEADLINE_SECONDS)

    run(loop, main())
    assert "left behind; busy with: /hung" in caplog.text


def test_a_thread_makes_no_more_than_the_client_takes(loop: str) -> None:
    made: list[int] = []
    made_two = threading.Event()

    def app(environ: Any, start_response: Any) -> Any:
        if environ["PATH_INFO"] != "/stream":
            return hello(environ, start_response)
        start_response("200 OK", [*TEXT])
        return chunks()

    def chunks() -> Iterable[bytes]:
        for number in range(500):
            made.append(number)
            if number == 1:
                made_two.set()
            yield b"x" * 40_000

    async def main() -> None:
        bridge = WSGIBridge(app, threads=2, logger=LOGGER)
        slow, other = Client(), Client()
        slow.is_open.clear()
        task = asyncio.create_task(bridge(scope_of("/stream"), slow.receive, slow.send))
        await until(made_two)
        for _ in range(100):
            await bridge(scope_of(), other.receive, other.send)
        assert len(made) == 2
        slow.is_open.set()
        await task
        assert len(made) == 500
        assert await bridge.aclose(DEADLINE_SECONDS)

    run(loop, main())


@pytest.mark.parametrize("is_blocked", [False, True])
def test_a_cancelled_stream_closes_its_iterable(loop: str, is_blocked: bool) -> None:
    answer = Closing(iter(lambda: b"x" * 40_000, b""))
    entered = threading.Event()

    def app(environ: Any, start_response: Any) -> Any:
        entered.set()
        start_response("200 OK", [*TEXT])
        return answer

    async def main() -> None:
        bridge = WSGIBridge(app, threads=1, logger=LOGGER)
        client = Client()
        if is_blocked:
            client.is_open.clear()
        task = asyncio.create_task(bridge(scope_of(), client.receive, client.send))
        await until(entered)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(answer.closed)
        assert await bridge.aclose(DEADLINE_SECONDS)
        assert bridge.pending == 0

    run(loop, main())


def test_a_request_that_is_cancelled_in_the_queue_never_runs(loop: str) -> None:
    entered, release = threading.Event(), threading.Event()
    paths: list[str] = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        paths.append(environ["PATH_INFO"])
        entered.set()
        assert release.wait(DEADLINE_SECONDS)
        return hello(environ, start_response)

    async def main() -> None:
        bridge = WSGIBridge(app, threads=1, logger=LOGGER)
        client = Client()
        first = asyncio.create_task(bridge(scope_of("/first"), client.receive, client.send))
        await until(entered)
        second = asyncio.create_task(bridge(scope_of("/second"), client.receive, client.send))
        await asyncio.sleep(0)  # the second task's first step submits it
        assert bridge.pending == 2
        second.cancel()
        await asyncio.wait([second])
        release.set()
        await first
        assert await bridge.aclose(DEADLINE_SECONDS)

    run(loop, main())
    assert paths == ["/first"]


def test_a_reader_that_waits_for_its_body_wakes_up_when_it_is_cancelled(loop: str) -> None:
    errors: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
    entered = threading.Event()

    def app(environ: Any, start_response: Any) -> list[bytes]:
        entered.set()
        try:
            environ["wsgi.input"].read(-1)
        except OSError as error:
            errors.put(error)
            raise
        return []

    async def main() -> None:
        bridge = WSGIBridge(app, threads=1, logger=LOGGER)
        client = Client()
        scope = scope_of(headers=[(b"transfer-encoding", b"chunked")])
        task = asyncio.create_task(bridge(scope, client.receive, client.send))
        await until(entered)
        task.cancel()
        await asyncio.wait([task])
        assert await asyncio.to_thread(errors.get, timeout=DEADLINE_SECONDS)
        assert await bridge.aclose(DEADLINE_SECONDS)

    run(loop, main())


def test_a_send_that_says_the_client_is_gone_ends_the_stream(loop: str) -> None:
    answer = Closing(iter(lambda: b"x", b""))

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [*TEXT])
        return answer

    async def gone(message: Any) -> None:
        raise BrokenPipeError("gone")

    async def main() -> None:
        bridge = WSGIBridge(app, threads=1, logger=LOGGER)
        await bridge(scope_of(), Client().receive, gone)
        await until(answer.closed)
        assert await bridge.aclose(DEADLINE_SECONDS)

    run(loop, main())


def test_a_websocket_scope_is_refused() -> None:
    async def main() -> None:
        bridge = WSGIBridge(hello, threads=1, logger=LOGGER)
        with pytest.raises(RuntimeError, match="scope of type websocket"):
            await bridge(scope_of(type="websocket"), Client().receive, Client().send)

    run("asyncio", main())


def test_a_bridge_without_threads_is_refused() -> None:
    with pytest.raises(ValueError, match="0 threads are too few; give 1 or more"):
        WSGIBridge(hello, threads=0, logger=LOGGER)


def test_many_clients_at_once_all_get_their_own_answer(loop: str) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [*TEXT])
        return [environ["PATH_INFO"].encode() + environ["wsgi.input"].read()]

    failures: list[str] = []

    def client(number: int, serving: Serving) -> None:
        with serving.connect() as connection:
            for turn in range(50):
                body = f"{number}-{turn}".encode()
                send(connection, f"POST /{number} HTTP/1.1", f"Content-Length: {len(body)}", body=body)
                answer = Answer(connection)
                if answer.body != f"/{number}".encode() + body:
                    failures.append(f"{number}: {answer.body!r}")

    with bridged(app, loop, threads=4, valid=False) as serving:
        clients = [threading.Thread(target=client, args=(number, serving)) for number in range(16)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join(DEADLINE_SECONDS)
    assert failures == []


def test_an_input_without_a_body_is_empty() -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        assert isinstance(environ["wsgi.input"], io.BytesIO)
        return echo(environ, start_response)

    with bridged(app, "asyncio", valid=False) as serving:
        assert serving.ask().body == b""
