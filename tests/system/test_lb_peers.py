"""The balancer beside real peers: haproxy on either side with the PROXY protocol, Redis with its own client."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.balancer import Balancer, Kept, backend, config, http_backends
from tests.system.harness import DEADLINE_SECONDS, Clients, Service, read_response, wait_until

CLIENT_APP = """
async def app(scope, receive, send):
    assert scope["type"] == "http"
    body = "{}:{}".format(*scope["client"]).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@contextlib.contextmanager
def process(directory: Path, port: int, *words: str) -> Iterator[None]:
    """A peer that listens on the port."""
    executable = shutil.which(words[0], path="/usr/sbin:/usr/bin:/bin")
    assert executable is not None, f"{words[0]} is not installed: .ci/run does that"
    running = subprocess.Popen(
        [executable, *words[1:]], cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: accepts(port), f"{words[0]} listens")
        yield
    finally:
        running.kill()
        running.wait(DEADLINE_SECONDS)


@contextlib.contextmanager
def haproxy(directory: Path, bind: str, server: str) -> Iterator[int]:
    """In TCP mode; the port it listens on. `bind` and `server`: what is added to those lines."""
    port = free_port()
    text = f"""
global
  maxconn 100
defaults
  mode tcp
  timeout connect 5s
  timeout client 1m
  timeout server 1m
listen one
  bind 127.0.0.1:{port} {bind}
  server one {server}
"""
    (directory / "haproxy.cfg").write_text(text)
    with process(directory, port, "haproxy", "-db", "-f", "haproxy.cfg"):
        yield port


@pytest.mark.parametrize("version", ["send-proxy", "send-proxy-v2"])
def test_haproxys_header_is_taken_and_passed_on(tmp_path: Path, version: str) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "main.py").write_text(CLIENT_APP)
    with Service(tmp_path / "app", "--proxy-protocol", "require") as app:
        rules = 'send_proxy = "v2"\naccept_proxy = "require"'
        text = config({"main": [f'"127.0.0.1:{app.port}"']}, service=rules)
        with Balancer(tmp_path, text) as service, haproxy(tmp_path, "", f"127.0.0.1:{service.port} {version}") as port:
            with socket.create_connection(("127.0.0.1", port), DEADLINE_SECONDS) as client:
                client.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
                host, number = client.getsockname()
                assert read_response(client)[2] == f"{host}:{number}".encode()
            with pytest.raises(ConnectionError):  # who comes without a header
                service.get()


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_haproxy_takes_our_header(tmp_path: Path, version: str) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "main.py").write_text(CLIENT_APP)
    with (
        Service(tmp_path / "app", "--proxy-protocol", "require") as app,
        haproxy(tmp_path, "accept-proxy", f"127.0.0.1:{app.port} send-proxy") as port,
    ):
        check = 'type = "tcp"\ninterval = "200ms"'  # with LOCAL headers: haproxy would refuse anything else
        text = config({"main": [f'"127.0.0.1:{port}"']}, service=f'send_proxy = "{version}"', check=check)
        with Balancer(tmp_path, text) as service:
            kept = Kept(service)
            host, number = kept.connection.getsockname()
            assert kept.ask() == f"{host}:{number}"
            kept.close()


def test_redis_with_its_own_client_while_relay_workers_are_replaced(tmp_path: Path) -> None:
    port = free_port()
    words = ("redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
    with process(tmp_path, port, *words):
        text = config({"main": [f'"127.0.0.1:{port}"']}, check='interval = "200ms"')
        with Balancer(tmp_path, text) as service:

            def ask(*command: str) -> str:
                full = ["redis-cli", "-h", "127.0.0.1", "-p", str(service.port), *command]
                found = subprocess.run(full, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=True)
                assert not found.stdout.startswith("(error)"), found.stdout
                return found.stdout.strip()

            assert ask("set", "count", "0") == "OK"
            with Clients(lambda: ask("incr", "count"), 2) as clients:
                for _ in range(2):
                    clients.more(3)
                    assert service.ask({"type": "reload"})["exit_code"] == 0
                clients.more(3)
            clients.assert_none_failed()
            assert ask("get", "count") == str(clients.done)
            big = "x" * 300_000
            (tmp_path / "big").write_text(big)
            with (tmp_path / "big").open() as stdin:
                full = ["redis-cli", "-h", "127.0.0.1", "-p", str(service.port), "-x", "set", "big"]
                subprocess.run(full, stdin=stdin, timeout=DEADLINE_SECONDS, check=True, capture_output=True)
            assert ask("get", "big") == big


def applied(service: Balancer, text: str) -> subprocess.CompletedProcess[str]:
    service.write(text)
    return service.lb("apply")


def test_a_server_that_is_passed_as_an_fd(tmp_path: Path) -> None:
    """`fd://N`: what a parent has bound."""
    with http_backends(tmp_path, "a") as servers, socket.create_server(("127.0.0.1", 0)) as listener:
        text = config({"main": [backend(servers["a"])]}, listen=f"fd://{listener.fileno()}")
        service = Balancer(tmp_path, text)
        service.pass_fds = (listener.fileno(),)
        with service:
            assert service.port == listener.getsockname()[1]
            assert service.body() == "a /"
            assert service.ask({"type": "reload"})["exit_code"] == 0
            assert service.body() == "a /"
            own = f"127.0.0.1:{service.port}"
            for added in (
                service.lb("add", "shop/main", f"x={own}"),
                applied(service, text.replace("[{", f'["{own}", {{')),
            ):
                assert added.returncode == 2, added
                assert f"{own} is an address that this balancer listens on itself" in added.stderr
            answer = service.ask({"type": "reload"})
            assert answer["exit_code"] == 3
            assert f"service shop: {own} is an address that this balancer listens on itself" in answer["message"]
            assert service.body() == "a /"
