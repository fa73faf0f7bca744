"""Each example does what its docstring promises, started by the very command that is written there."""

from __future__ import annotations

import ast
import json
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from websockets.sync.client import connect

from tests.system.harness import Clients, Service, read_response, wait_until

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MAKE_RUN = ("hello", ["main:app", "--chdir", "examples/hello", "--workers", "2"])
"""The one example whose command is in the Makefile."""


def written_commands() -> list[tuple[str, list[str]]]:
    """(example, arguments of `handoff run`) for `make run`, and for every command in a docstring of an example."""
    found = [MAKE_RUN]
    for file in sorted(set(EXAMPLES.glob("*/main.py")) - {EXAMPLES / "hello" / "main.py"}):
        docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
        commands = [line.strip() for line in docstring.splitlines() if line.strip().startswith("handoff run ")]
        assert commands, f"{file}: does not say how to run it"
        found += [(file.parent.name, shlex.split(command)[2:]) for command in commands]
    return found


def on_free_ports(arguments: list[str]) -> list[str]:
    """The same arguments, every port replaced by 0."""
    previous = ["", *arguments[:-1]]
    pairs = zip(previous, arguments, strict=True)
    return [one.rpartition(":")[0] + ":0" if before == "--bind" and ":" in one else one for before, one in pairs]


def copied(example: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(EXAMPLES / example, tmp_path / "examples" / example))


def ports_of(service: Service) -> dict[str, int]:
    return {one["name"]: int(one["address"].rpartition(":")[2]) for one in service.status()["listeners"]}


def get(port: int, path: str = "/") -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        status, _, body = read_response(connection)
        assert status == 200, body
        return body


def echo(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"hello\n")
        return connection.recv(100)


def echo_datagram(port: int) -> bytes:
    with socket.socket(type=socket.SOCK_DGRAM) as client:
        client.settimeout(60)
        client.sendto(b"hello\n", ("127.0.0.1", port))
        return client.recv(100)


TALKS: dict[str, Callable[[int], bytes]] = {
    "asyncio_echo": echo,
    "chat": echo,
    "selectors_echo": echo,
    "django_app": get,
    "fastapi_app": get,
    "flask_app": get,
    "hello": get,
    "metrics_port": get,
    "scheduler": get,
    "udp_echo": echo_datagram,
    "websocket_counter": get,
}


@pytest.mark.parametrize(("example", "arguments"), written_commands())
def test_the_written_command_serves_before_and_after_a_reload(
    tmp_path: Path, example: str, arguments: list[str]
) -> None:
    copied(example, tmp_path)
    bind = None if "--bind" in arguments else "127.0.0.1:0"
    talk = TALKS.get(example, lambda _: b"hello")
    with Service(tmp_path, *on_free_ports(arguments), app=None, bind=bind) as service:
        first = talk(service.port)
        assert b"hello" in first.lower(), first
        assert service.ask({"type": "reload"})["exit_code"] == 0
        service.wait_for_generations(2)
        assert talk(service.port) == first


def test_every_example_is_talked_to() -> None:
    assert {file.parent.name for file in EXAMPLES.glob("*/main.py")} == {*TALKS, "jobs"}


def test_each_job_is_done_once_over_reloads(tmp_path: Path) -> None:
    directory = copied("jobs", tmp_path)
    with Service(directory, "--bind", "none", "--workers", "2", app="main:main", bind=None) as service:
        names = [f"job-{number}" for number in range(60)]
        for index, name in enumerate(names):
            (directory / "new").write_text(name)
            (directory / "new").rename(directory / "jobs" / name)
            if index % 20 == 10:
                assert service.ask({"type": "reload"})["exit_code"] == 0
        wait_until(lambda: not list((directory / "jobs").iterdir()), "all jobs are taken and done")
        assert service.status()["listeners"] == []
    done = {file.name: file.read_text() for file in (directory / "done").iterdir()}
    assert sorted(done) == sorted(names)
    assert all(text.startswith(f"{name.upper()} by generation ") for name, text in done.items())
    assert len({text.rpartition(" ")[2] for text in done.values()}) > 1


def test_no_datagram_that_reached_the_socket_is_lost_in_reloads(tmp_path: Path) -> None:
    directory = copied("udp_echo", tmp_path)
    with Service(directory, "--workers", "2", app="main:main", bind="udp:127.0.0.1:0") as service:

        def exchange() -> None:
            with socket.socket(type=socket.SOCK_DGRAM) as one:
                one.settimeout(60)
                for number in range(20):  # none is sent again: one that is lost is missed
                    one.sendto(b"%d" % number, ("127.0.0.1", service.port))
                assert sorted(int(one.recv(100)) for _ in range(20)) == list(range(20))

        clients = Clients(exchange, 4, 0.005)
        with clients:
            for _ in range(5):
                assert service.ask({"type": "reload"})["exit_code"] == 0
                clients.more(20)
    clients.assert_none_failed()


def test_no_scrape_of_the_metrics_port_is_lost_in_reloads(tmp_path: Path) -> None:
    directory = copied("metrics_port", tmp_path)
    with Service(directory, "--bind", "web=127.0.0.1:0", "--bind", "metrics=127.0.0.1:0", bind=None) as service:
        ports = ports_of(service)
        web, metrics = Clients(lambda: get(ports["web"]), 2), Clients(lambda: get(ports["metrics"]), 4, 0.005)
        with web, metrics:
            for _ in range(5):
                assert service.ask({"type": "reload"})["exit_code"] == 0
                metrics.more(20)
    web.assert_none_failed()
    metrics.assert_none_failed()


def test_a_note_of_fastapi_is_taken_in_the_background(tmp_path: Path) -> None:
    with Service(copied("fastapi_app", tmp_path)) as service:

        def note() -> int:
            with service.connect() as connection:
                connection.sendall(b"POST /notes?text=a HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n")
                found: dict[str, int] = json.loads(read_response(connection)[2])
                return found["notes"]

        assert note() == 0
        wait_until(lambda: note() > 0, "the first note is there")


def test_a_broken_urlconf_of_django_as_wsgi_is_found_by_the_check(tmp_path: Path) -> None:
    directory = copied("django_app", tmp_path)
    with Service(directory, "--check", "/", app="main:wsgi") as service:
        source = (directory / "main.py").read_text()
        (directory / "main.py").write_text(source.replace("ROOT_URLCONF=__name__", 'ROOT_URLCONF="nowhere"'))
        done = service.reload()
        assert done.returncode == 3
        assert "check /: answered 500" in done.stderr
        assert get(service.port) == b"Hello from Django!\n"


def test_streams_and_websockets_of_fastapi_run_on_in_a_reload(tmp_path: Path) -> None:
    with Service(copied("fastapi_app", tmp_path)) as service:
        assert get(service.port, "/count") == b"".join(b"%d\n" % number for number in range(10))
        with connect(f"ws://127.0.0.1:{service.port}/echo") as websocket:
            websocket.send("one")
            assert websocket.recv() == "one"
            assert service.ask({"type": "reload"})["exit_code"] == 0
            websocket.send("two")  # it runs on in the old worker
            assert websocket.recv() == "two"


def test_flask_reads_bodies_and_streams(tmp_path: Path) -> None:
    with Service(copied("flask_app", tmp_path)) as service:
        assert get(service.port, "/count") == b"".join(b"%d\n" % number for number in range(10))
        with service.connect() as connection:
            connection.sendall(b"POST /shout HTTP/1.1\r\nHost: test\r\nContent-Length: 5\r\n\r\nhello")
            assert read_response(connection)[2] == b"HELLO"


@pytest.mark.parametrize("example", ["selectors_echo", "asyncio_echo"])
def test_an_echo_program_keeps_its_clients_through_the_drain(tmp_path: Path, example: str) -> None:
    with Service(copied(example, tmp_path), app="main:main") as service, service.connect() as old:
        old.sendall(b"before")
        assert old.recv(100) == b"before"
        assert service.ask({"type": "reload"})["exit_code"] == 0
        old.sendall(b"after")
        assert old.recv(100) == b"after"
        assert echo(service.port) == b"hello\n"
        old.close()
        service.wait_for_generations(2)


@pytest.mark.timeout(600)
def test_two_hosts_and_a_balancer_are_rolled_out_and_back_by_one_command() -> None:
    command = [sys.executable, str(EXAMPLES / "two_hosts" / "demo.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=590)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed: 0" in done.stdout
