"""What commands say to NOTIFY_SOCKET while they serve: the watchdog, and fds that are kept for the next worker."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.system.foreign import command
from tests.system.harness import Service

NOTIFY = """
import array, os, signal, socket, sys, time

def say(text, *fds):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect("\\0" + os.environ["NOTIFY_SOCKET"][1:])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        notify.sendmsg([text.encode()], rights)
"""
HANGS = """
assert os.environ["WATCHDOG_PID"] == str(os.getpid())
assert os.environ["WATCHDOG_USEC"] == "250000"
signal.signal(signal.SIGTERM, signal.SIG_DFL if sys.argv[1:] != ["deaf"] else signal.SIG_IGN)
say("READY=1")
for _ in range(5):
    say("WATCHDOG=1")
    time.sleep(0.05)
while True:
    signal.pause()
"""
LIVES = """
say("READY=1\\nWATCHDOG_USEC=3600000000")
while True:
    signal.pause()
"""
TRIGGERS = """
signal.signal(signal.SIGUSR1, lambda *_: say("WATCHDOG=trigger"))
say("READY=1")
while True:
    signal.pause()
"""


def written(directory: Path, text: str, *words: str) -> list[str]:
    (directory / "main.py").write_text(NOTIFY + text)
    return [sys.executable, "main.py", *words]


# --- the watchdog ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "end"), [((), "SIGTERM"), (("deaf",), "SIGKILL")])
@pytest.mark.parametrize("dialect", ["auto", "einhorn"])
def test_a_command_that_hangs_is_ended_and_replaced(
    tmp_path: Path, words: tuple[str, ...], end: str, dialect: str
) -> None:
    options = ("--watchdog", "250ms", "--ready-after", "1h", "--dialect", dialect, "--probation", "0s")
    with command(tmp_path, *written(tmp_path, HANGS, *words), options=options) as service:
        service.stderr.wait_for(r"to=stopping reason=worker 1 said no WATCHDOG=1 for 250ms|reason=.worker 1 said no")
        service.stderr.wait_for(f"worker=1 .*from={'killed' if end == 'SIGKILL' else 'stopping'} .*was killed by {end}")
        service.stderr.wait_for("slot 0: worker 1 said no WATCHDOG=1 for 250ms; crash 1 in a row")
        service.stderr.wait_for("worker=2 .*to=accepting")


def test_a_command_may_change_its_interval(tmp_path: Path) -> None:
    with command(tmp_path, *written(tmp_path, LIVES), options=("--watchdog", "200ms", "--probation", "1s")) as service:
        assert [one["worker"] for one in service.workers()] == [1]
        assert "WATCHDOG" not in service.stderr.text


def test_a_command_that_hangs_on_probation_is_rolled_back(tmp_path: Path) -> None:
    options = ("--watchdog", "100ms", "--probation", "1h")
    service = command(tmp_path, *written(tmp_path, "say('READY=1')\nsignal.pause()\n"), options=options).launch()
    assert service.wait() == 1
    assert "worker 1 said no WATCHDOG=1 for 100ms" in service.stderr.finish()
    service.__exit__()


def test_a_trigger_ends_a_command_at_once(tmp_path: Path) -> None:

    with command(tmp_path, *written(tmp_path, TRIGGERS)) as service:
        os.kill(service.workers()[0]["pid"], signal.SIGUSR1)
        service.stderr.wait_for("worker 1 said WATCHDOG=trigger; crash 1 in a row")


def test_a_watchdog_is_not_for_applications(tmp_path: Path) -> None:
    service = Service(tmp_path, "--watchdog", "1s").launch()
    assert service.wait() == 2
    assert "watchdog: is for commands; leave it out for an application" in service.stderr.finish()
    service.__exit__()
