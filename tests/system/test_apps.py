"""Real applications, and the options that change how they are served: what the application and its clients see."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest

from tests.system.apps import hello, workbench
from tests.system.harness import Clients, Service, read_response, wait_until

FASTAPI = """
import asyncio, os
from contextlib import asynccontextmanager
from fastapi import BackgroundTasks, FastAPI, Request
from fastapi.responses import StreamingResponse

async def until(name):
    while not os.path.exists(name):
        await asyncio.sleep(0.01)

def mark(name):
    open(name, "w").close()

@asynccontextmanager
async def lifespan(app):
    app.state.greeting = "hello"
    yield {"pool": "opened"}
    mark("closed")

app = FastAPI(lifespan=lifespan)

@app.get("/")
async def seen(request: Request):
    return {
        "greeting": request.app.state.greeting, "pool": request.state.pool, "client": request.client.host,
        "port": request.client.port, "scheme": request.url.scheme, "root_path": request.scope["root_path"],
        "environment": {key: os.environ[key] for key in ("GREETING", "HANDOFF_SLOT") if key in os.environ},
    }

@app.post("/sum")
async def add(numbers: list[int]):
    return {"sum": sum(numbers)}

@app.post("/later")
async def later(tasks: BackgroundTasks):
    async def task():
        await until("go")
        mark("done")
    tasks.add_task(task)
    return "answered"

@app.get("/stream")
async def stream():
    async def parts():
        yield b"first"
        await until("go")
        yield b"last"
    return StreamingResponse(parts())
"""

FLASK = """
import os, time
from flask import Flask, Response, request
app = Flask(__name__)

@app.get("/")
def seen():
    return {
        "client": request.remote_addr, "scheme": request.scheme, "script": request.script_root, "path": request.path,
        "cookie": request.cookies.get("flavour"), "url": request.url,
    }

@app.post("/sum")
def add():
    answer = Response(f'{{"sum":{sum(request.get_json())}}}', mimetype="application/json")
    answer.set_cookie("flavour", "oat")
    return answer

@app.get("/stream")
def stream():
    def parts():
        yield b"first"
        while not os.path.exists("go"):
            time.sleep(0.01)
        yield b"last"
    return Response(parts())
"""

DJANGO = """
import json
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.http import JsonResponse
from django.urls import path
settings.configure(SECRET_KEY="of a test", ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"])

def add(request):
    return JsonResponse({"sum": sum(json.loads(request.body))})

urlpatterns = [path("sum", add)]
asgi = get_asgi_application()
wsgi = get_wsgi_application()
"""

VALIDATED = """
import json, os, time
from wsgiref.validate import validator

def plain(environ, start_response):
    start_response("200 OK", [("Content-Type", "application/json")])
    if environ["PATH_INFO"] == "/stream":
        return parts()
    numbers = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
    return [json.dumps({"sum": sum(numbers)}).encode()]

def parts():
    yield b"first"
    while not os.path.exists("go"):
        time.sleep(0.01)
    yield b"last"

app = validator(plain)
"""


def write(directory: Path, text: str) -> None:
    (directory / "main.py").write_text(text)


def interface_of(text: str) -> tuple[str, ...]:
    """What the signature of the application does not tell: the validator's takes any arguments."""
    return ("--interface", "wsgi") if text == VALIDATED else ()


def post(service: Service, path: str, body: bytes, headers: str = "Connection: close\r\n") -> tuple[int, bytes]:
    with service.connect() as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n{headers}\r\n".encode() + body)
        status, _, answer = read_response(connection)
        return status, answer


def seen(service: Service, headers: str = "") -> dict[str, object]:
    """What the application says it sees of a request."""
    status, _, body = service.get("/", f"{headers}Connection: close\r\n")
    assert status == 200, body
    found: dict[str, object] = json.loads(body)
    return found


# --- frameworks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "app"),
    [
        (FASTAPI, "main:app"),
        (FLASK, "main:app"),
        (VALIDATED, "main:app"),
        (DJANGO, "main:asgi"),
        (DJANGO, "main:wsgi"),
    ],
    ids=["fastapi", "flask", "validated wsgi", "django asgi", "django wsgi"],
)
def test_posts_survive_reloads(directory: Path, text: str, app: str) -> None:
    write(directory, text)
    with Service(directory, "-w", "2", *interface_of(text), app=app) as service:

        def add() -> None:
            status, answer = post(service, "/sum", b"[1, 2, 3]")
            assert (status, json.loads(answer)) == (200, {"sum": 6})

        with Clients(add, 4) as clients:
            for _ in range(2):
                answer = service.ask({"type": "reload"})
                assert answer["exit_code"] == 0, answer
                clients.more(5)
    clients.assert_none_failed()


def test_fastapi_has_its_lifespan_state_and_closes_it_when_it_is_replaced(directory: Path) -> None:
    write(directory, FASTAPI)
    with Service(directory) as service:
        found = seen(service)
        assert (found["greeting"], found["pool"]) == ("hello", "opened")
        assert not (directory / "closed").exists()
        assert service.reload().returncode == 0
        service.wait_for_generations(2)
        assert (directory / "closed").exists()


def test_a_background_task_of_fastapi_outlives_a_reload(directory: Path) -> None:
    write(directory, FASTAPI)
    with Service(directory) as service:
        assert post(service, "/later", b"") == (200, b'"answered"')
        assert service.reload().returncode == 0
        assert len(service.status()["generations"]) == 2, "the task holds the drain"
        (directory / "go").touch()
        service.wait_for_generations(2)
        assert (directory / "done").exists()


@pytest.mark.parametrize("text", [FASTAPI, FLASK, VALIDATED], ids=["fastapi", "flask", "validated wsgi"])
def test_the_first_part_of_a_stream_arrives_before_the_last_is_made(directory: Path, text: str) -> None:
    write(directory, text)
    with Service(directory, *interface_of(text)) as service, service.connect() as connection:
        connection.sendall(b"GET /stream HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
        data = b""
        while b"first" not in data:
            data += connection.recv(65536)
        (directory / "go").touch()
        while chunk := connection.recv(65536):
            data += chunk
        assert data.endswith(b"\r\n4\r\nlast\r\n0\r\n\r\n")


def test_flask_gets_its_cookie_back(directory: Path) -> None:
    write(directory, FLASK)
    with Service(directory) as service, service.connect() as connection:
        head = b"POST /sum HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: 3\r\n\r\n[4]"
        connection.sendall(head)
        _, headers, _ = read_response(connection)
        cookie = headers["set-cookie"].partition(";")[0]
        assert seen(service, f"Cookie: {cookie}\r\n")["cookie"] == "oat"


# --- the client's address -------------------------------------------------------------------------------------------

FORWARDED = "X-Forwarded-For: 203.0.113.7\r\nX-Forwarded-Proto: https\r\n"


@pytest.mark.parametrize(
    ("text", "arguments", "environment", "expected"),
    [
        (FASTAPI, (), {}, ("203.0.113.7", "https")),  # as uvicorn does: a proxy on this host is believed
        (FLASK, (), {}, ("203.0.113.7", "https")),
        (FASTAPI, ("--forwarded-allow-ips", "10.0.0.1"), {}, ("127.0.0.1", "http")),
        (FLASK, ("--forwarded-allow-ips", "10.0.0.1,127.0.0.1"), {}, ("203.0.113.7", "https")),
        (FLASK, (), {"FORWARDED_ALLOW_IPS": "10.0.0.1"}, ("127.0.0.1", "http")),
        (FASTAPI, ("--forwarded-allow-ips", "*"), {"FORWARDED_ALLOW_IPS": "10.0.0.1"}, ("203.0.113.7", "https")),
    ],
    ids=["asgi", "wsgi", "asgi not trusted", "wsgi list", "variable", "option over variable"],
)
def test_only_a_trusted_proxy_says_who_the_client_is(
    directory: Path, text: str, arguments: tuple[str, ...], environment: dict[str, str], expected: tuple[str, str]
) -> None:
    write(directory, text)
    with Service(directory, *arguments, environment=environment) as service:
        found = seen(service, FORWARDED)
        assert (found["client"], found["scheme"]) == expected


def test_the_clients_address_is_its_own(directory: Path) -> None:
    write(directory, FASTAPI)
    with Service(directory) as service, service.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        found = json.loads(read_response(connection)[2])
        assert (found["client"], found["port"]) == connection.getsockname()


# --- what an application may be -------------------------------------------------------------------------------------

RESPOND = """
async def respond(send, body=b"1"):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
    await send({"type": "http.response.body", "body": body})

def start(start_response):
    start_response("200 OK", [("Content-Length", "1")])
    return [b"1"]

class Instance:
    async def __call__(self, scope, receive, send):
        assert scope["type"] == "http"
        await respond(send)

class Two:
    def __init__(self, scope):
        assert scope["type"] == "http"

    async def __call__(self, receive, send):
        await respond(send)

class Wsgi:
    def __call__(self, environ, start_response):
        return start(start_response)

class Nested:
    app = Instance()

def create():
    return Instance()

def create_wsgi():
    return Wsgi()

import functools
async def configured(setting, scope, receive, send):
    await Instance()(scope, receive, send)

instance, wsgi = Instance(), Wsgi()
partial = functools.partial(configured, "setting")
"""


@pytest.mark.parametrize(
    ("arguments", "app", "interface"),
    [
        ((), "main:create()", "asgi"),
        (("--factory",), "main:create", "asgi"),
        (("--factory",), "main:create_wsgi", "wsgi"),
        ((), "main:create_wsgi()", "wsgi"),
        ((), "main:instance", "asgi"),
        ((), "main:Nested.app", "asgi"),
        ((), "main:partial", "asgi"),
        ((), "main:Two", "asgi"),
        ((), "main:wsgi", "wsgi"),
        (("--interface", "wsgi"), "main:wsgi", "wsgi"),
        (("--interface", "asgi"), "main:instance", "asgi"),
    ],
)
def test_every_form_of_application_is_served_and_status_says_as_what(
    directory: Path, arguments: tuple[str, ...], app: str, interface: str
) -> None:
    write(directory, RESPOND)
    with Service(directory, *arguments, app=app) as service:
        assert service.get()[::2] == (200, b"1")
        assert [worker["interface"] for worker in service.workers()] == [interface]
        assert re.search(rf"accepting\s+{interface}\b", service.handoff("status").stdout)


# --- limits ---------------------------------------------------------------------------------------------------------


def test_a_request_beyond_its_time_gets_504(directory: Path) -> None:
    write(directory, workbench("1"))
    with Service(directory, "--request-timeout", "200ms") as service:
        assert service.get("/until?never")[::2] == (504, b"Gateway Timeout")
        assert service.get("/")[0] == 200


def test_a_stream_beyond_its_time_ends_without_its_end(directory: Path) -> None:
    write(directory, workbench("1"))
    with Service(directory, "--request-timeout", "200ms") as service, pytest.raises(EOFError):
        service.get("/stream?never")


def test_a_request_too_many_gets_503(directory: Path) -> None:
    write(directory, workbench("1"))
    with Service(directory, "--limit-concurrency", "2") as service, service.connect() as first:
        first.sendall(b"GET /until?go HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
        wait_until((directory / "go.began").exists, "the first request is in progress")
        assert service.get("/")[0] == 503
        (directory / "go").touch()
        assert read_response(first)[0] == 200
        wait_until(lambda: service.workers()[0]["connections"] == 0, "the first connection has gone")
        assert service.get("/")[0] == 200


def test_an_idle_connection_is_closed_after_its_keep_alive(directory: Path) -> None:
    with Service(directory, "--keep-alive", "100ms") as service, service.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        assert read_response(connection)[0] == 200
        assert connection.recv(1) == b""


# --- what is added to requests and responses ------------------------------------------------------------------------


def test_headers_are_added_to_every_response(directory: Path) -> None:
    with Service(directory, "--header", "X-One: 1", "--header", "X-Two:a:b", "--generation-header") as service:
        _, headers, _ = service.get()
        assert (headers["x-one"], headers["x-two"], headers["handoff-generation"]) == ("1", "a:b", "1")


def test_the_root_path_reaches_asgi_and_wsgi(directory: Path) -> None:
    for text, key in ((FASTAPI, "root_path"), (FLASK, "script")):
        write(directory, text)
        with Service(directory, "--root-path", "/mounted") as service:
            assert seen(service)[key] == "/mounted"


# --- settings from elsewhere ----------------------------------------------------------------------------------------


def test_settings_of_uvicorn_are_passed_through(directory: Path) -> None:
    (directory / "handoff.toml").write_text("[uvicorn]\nserver_header = false\ndate_header = false\n")
    with Service(directory) as service:
        _, headers, _ = service.get()
        assert "server" not in headers
        assert "date" not in headers
        (directory / "handoff.toml").write_text("[uvicorn]\ndate_header = true\n")
        assert service.reload().returncode == 0
        _, headers, _ = service.get()
        assert headers["server"] == "uvicorn"
        assert "date" in headers


def test_the_environment_file_is_read_at_each_reload(directory: Path) -> None:
    write(directory, FASTAPI)
    (directory / "web.env").write_text("GREETING='one # two'  # a comment\n")
    with Service(directory, "--env-file", "web.env") as service:
        assert seen(service)["environment"] == {"GREETING": "one # two", "HANDOFF_SLOT": "0"}
        (directory / "web.env").write_text("GREETING=three\n")
        assert service.reload().returncode == 0
        service.wait_for_generations(2)
        assert seen(service)["environment"] == {"GREETING": "three", "HANDOFF_SLOT": "0"}


@pytest.mark.parametrize(
    ("value", "arguments", "workers"),
    [("3", (), 3), ("3", ("--workers", "1"), 1), ("", (), 1), ("many", ("--workers", "1"), 1)],
)
def test_web_concurrency_is_the_number_of_workers_unless_it_is_given(
    directory: Path, value: str, arguments: tuple[str, ...], workers: int
) -> None:
    with Service(directory, *arguments, environment={"WEB_CONCURRENCY": value}) as service:
        assert [worker["slot"] for worker in service.workers()] == list(range(workers))


def test_a_unix_socket_serves_both_interfaces(directory: Path) -> None:
    for text in (hello("1"), FLASK):
        write(directory, text)
        with Service(directory, bind=f"unix:{directory}/s") as service, socket.socket(socket.AF_UNIX) as connection:
            assert service.port == 0
            connection.settimeout(60)
            connection.connect(f"{directory}/s")
            connection.sendall(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
            assert read_response(connection)[0] == 200
        assert not (directory / "s").exists()


# --- logs -----------------------------------------------------------------------------------------------------------

FAILS = hello("1") + "\nserve = app\nasync def app(scope, receive, send):\n    if scope['type'] == 'http': 1 / 0\n"
"""Loads and starts, and fails every request."""

PROGRAM = """
import logging
def main(worker):
    logging.getLogger("mine").warning("a line of the program")
    if worker.ready():
        worker.wait()
"""


def test_the_access_log_carries_generation_and_label_as_text(directory: Path) -> None:
    with Service(directory, "--label", "v1") as service:
        service.get("/path?query")
        line = service.stdout.wait_for("/path").string
        assert re.search(r'127\.0\.0\.1:\d+ - "GET /path\?query HTTP/1\.1" 200.* generation=1 label=v1$', line)
        assert service.reload("--label", "v2").returncode == 0
        service.wait_for_generations(2)
        service.get("/again")
        assert service.stdout.wait_for("/again").string.endswith("generation=2 label=v2")


def test_the_workers_own_requests_are_not_in_the_access_log(directory: Path) -> None:
    with Service(directory, "--check", "/checked", "--warm-up", "/warmed") as service:
        service.get("/asked")
        service.stdout.wait_for("/asked")
    assert [line.split()[3] for line in service.stdout.text.splitlines()] == ['"GET']
    assert "/checked" not in service.stdout.text
    assert "/warmed" not in service.stdout.text


def test_without_an_access_log_there_are_no_lines(directory: Path) -> None:
    with Service(directory, "--no-access-log") as service:
        assert service.get()[0] == 200
    assert service.stdout.text == ""


def json_lines(service: Service) -> list[dict[str, object]]:
    """Every line that master and workers wrote, once they have ended."""
    return [json.loads(line) for line in (*service.stdout.text.splitlines(), *service.stderr.text.splitlines())]


def test_every_line_of_a_json_log_parses_whatever_goes_wrong(directory: Path) -> None:
    write(directory, FAILS)
    with Service(directory, "--log-format", "json", "--label", "v1") as service:
        assert service.get('/say"so"')[0] == 500
        with service.connect() as connection:
            connection.sendall(b"this is not HTTP\r\n\r\n")
            while connection.recv(4096):
                pass
        write(directory, "1 / 0\n")
        assert service.reload().returncode == 3
        service.stdout.wait_for('"status": 500')
    lines = json_lines(service)
    (failed,) = [line for line in lines if "traceback" in line and line.get("logger") == "uvicorn.error"]
    assert "ZeroDivisionError" in str(failed["traceback"])
    (access,) = [line for line in lines if line.get("status") == 500]
    assert (access["path"], access["generation"], access["label"]) == ("/say%22so%22", 1, "v1")


def test_the_log_of_a_program_that_serves_by_itself_is_json_too(directory: Path) -> None:
    write(directory, PROGRAM)
    with Service(directory, "--log-format", "json", app="main:main") as service:
        service.stderr.wait_for("a line of the program")
    (line,) = [line for line in json_lines(service) if line.get("message") == "a line of the program"]
    assert (line["level"], line["logger"], line["generation"]) == ("warning", "mine", 1)


def test_lines_of_a_program_have_the_form_of_the_masters(directory: Path) -> None:
    write(directory, PROGRAM)
    with Service(directory, app="main:main") as service:
        service.stderr.wait_for("a line of the program")
    line = next(line for line in service.stderr.text.splitlines() if "a line of the program" in line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3} warning mine a line of the program generation=1", line)


LOG_CONFIG = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "mine: %(message)s"}},
    "handlers": {"file": {"class": "logging.FileHandler", "filename": "access.log", "formatter": "plain"}},
    "loggers": {"uvicorn.access": {"handlers": ["file"], "level": "INFO", "propagate": False}},
}


def test_a_log_configuration_of_ones_own_is_used(directory: Path) -> None:
    (directory / "log.json").write_text(json.dumps(LOG_CONFIG))
    with Service(directory, "--log-config", "log.json") as service:
        assert service.get("/path")[0] == 200
        log = directory / "access.log"
        wait_until(lambda: log.exists() and "/path" in log.read_text(), "the line is in the file")
        assert log.read_text().startswith("mine: 127.0.0.1:")
    assert service.stdout.text == ""


@pytest.mark.parametrize(
    ("option", "toml", "words"),
    [
        (("--log-config", "none.ini"), "", ["none.ini", "--log-config"]),
        (("--log-config", "main.py"), "", ["main.py"]),
        ((), "[uvicorn]\nserver_haeder = false\n", ["server_haeder", "server_header"]),
    ],
)
def test_settings_that_a_worker_cannot_take_are_one_clear_line(
    directory: Path, option: tuple[str, ...], toml: str, words: list[str]
) -> None:
    (directory / "handoff.toml").write_text(toml)
    with Service(directory, *option).launch() as service:
        assert service.wait() == 1
        text = service.stderr.finish()
    assert text.startswith("handoff: error: ")
    assert "\n" not in text
    for word in words:
        assert word in text
