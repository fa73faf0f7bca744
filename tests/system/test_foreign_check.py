"""`--check` of a command: through the shared listener, where the new one can be told from the old."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.system.foreign import SPEAKER, reload
from tests.system.harness import Clients, Service, wait_until


def written(directory: Path, answer: str = "200 OK", serve: str = "connection.recv(65536)") -> Path:
    text = SPEAKER.replace("HTTP/1.1 200 OK", f"HTTP/1.1 {answer}").replace("connection.recv(65536)", serve)
    (directory / "speaker.py").write_text(text)
    command = json.dumps([sys.executable, "speaker.py"])
    (directory / "handoff.toml").write_text(f'command = {command}\ncheck = "/health"\ncheck_timeout = "25s"\n')
    return directory


def test_a_command_that_answers_well_is_committed_and_loses_nothing(tmp_path: Path) -> None:
    with Service(written(tmp_path), "--workers", "2", app=None) as service:
        with Clients(service.get) as clients:
            for number in range(2, 6):
                reload(service)
                service.wait_for_generations(number)
        clients.assert_none_failed()
        assert service.status()["last_verdict"]["message"] == "generation 5 is live"


@pytest.mark.parametrize(
    ("answer", "serve", "problem"),
    [
        ("503 No", "connection.recv(65536)", "check /health: answered 503: 2 default"),
        (
            "200 OK",
            "connection.recv(65536); connection.send(b'no HTTP'); continue",
            "check /health: no whole answer: no HTTP",
        ),
    ],
)
def test_a_command_that_answers_badly_is_rolled_back(tmp_path: Path, answer: str, serve: str, problem: str) -> None:
    with Service(written(tmp_path), app=None) as service:
        written(tmp_path, answer, serve)
        done = service.ask({"type": "reload"})
        assert done["exit_code"] == 3
        assert problem in done["message"]
        wait_until(lambda: len(service.workers()) == 1, "the bad one has ended")
        assert service.get()[2] == b"1 default"


def test_a_first_start_that_answers_badly_ends_with_its_answer(tmp_path: Path) -> None:
    service = Service(written(tmp_path, "500 Broken"), app=None).launch()
    assert service.wait() == 1
    assert "check /health: answered 500: 1 default" in service.stderr.finish()
    service.__exit__()


def test_one_that_no_connection_comes_to_is_said_to_be_unchecked(tmp_path: Path) -> None:
    with Service(written(tmp_path), app=None) as service:
        (tmp_path / "main.py").write_text("import signal; signal.pause()")
        command = json.dumps([sys.executable, "main.py"])
        (tmp_path / "handoff.toml").write_text(
            f'command = {command}\nready_after = "0s"\ncheck = "/"\ncheck_timeout = "300ms"\n'
        )
        done = service.ask({"type": "reload"})
        assert done["exit_code"] == 0
        text = (
            "generation 2 is live; check /: no connection within 0.3 s came to a worker of this generation, so it was"
        )
        assert text in done["message"]
        service.stderr.wait_for("worker 2: check /: no connection within 0.3 s came")


def test_a_rollback_ends_the_check_at_once(tmp_path: Path) -> None:
    with Service(written(tmp_path), app=None) as service:
        written(tmp_path, serve="signal.pause()")
        asked = service.begin({"type": "reload"})
        wait_until(lambda: checks(service), "the check goes on")
        assert service.ask({"type": "rollback"})["exit_code"] == 0
        assert asked.answer()["exit_code"] == 7
        wait_until(lambda: not checks(service), "nobody asks any more")
        assert service.get()[2] == b"1 default"


def checks(service: Service) -> list[int]:
    return [one.pid for one in service.family() if "handoff.check_command" in one.cmdline()]


def test_a_replacement_is_checked_too(tmp_path: Path) -> None:
    with Service(written(tmp_path), app=None) as service:
        os.kill(service.workers()[0]["pid"], signal.SIGKILL)
        wait_until(lambda: [one["state"] for one in service.workers()] == ["accepting"], "it is replaced")
        written(tmp_path, "500 Broken")
        os.kill(service.workers()[0]["pid"], signal.SIGKILL)
        service.stderr.wait_for("check /health: answered 500: 1 default; crash")
