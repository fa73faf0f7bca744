"""`--describe COMMAND`: what a service binds and runs, as a command prints it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.system.harness import Service, wait_until

APP = """
import os

async def app(scope, receive, send):
    assert scope["type"] == "http"
    body = os.environ["HANDOFF_LABEL"].encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})
"""
DESCRIBE = 'import sys; sys.stdout.write(open("described.json").read())'
COMMAND = shlex.join([sys.executable, "describe.py"])


def described(directory: Path, values: dict[str, Any], program: str = DESCRIBE) -> Path:
    (directory / "main.py").write_text(APP)
    (directory / "describe.py").write_text(program)
    (directory / "described.json").write_text(json.dumps(values))
    return directory


def start(directory: Path) -> Service:
    return Service(directory, "--describe", COMMAND, app=None, bind=None)


GOOD: dict[str, Any] = {"app": "main:app", "bind": "127.0.0.1:0", "label": "one"}


def test_a_service_is_what_the_command_prints_at_each_reload(tmp_path: Path) -> None:
    with start(described(tmp_path, GOOD)) as service:
        assert service.get()[2] == b"one"
        more = {**GOOD, "label": "two", "workers": 2, "companion": {"job": {"command": "sleep 1000"}}}
        described(tmp_path, more)
        assert service.ask({"type": "reload"})["exit_code"] == 0
        service.wait_for_generations(2)
        assert service.get()[2] == b"two"
        assert len(service.workers()) == 2
        assert [one["name"] for one in service.status()["companions"]] == ["job"]
        assert service.ask({"type": "rollback"})["exit_code"] == 0
        service.wait_for_generations(3)
        assert service.get()[2] == b"one"


ERRORS: list[tuple[str, dict[str, Any], str]] = [
    ("import sys; sys.exit('out of\\nluck')", GOOD, "describe.py: exited with status 1: luck"),
    ("import os; os.abort()", GOOD, "describe.py: was killed by SIGABRT"),
    ("print('[]')", GOOD, "printed no JSON object (Expected `object`, got `array`); print what handoff.toml would"),
    ("print('{')", GOOD, "printed no JSON object (Input data was truncated)"),
    ("print('x' * 2_000_000)", GOOD, "describe.py: "),
    (DESCRIBE, {**GOOD, "wrokers": 2}, 'description: unknown key "wrokers"; did you mean "workers"?'),
    (DESCRIBE, {**GOOD, "pidfile": "x"}, "description: pidfile: cannot change in a reload"),
]


def test_an_error_is_a_reload_that_is_rolled_back(tmp_path: Path) -> None:
    with start(described(tmp_path, GOOD)) as service:
        for program, values, problem in ERRORS:
            described(tmp_path, values, program)
            answer = service.ask({"type": "reload"})
            assert answer["exit_code"] == 3, answer
            assert problem in answer["message"]
            assert "\n" not in answer["message"]
        assert service.get()[2] == b"one"


def test_a_stop_does_not_wait_for_the_command(tmp_path: Path) -> None:
    with start(described(tmp_path, GOOD)) as service:
        described(tmp_path, GOOD, "import os, signal; open('pid', 'w').write(str(os.getpid())); signal.pause()")
        service.signal(signal.SIGHUP)
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "", "it runs")
        assert service.get()[2] == b"one"
        pid = int((tmp_path / "pid").read_text())
        assert psutil.pid_exists(pid)
        service.signal(signal.SIGTERM)
        assert service.wait() == 0
        assert not psutil.pid_exists(pid)


def test_a_command_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    with start(described(tmp_path, GOOD)) as service:
        program = "import os, signal\nos.fork()\nopen(f'pid-{os.getpid()}', 'w').close()\nsignal.pause()"
        described(tmp_path, GOOD, program)
        answer = service.ask({"type": "reload"})
        assert (answer["exit_code"], "did not end within 10 s" in answer["message"]) == (3, True)
        pids = [int(file.name[4:]) for file in tmp_path.glob("pid-*")]
        assert len(pids) == 2
        wait_until(lambda: not any(map(psutil.pid_exists, pids)), "both processes are gone")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--describe", "no-such-program x"], "command no-such-program: is not found in PATH"),
        (["--describe", "'"], "expected a command (no closing quotation)"),
        (["--describe", ""], "expected a command and its arguments"),
        (["--describe", "true", "--config", "x.toml"], "--describe and --config: a service is described by one of"),
        (["--describe", "false"], "describe: false: exited with status 1"),
        (["--describe", "true"], "describe: true: printed no JSON object"),
        (["--describe", "yes"], "describe: yes: printed more than 1048576 bytes; print less"),
    ],
)
def test_a_bad_description_ends_the_start_with_one_line(tmp_path: Path, arguments: list[str], problem: str) -> None:
    with Service(tmp_path, *arguments, app=None, bind=None).launch() as service:
        assert service.wait() in (1, 2)
        said = service.stderr.finish()
        assert problem in said
        assert said.count("\n") <= 1
        assert os.listdir(tmp_path) == []


def test_check_takes_the_description_too(tmp_path: Path) -> None:
    described(tmp_path, {"app": "main:gone"})
    command = [sys.executable, "-m", "handoff", "check", "--describe", COMMAND]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "has no attribute gone" in done.stderr
