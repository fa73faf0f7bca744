"""As PID 1, as in a container: what is orphaned to the master is collected, what is its own is left to its pidfd."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path

import psutil

from tests.system.apps import workbench
from tests.system.harness import Service, read_response, wait_until

ORPHANS = """
import subprocess

serve = app

async def app(scope, receive, send):
    if scope["type"] == "http" and scope["path"] == "/orphans":
        subprocess.run(["sh", "-c", "for _ in 1 2 3 4 5; do (sleep 0.05; exit 3) & done"])
    await serve(scope, receive, send)
"""
DESCRIBE = """
import json, subprocess
subprocess.run(["sh", "-c", "for _ in 1 2 3 4 5; do (exit 3) & done"])
print(json.dumps({"app": "main:app", "bind": "127.0.0.1:0", "workers": 2}))
"""
NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


def in_a_container(directory: Path) -> Service:
    (directory / "main.py").write_text(workbench("1") + ORPHANS)
    (directory / "describe.py").write_text(DESCRIBE)
    describe = shlex.join([sys.executable, "describe.py"])
    command = [*NAMESPACE, sys.executable, "-m", "handoff"]
    return Service(directory, "--describe", describe, app=None, bind=None, command=command)


def master_of(service: Service) -> psutil.Process:
    """Its number out here; in there it is 1, and `service.pid` is who made the namespace."""
    assert service.status()["pid"] == 1
    (master,) = psutil.Process(service.pid).children()
    return master


def zombies(master: psutil.Process) -> list[psutil.Process]:
    return [one for one in master.children() if one.status() == psutil.STATUS_ZOMBIE]


def test_pid_1_collects_orphans_and_reloads_and_drains_as_ever(directory: Path) -> None:
    with in_a_container(directory) as service:
        master = master_of(service)
        for _ in range(3):
            assert service.get("/orphans")[0] == 200
            wait_until(lambda: len(master.children()) > 2, "the orphans are the master's now")
            assert service.ask({"type": "reload"})["exit_code"] == 0, "with a describing command among them"
        service.wait_for_generations(4)
        victim = next(one for one in master.children() if any("handoff.worker" in word for word in one.cmdline()))
        victim.send_signal(signal.SIGKILL)
        wait_until(lambda: not victim.is_running(), "a worker that was killed is collected")
        service.wait_for_generations(4)
        wait_until(lambda: len(master.children()) == 2 and not zombies(master), "nothing but the two workers is left")
        with service.connect() as connection:
            connection.sendall(b"GET /until?go HTTP/1.1\r\nHost: test\r\n\r\n")
            wait_until((directory / "go.began").exists, "the request is in progress")
            os.kill(master.pid, signal.SIGTERM)
            service.stderr.wait_for("signal=SIGTERM")
            (directory / "go").touch()
            assert read_response(connection)[2] == b"1"
        assert service.wait() == 0
