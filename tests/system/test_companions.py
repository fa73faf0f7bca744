"""Companions: one process of a name, of the live generation, old before new, and no concern of the workers."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.system.harness import Clients, Service, wait_until

APP = """
import os

async def app(scope, receive, send):
    assert scope["type"] == "http"
    body = f"{os.environ['HANDOFF_GENERATION']} {os.environ.get('HANDOFF_COMPANION')}".encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})

def job(worker):
    with open("log", "a") as log:
        print("start", worker.generation, worker.name, *worker.listeners, file=log, flush=True)
        if worker.ready():
            worker.wait()
        print("end", worker.generation, file=log, flush=True)
"""
COMMAND = f"""
[companion.command]
command = ["{sys.executable}", "-c", "import signal; signal.pause()"]
ready_after = "0s"
"""


def write(directory: Path, config: str) -> Path:
    (directory / "main.py").write_text(APP)
    (directory / "handoff.toml").write_text(config)
    return directory


def companions(service: Service) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in service.status()["companions"]}


def until_running(service: Service, name: str, generation: int) -> dict[str, Any]:
    def is_running() -> bool:
        one = companions(service)[name]
        return (one["state"], one["generation"]) == ("accepting", generation)

    wait_until(is_running, f"companion {name} of generation {generation} runs")
    return companions(service)[name]


def lines(directory: Path) -> list[str]:
    return (directory / "log").read_text().splitlines()


def test_a_companion_is_replaced_at_the_commit_old_before_new(tmp_path: Path) -> None:
    write(tmp_path, '[companion.job]\napp = "main:job"\nbind = ["127.0.0.1:0", "b=127.0.0.1:0"]\n')
    with Service(tmp_path, "--workers", "2") as service:
        until_running(service, "job", 1)
        assert service.ask({"type": "reload"})["exit_code"] == 0
        until_running(service, "job", 2)
        assert lines(tmp_path) == ["start 1 web default b", "end 1", "start 2 web default b"]
        (tmp_path / "main.py").write_text("raise ValueError('no')")
        assert service.ask({"type": "reload"})["exit_code"] == 3
        assert companions(service)["job"]["generation"] == 2
        names = [one["name"] for one in service.status()["listeners"]]
        assert names == ["default", "job.default", "job.b"]
        shown = service.handoff("status").stdout
        assert "companions" in shown
        assert "main:job" in shown


def test_companions_end_after_the_workers_when_the_service_stops(tmp_path: Path) -> None:
    write(tmp_path, '[companion.job]\napp = "main:job"\n')
    with Service(tmp_path) as service:
        until_running(service, "job", 1)
        assert service.ask({"type": "stop"})["message"] == "stopped"
        assert service.wait() == 0
        said = service.stderr.finish()
        worker = re.search(r"handoff worker .* to=exited", said)
        companion = re.search(r"handoff companion .* name=job .* to=draining", said)
        assert worker is not None, said
        assert companion is not None, said
        assert worker.end() < companion.start()
    assert lines(tmp_path) == ["start 1 web", "end 1"]


def test_every_stop_is_answered_when_the_companions_have_ended(tmp_path: Path) -> None:
    deaf = (
        "import os, signal; signal.signal(signal.SIGTERM, lambda *_: open('told', 'w')); [signal.pause() for _ in 'ab']"
    )
    write(tmp_path, f"[companion.deaf]\ncommand = [{json.dumps(sys.executable)}, '-c', {json.dumps(deaf)}]\n")
    with Service(tmp_path) as service:
        pid = until_running(service, "deaf", 1)["pid"]
        first = service.begin({"type": "stop"})
        wait_until((tmp_path / "told").exists, "the workers have ended, and the companion is asked to")
        second = service.begin({"type": "stop"})  # at once: it is killed now
        assert second.answer()["message"] == "stopped"
        assert not psutil.pid_exists(pid)
        assert first.answer()["message"] == "stopped"
        assert service.wait() == 0


def test_a_companion_that_dies_is_started_again_and_no_worker_notices(tmp_path: Path) -> None:
    write(tmp_path, COMMAND)
    with Service(tmp_path) as service:
        workers = service.workers()
        with Clients(service.get, 2) as clients:
            for _ in range(3):
                pid = until_running(service, "command", 1)["pid"]
                os.kill(pid, signal.SIGKILL)
                wait_until(lambda gone=pid: companions(service)["command"]["pid"] not in (0, gone), "it is replaced")
        clients.assert_none_failed()
        assert [one["pid"] for one in service.workers()] == [one["pid"] for one in workers]
        service.stderr.wait_for("companion command: was killed by SIGKILL; crash 3 in a row")


def test_a_companion_that_cannot_start_is_tried_again_with_back_off_and_the_service_runs(tmp_path: Path) -> None:
    write(tmp_path, '[companion.job]\napp = "main:gone"\n')
    with Service(tmp_path) as service:
        service.stderr.wait_for("companion job: application main:gone: module main has no attribute gone; crash 3 in")
        assert service.get()[0] == 200
        write(tmp_path, '[companion.job]\napp = "main:job"\n')
        assert service.ask({"type": "reload"})["exit_code"] == 0
        until_running(service, "job", 2)


def test_companions_come_and_go_with_the_configuration_and_serve_what_is_bound_for_them(tmp_path: Path) -> None:
    write(tmp_path, "")
    with Service(tmp_path) as service:
        assert companions(service) == {}
        write(tmp_path, '[companion.admin]\napp = "main:app"\nbind = "127.0.0.1:0"\n' + COMMAND)
        assert service.ask({"type": "reload"})["exit_code"] == 0
        until_running(service, "admin", 2)
        command = until_running(service, "command", 2)["pid"]
        address = next(one["address"] for one in service.status()["listeners"] if one["name"] == "admin.default")
        service.port = int(address.rpartition(":")[2])
        assert service.get()[2] == b"2 admin"
        write(tmp_path, "")
        assert service.ask({"type": "reload"})["exit_code"] == 0
        wait_until(lambda: companions(service) == {}, "both are gone")
        assert not psutil.pid_exists(command)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ("[companion.a]\n", "companion: a: a companion runs either an app or a command; give one of the two"),
        ('[companion.a]\napp = "m:a"\nwrokers = 2\n', 'companion: a: unknown key "wrokers"; leave it out'),
        ('[companion.a]\napp = "m:a"\nbindd = ":80"\n', 'companion: a: unknown key "bindd"; did you mean "bind"?'),
        ('[companion.a]\napp = "m"\n', 'companion: a: app = "m": expected module:attribute, for example main:app'),
        ('[companion."a b"]\napp = "m:a"\n', 'name "a b": expected letters, digits and _ . -'),
        ('[companion.a]\ncommand = "no-such-program"\n', "companion a: command no-such-program: is not found in PATH"),
        ('[companion.a]\napp = "m:a"\ndrain_signal = "HUP"\n', "companion: a: drain_signal: means nothing for an app"),
        ("companion = 3\n", "companion = 3: expected tables [companion.NAME]"),
    ],
)
def test_a_bad_companion_ends_the_start_with_one_line(tmp_path: Path, config: str, problem: str) -> None:
    with Service(write(tmp_path, config)).launch() as service:
        assert service.wait() in (1, 2)
        said = service.stderr.finish()
        assert problem in said
        assert said.count("\n") <= 1
