"""What commands say to NOTIFY_SOCKET while they serve: the watchdog, and fds that are kept for the next worker."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.system.foreign import command, reload
from tests.system.harness import Service, wait_until

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


def test_a_companion_that_hangs_is_ended_and_started_again(tmp_path: Path) -> None:
    words = json.dumps(written(tmp_path, HANGS))
    (tmp_path / "app.py").write_text("async def app(scope, receive, send): ...\n")
    (tmp_path / "handoff.toml").write_text(f'[companion.one]\ncommand = {words}\nwatchdog = "250ms"\n')
    with Service(tmp_path, app="app:app") as service:
        service.stderr.wait_for(r"companion one: worker \d+ said no WATCHDOG=1 for 250ms; crash 2 in a row")


def test_a_command_may_change_its_interval(tmp_path: Path) -> None:
    with command(tmp_path, *written(tmp_path, LIVES), options=("--watchdog", "200ms", "--probation", "1s")) as service:
        assert [one["worker"] for one in service.workers()] == [1]
        assert "WATCHDOG" not in service.stderr.text


def test_a_command_that_hangs_on_probation_is_rolled_back(tmp_path: Path) -> None:
    options = ("--watchdog", "100ms", "--probation", "1h")
    with command(tmp_path, *written(tmp_path, "say('READY=1')\nsignal.pause()\n"), options=options).launch() as service:
        assert service.wait() == 1
        assert "worker 1 said no WATCHDOG=1 for 100ms" in service.stderr.finish()


def test_a_trigger_ends_a_command_at_once(tmp_path: Path) -> None:

    with command(tmp_path, *written(tmp_path, TRIGGERS)) as service:
        os.kill(service.workers()[0]["pid"], signal.SIGUSR1)
        service.stderr.wait_for("worker 1 said WATCHDOG=trigger; crash 1 in a row")


def test_a_watchdog_is_not_for_applications(tmp_path: Path) -> None:
    with Service(tmp_path, "--watchdog", "1s").launch() as service:
        assert service.wait() == 2
        assert "watchdog: is for commands; leave it out for an application" in service.stderr.finish()


def test_what_is_too_long_is_ignored_whole(tmp_path: Path) -> None:
    """In the cut of 4096 bytes it would say that it is ready."""
    text = "say('READY=1\\n' + 'X=' + 'x' * 5000)\nsay('STATUS=too much')\nsignal.pause()\n"
    (tmp_path / "handoff.toml").write_text(f'command = "{" ".join(written(tmp_path, LIVES))}"\ndialect = "systemd"\n')
    with Service(tmp_path, "--boot-timeout", "3s", app=None) as service:
        written(tmp_path, text)
        done = service.ask({"type": "reload"})
        assert (done["exit_code"], "it was too much" in done["message"]) == (3, True), done
        service.stderr.wait_for("notification that is too long was ignored")


# --- stored fds -----------------------------------------------------------------------------------------------------

STORES = """
names = os.environ["LISTEN_FDNAMES"].split(":")
assert len(names) == int(os.environ["LISTEN_FDS"])
log = open("log", "a")
if "state" in names:
    fd = 3 + names.index("state")
    text = os.pread(fd, 100, 0).decode()
else:
    fd, text = os.memfd_create("state"), ""
os.pwrite(fd, (text + os.environ["HANDOFF_SLOT"]).encode(), 0)
say("FDSTORE=1\\nFDNAME=state", fd, fd)
say("FDSTORE=1\\nFDNAME=a:b", os.eventfd(0))
say("FDSTOREREMOVE=1\\nFDNAME=" + ("stored" if "stored" in names else "none"))
def end(*_):
    say("FDSTORE=1\\nFDNAME=last", os.memfd_create("last"))
    os._exit(0)
signal.signal(signal.SIGTERM, end)
print(os.environ["HANDOFF_SLOT"], ":".join(names), text, file=log, flush=True)
say("READY=1")
while True:
    signal.pause()
"""


BY_WORD = ("--workers", "2", "--dialect", "systemd")
"""Not ready for having lived a second: on a busy machine it may have stored nothing by then."""


def lines(directory: Path) -> list[str]:
    return (directory / "log").read_text().splitlines()


def test_what_a_command_stores_is_there_for_the_next_worker_in_its_slot(tmp_path: Path) -> None:
    with command(tmp_path, *written(tmp_path, STORES), options=BY_WORD) as service:
        assert sorted(lines(tmp_path)) == ["0 default ", "1 default "]
        victim = next(one for one in service.workers() if one["slot"] == 0)
        os.kill(victim["pid"], signal.SIGKILL)
        wait_until(lambda: len(lines(tmp_path)) == 3, "it is replaced")
        assert lines(tmp_path)[2] == "0 default:state:stored 0"
        wait_until(lambda: {one["state"] for one in service.workers()} == {"accepting"}, "it accepts")
        reload(service)
        service.wait_for_generations(2)
        assert sorted(lines(tmp_path)[3:]) == ["0 default:state 00", "1 default:state:stored 1"]
        reload(service)
        service.wait_for_generations(3)
        assert sorted(lines(tmp_path)[5:]) == ["0 default:state:stored:last 000", "1 default:state:last 11"]


def stored_fds(service: Service) -> int:
    found = 0
    for one in Path(f"/proc/{service.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the master goes on meanwhile
            found += "memfd:state" in os.readlink(one)
    return found


def test_what_was_stored_is_closed_with_its_slot_and_its_kind(tmp_path: Path) -> None:
    words = written(tmp_path, STORES)
    (tmp_path / "handoff.toml").write_text(f'command = "{" ".join(words)}"\ndialect = "systemd"\nworkers = 3\n')
    with Service(tmp_path, app=None) as service:
        assert stored_fds(service) == 3
        assert service.ask({"type": "scale", "workers": 1})["exit_code"] == 0
        wait_until(lambda: stored_fds(service) == 1, "those of the slots that are gone are closed")
        for number in range(2, 5):
            reload(service)
            service.wait_for_generations(number)
        assert stored_fds(service) == 1
        (tmp_path / "app.py").write_text("async def app(scope, receive, send): ...\n")
        (tmp_path / "handoff.toml").write_text('app = "app:app"\n')
        reload(service)
        service.wait_for_generations(5)
        wait_until(lambda: stored_fds(service) == 0, "an application has no use for them")


COMPANIONS = """
[companion.one]
command = "{command}"
bind = "127.0.0.1:0"

[companion.two]
command = "{command}"
bind = "127.0.0.1:0"
"""


def test_what_a_companion_stores_is_there_for_the_next_of_its_name(tmp_path: Path) -> None:
    words = written(tmp_path, STORES.replace('os.environ["HANDOFF_SLOT"]', 'os.environ["HANDOFF_COMPANION"]'))
    (tmp_path / "app.py").write_text("async def app(scope, receive, send): ...\n")
    (tmp_path / "log").touch()
    (tmp_path / "handoff.toml").write_text(COMPANIONS.format(command=" ".join(words)))

    def until_lines(number: int) -> list[str]:
        wait_until(lambda: len(lines(tmp_path)) == number, f"{number} starts of companions")
        return sorted(lines(tmp_path)[number - 2 :])

    with Service(tmp_path, app="app:app") as service:
        assert until_lines(2) == ["one default ", "two default "]
        reload(service)
        assert until_lines(4) == ["one default:state:stored:last one", "two default:state:stored:last two"]
        (tmp_path / "handoff.toml").write_text("")
        reload(service)
        wait_until(lambda: stored_fds(service) == 0, "companions that are no more have no use for them")


def test_commands_and_companions_ack_on_sockets_of_their_own(tmp_path: Path) -> None:
    words = written(tmp_path, "open('runs-' + os.environ.get('HANDOFF_COMPANION', ''), 'w')\nsignal.pause()\n")
    (tmp_path / "handoff.toml").write_text(
        f'command = "{" ".join(words)}"\nready_after = "50ms"\n[companion.one]\ncommand = "{" ".join(words)}"\n'
    )
    with Service(tmp_path, app=None) as service:
        wait_until(lambda: (tmp_path / "runs-one").exists(), "the companion runs")
        wait_until(
            lambda: sorted(one.name for one in (service.run_dir / service.name).glob("ack-*")) == ["ack-1", "ack-c1"],
            "both have a socket",
        )
        assert "no socket for acks" not in service.stderr.text
