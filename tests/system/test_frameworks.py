"""The examples are real applications: each serves, survives reloads under strict clients, and drains."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from websockets.sync.client import connect

from tests.system.harness import Clients, Service

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def copy_of(example: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(EXAMPLES / example, tmp_path / example))


def reload(service: Service, times: int = 3) -> None:
    for _ in range(times):
        done = service.ask({"type": "reload"})
        assert done["exit_code"] == 0, done


@pytest.mark.parametrize(
    ("example", "app", "interface", "body"),
    [
        ("hello", "main:app", "asgi", b"Hello from handoff!\n"),
        ("fastapi_app", "main:app", "asgi", b'{"greeting":"Hello from FastAPI!"}'),
        ("django_app", "main:asgi", "asgi", b"Hello from Django!\n"),
        ("django_app", "main:wsgi", "wsgi", b"Hello from Django!\n"),
        ("flask_app", "main:app", "wsgi", b"Hello from Flask!\n"),
    ],
)
def test_an_application_loses_no_request_in_reloads(
    tmp_path: Path, example: str, app: str, interface: str, body: bytes
) -> None:
    with Service(copy_of(example, tmp_path), "-w", "2", "--check", "/", app=app) as service:

        def get() -> None:
            status, _, found = service.get()
            assert (status, found) == (200, body)

        with Clients(get, 4) as clients:
            reload(service)
            clients.more(8)
        assert {worker["interface"] for worker in service.workers()} == {interface}
    clients.assert_none_failed()


def test_fastapi_streams_talks_websocket_and_finishes_background_tasks(tmp_path: Path) -> None:
    with Service(copy_of("fastapi_app", tmp_path)) as service:
        assert service.get("/count")[2] == b"".join(b"%d\n" % number for number in range(10))
        with service.connect() as connection:
            connection.sendall(b"POST /notes?text=a HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n")
            assert b"200 OK" in connection.recv(65536)
        with connect(f"ws://127.0.0.1:{service.port}/echo") as websocket:
            websocket.send("one")
            assert websocket.recv() == "one"
            assert service.ask({"type": "reload"})["exit_code"] == 0
            websocket.send("two")  # it runs on in the old worker
            assert websocket.recv() == "two"


def test_flask_reads_bodies_and_streams(tmp_path: Path) -> None:
    with Service(copy_of("flask_app", tmp_path)) as service:
        assert service.get("/count")[2] == b"".join(b"%d\n" % number for number in range(10))
        with service.connect() as connection:
            connection.sendall(b"POST /shout HTTP/1.1\r\nHost: test\r\nContent-Length: 5\r\n\r\nhello")
            data = b""
            while b"HELLO" not in data:
                chunk = connection.recv(65536)
                assert chunk
                data += chunk


def test_a_broken_urlconf_rolls_back(tmp_path: Path) -> None:
    directory = copy_of("django_app", tmp_path)
    with Service(directory, "--check", "/", app="main:asgi") as service:
        source = (directory / "main.py").read_text()
        (directory / "main.py").write_text(source.replace("ROOT_URLCONF=__name__", 'ROOT_URLCONF="nowhere"'))
        done = service.reload()
        assert done.returncode == 3
        assert "check /: answered 500" in done.stderr
        assert service.get()[2] == b"Hello from Django!\n"


def test_a_port_of_the_application_is_kept_over_reloads(tmp_path: Path) -> None:
    directory = copy_of("metrics_port", tmp_path)
    with Service(directory, "--bind", "web=127.0.0.1:0", "--bind", "metrics=127.0.0.1:0", bind=None) as service:
        listeners = {one["name"]: one["address"] for one in service.status()["listeners"]}
        ports = {name: int(address.rpartition(":")[2]) for name, address in listeners.items()}
        for _ in range(2):
            service.port = ports["web"]
            assert service.get()[2] == b"Hello\n"
            service.port = ports["metrics"]
            assert service.get()[2].startswith(b"answered_total ")
            reload(service, 1)


@pytest.mark.parametrize("example", ["selectors_echo", "asyncio_echo"])
def test_an_echo_program_keeps_its_clients_through_the_drain(tmp_path: Path, example: str) -> None:
    with Service(copy_of(example, tmp_path), app="main:main") as service, service.connect() as old:
        old.sendall(b"before")
        assert old.recv(100) == b"before"
        reload(service, 1)
        old.sendall(b"after")
        assert old.recv(100) == b"after"
        with service.connect() as new:
            new.sendall(b"new")
            assert new.recv(100) == b"new"
        old.close()
        service.wait_for_generations(2)


def test_log_lines_are_json_and_carry_generation_and_label(tmp_path: Path) -> None:
    directory = copy_of("hello", tmp_path)
    with Service(directory, "--log-format", "json", "--label", "v1", "--generation-header") as service:
        assert service.get()[1]["handoff-generation"] == "1"
        service.stdout.wait_for('"status": 200')
    for line in [*service.stdout.text.splitlines(), *service.stderr.text.splitlines()]:
        json.loads(line)
    access = json.loads(service.stdout.text.splitlines()[0])
    assert (access["generation"], access["label"], access["path"]) == (1, "v1", "/")
