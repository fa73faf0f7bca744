"""What a service has from whoever starts it, and what its workers have from it."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest

from tests.system.apps import hello, workbench
from tests.system.harness import Service, read_response, wait_until

UNKIND = """
import os, signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
os.execv(sys.executable, [sys.executable, "-m", "handoff", *sys.argv[1:]])
"""
"""A parent that leaves every signal blocked, and several ignored: both outlive fork and exec."""

DESCRIBE = """
import json
print(json.dumps({"app": "main:app", "bind": "127.0.0.1:0"}))
"""


def signals_of(pid: int, field: str) -> set[int]:
    """A set of signals in /proc/PID/status, but for those of the C library's own (nptl(7)), which nobody can reset."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"^{field}:\s*([0-9a-f]+)$", text, re.MULTILINE)
    assert found is not None
    mask = int(found.group(1), 16)
    return {int(number) for number in signal.valid_signals() if mask >> (int(number) - 1) & 1}


def test_signals_that_the_parent_blocked_or_ignored_are_heard_and_not_passed_on(directory: Path) -> None:
    (directory / "describe.py").write_text(DESCRIBE)
    describe = shlex.join([sys.executable, "describe.py"])
    command = [sys.executable, "-c", UNKIND]
    with Service(directory, "--describe", describe, app=None, bind=None, command=command) as service:
        service.signal(signal.SIGHUP)
        service.stderr.wait_for("verdict: generation 2 is live")
        service.wait_for_generations(2)
        (worker,) = service.workers()
        assert signals_of(worker["pid"], "SigBlk") == set()
        ignored_by_python = {int(signal.SIGPIPE), int(signal.SIGXFSZ)}
        assert signals_of(worker["pid"], "SigIgn") <= ignored_by_python
        os.kill(worker["pid"], signal.SIGKILL)
        service.stderr.wait_for("was killed by SIGKILL")
        service.wait_for_generations(2)
        service.signal(signal.SIGTERM)
        assert service.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_drains_and_cuts_nothing_off(directory: Path, number: signal.Signals) -> None:
    """Ctrl-C, or systemd with KillMode=control-group on some commands: workers are in groups of their own."""
    (directory / "main.py").write_text(workbench("1"))
    with Service(directory, "-w", "2") as service, service.connect() as connection:
        connection.sendall(b"GET /until?go HTTP/1.1\r\nHost: test\r\n\r\n")
        wait_until((directory / "go.began").exists, "the request is in progress")
        os.killpg(os.getpgid(service.pid), number)
        service.stderr.wait_for(f"signal={number.name}")
        (directory / "go").touch()
        assert read_response(connection)[2] == b"1"
        assert service.wait() == 0


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_modules_of_the_application_that_are_named_like_ours_stand_in_for_nobody(directory: Path, loop: str) -> None:
    for name in ("lb", "select", "selectors", "socket", "json", "asyncio", "uvicorn", "click", "typing"):
        (directory / f"{name}.py").write_text("raise SystemExit('imported in place of another')\n")
    (directory / "handoff").mkdir()
    (directory / "handoff" / "__init__.py").write_text("raise SystemExit('imported in place of another')\n")
    (directory / "main.py").write_text(hello("1") + "\nimport json, socket, handoff, selectors\n")
    service = Service(directory, "--loop", loop)
    service.arguments = [service.arguments[0], "--chdir", str(directory), *service.arguments[1:]]
    service.directory = directory.parent
    with service:
        assert service.get()[2] == b"1"
        assert service.ask({"type": "reload"})["exit_code"] == 0
