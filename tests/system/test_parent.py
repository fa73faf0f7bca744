"""What the parent of the service is told over NOTIFY_SOCKET."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.harness import DEADLINE_SECONDS, Service

APP = """
async def app(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})
"""


@pytest.fixture(params=["path", "abstract"])
def told(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@handoff-test-{tmp_path}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + address[1:] if address.startswith("@") else address)
        listener.settimeout(DEADLINE_SECONDS)
        yield address, listener


def test_the_parent_is_told_of_the_first_commit_of_reloads_and_of_the_stop(
    tmp_path: Path, told: tuple[str, socket.socket]
) -> None:
    address, listener = told
    (tmp_path / "main.py").write_text(APP)
    with Service(tmp_path, environment={"NOTIFY_SOCKET": address}) as service:
        assert listener.recv(4096).decode() == (
            f"READY=1\nMAINPID={service.pid}\nSTATUS=generation 1 serves main:app on 127.0.0.1:{service.port}\n"
        )
        assert service.ask({"type": "reload"})["exit_code"] == 0
        assert listener.recv(4096).decode().startswith("STATUS=generation 2 serves main:app on ")
        (tmp_path / "main.py").write_text("raise ValueError('not\\nthis')")
        assert service.ask({"type": "reload"})["exit_code"] == 3
        said = listener.recv(4096).decode()
        assert said.startswith("STATUS=rolled back: ")
        assert said.endswith("generation 2 stays live\n")
        assert said.count("\n") == 1
        service.ask({"type": "stop"})
        assert listener.recv(4096).decode() == "STOPPING=1\nSTATUS=stopping\n"


def test_a_parent_that_went_away_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(APP)
    with Service(tmp_path, environment={"NOTIFY_SOCKET": str(tmp_path / "gone")}) as service:
        service.stderr.wait_for("the parent cannot be told anything more reason=No such file")
        assert service.ask({"type": "reload"})["exit_code"] == 0


def test_an_address_that_is_none_ends_the_start_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(APP)
    with Service(tmp_path, environment={"NOTIFY_SOCKET": "vsock:2:1"}).launch() as service:
        assert service.wait() == 2
        said = service.stderr.finish().splitlines()
        assert said == [
            "handoff: error: NOTIFY_SOCKET='vsock:2:1': is no address of a unix socket; "
            "let the parent set it, or unset it"
        ]
