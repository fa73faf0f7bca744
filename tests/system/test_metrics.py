"""`--metrics`: what Prometheus is told, read with Prometheus' own parser."""

from __future__ import annotations

import os
import signal
import socket
import struct
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.system.harness import DEADLINE_SECONDS, Service, read_response, wait_until

APP = """
import asyncio

class App:
    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        path = scope["path"].strip("/")
        if path == "raise":
            raise ValueError("mine")
        if path == "nothing":
            return
        if path == "wait":
            await receive()
            await receive()
            return
        if path == "late":
            await asyncio.sleep(3600)
        await send({"type": "http.response.start", "status": int(path or 200), "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"o", "more_body": True})
        await send({"type": "http.response.body", "body": b"k"})
        if path == "202":
            await asyncio.sleep(0.2)  # runs on after its answer: no part of its duration

app = App()
"""
WSGI = """
def app(environ, start_response):
    start_response("418 I'm a teapot", [("content-length", "2")])
    return [b"ok"]
"""


def write(directory: Path, text: str = APP) -> Path:
    (directory / "main.py").write_text(text)
    return directory


def scrape(service: Service) -> dict[str, float]:
    """Every sample by name and labels."""
    address = service.stderr.wait_for(r"handoff metrics address=(\S+)").group(1)
    if address.startswith("unix:"):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address.removeprefix("unix:"))
    else:
        host, _, port = address.rpartition(":")
        connection = socket.create_connection((host, int(port)), timeout=DEADLINE_SECONDS)
    with connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n")
        status, headers, body = read_response(connection)
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(body.decode())
    samples = [sample for family in families for sample in family.samples]
    return {
        f"{one.name}{{{','.join(f'{key}={value}' for key, value in sorted(one.labels.items()))}}}": one.value
        for one in samples
    }


def statuses(service: Service) -> dict[str, float]:
    prefix = "handoff_requests_total{status="
    return {key[len(prefix) : -1]: value for key, value in scrape(service).items() if key.startswith(prefix)}


def test_requests_are_counted_by_status_and_duration(tmp_path: Path) -> None:
    options = ("--metrics", "127.0.0.1:0", "--request-timeout", "5s", "--check", "/204", "--warm-up", "/203")
    with Service(write(tmp_path), *options) as service:
        for path in ("/200", "/200", "/202", "/404", "/raise", "/nothing", "/late"):
            service.get(path)
        with service.connect() as connection:  # it goes away with a reset
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(b"GET /wait HTTP/1.1\r\nHost: test\r\n\r\n")
            wait_until(lambda: scrape(service)["handoff_requests_in_progress{}"] == 1, "it has begun")
        with service.connect() as connection:
            connection.sendall(b"nonsense\r\n\r\n")
            assert read_response(connection)[0] == 400
        expected = {"200": 2, "202": 1, "400": 1, "404": 1, "499": 1, "500": 2, "504": 1}
        wait_until(lambda: statuses(service) == expected, "every request counted once, checks not at all")
        samples = scrape(service)
        assert samples["handoff_request_duration_seconds_count{}"] == 8
        assert samples["handoff_request_duration_seconds_bucket{le=+Inf}"] == 8
        assert samples["handoff_request_duration_seconds_bucket{le=60.0}"] == 8
        assert samples["handoff_request_duration_seconds_bucket{le=0.25}"] <= 7
        assert samples["handoff_request_duration_seconds_sum{}"] >= 5
        wait_until(lambda: scrape(service)["handoff_requests_in_progress{}"] == 0, "nothing is in progress")
        assert samples["handoff_info{name=web,release=0.1.0}"] == 1


def test_counts_go_on_over_reloads_moves_and_the_end_of_workers(tmp_path: Path) -> None:
    with Service(write(tmp_path), "--metrics", "127.0.0.1:0", "--workers", "2") as service:
        with service.connect() as connection:
            for _ in range(3):
                connection.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
                assert read_response(connection)[0] == 200
                assert service.ask({"type": "reload"})["exit_code"] == 0
                live = service.status()["live"]
                service.wait_for_generations(live)
            samples = scrape(service)
            assert samples["handoff_connections{state=accepting}"] == 1
        assert samples["handoff_requests_total{status=200}"] == 3
        assert samples["handoff_reloads_total{verdict=done}"] == 3
        assert samples["handoff_reload_duration_seconds_count{}"] == 3
        assert samples["handoff_live_generation{}"] == 4
        assert samples["handoff_generations{state=live}"] == 1
        assert samples["handoff_workers{state=accepting}"] == samples["handoff_workers_wanted{}"] == 2
        moved = samples["handoff_moves_total{event=moved}"]
        assert moved == samples["handoff_moves_total{event=adopted}"] >= 3
        for count in ("1", "3", "2"):
            assert service.handoff("scale", count).returncode == 0
        wait_until(lambda: len(service.workers()) == 2, "one has ended")
        assert scrape(service)["handoff_worker_restarts_total{}"] == 0
        os.kill(service.workers()[0]["pid"], signal.SIGKILL)
        wait_until(lambda: scrape(service)["handoff_worker_restarts_total{}"] == 1, "the restart is counted")
        (tmp_path / "main.py").write_text("raise ValueError('not this one')")
        assert service.ask({"type": "reload"})["exit_code"] == 3
        assert scrape(service)["handoff_reloads_total{verdict=rolled_back}"] == 1
        assert scrape(service)["handoff_requests_total{status=200}"] == 3


def test_wsgi_applications_are_measured_and_the_address_may_be_a_unix_socket(tmp_path: Path) -> None:
    directory = write(tmp_path, WSGI)
    (directory / "handoff.toml").write_text('metrics = "unix:m.sock"\n')
    with Service(directory) as service:
        for _ in range(5):
            assert service.get()[0] == 418
        # A request is counted once its answer is written: the client may be a moment ahead of the count.
        wait_until(lambda: statuses(service) == {"418": 5}, "every request counted")
        assert (directory / "m.sock").stat().st_mode & 0o777 == 0o600
    assert not (directory / "m.sock").exists()


@pytest.mark.parametrize(
    ("request_line", "status"),
    [("GET / HTTP/1.1", 404), ("POST /metrics HTTP/1.1", 405), ("GET /metrics?x=1 HTTP/1.0", 200)],
)
def test_what_else_is_asked_is_told_where_the_metrics_are(tmp_path: Path, request_line: str, status: int) -> None:
    with Service(write(tmp_path), "--metrics", "127.0.0.1:0") as service:
        port = int(service.stderr.wait_for(r"handoff metrics address=127.0.0.1:(\d+)").group(1))
        with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_SECONDS) as connection:
            connection.sendall(f"{request_line}\r\n".encode())
            connection.sendall(b"Host: test\r\n\r\n")
            assert read_response(connection)[0] == status
        with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_SECONDS) as connection:
            connection.sendall(b"\0\1\2 garbage")
            assert connection.recv(100) == b""
        service.stderr.wait_for("metrics: closed a peer that sent garbage")
        assert service.get()[0] == 200


def test_a_metrics_address_that_is_taken_ends_the_start_with_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Service(write(tmp_path), "--metrics", f"127.0.0.1:{port}").launch() as service:
            assert service.wait() == 1
            assert f"listener metrics: 127.0.0.1:{port} is in use by" in service.stderr.finish()
