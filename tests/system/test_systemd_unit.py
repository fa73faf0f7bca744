"""docs/handoff.service: systemd takes it, our command line takes its lines, and they do what it promises."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import click
import psutil
import pytest

from handoff.cli.commands import handoff
from handoff.core.fleet import DRAIN_GRACE_SECONDS, OPEN_SECONDS, STOP_GRACE_SECONDS
from handoff.durations import parse_duration
from handoff.settings import Settings
from tests.system.apps import hello
from tests.system.harness import Service

UNIT = Path(__file__).parents[2] / "docs" / "handoff.service"
RELEASE_LINK = "/srv/web/current"
DEFAULTS = Settings(app="main:app", name="web")


def directive(name: str) -> str:
    """The one value of a directive of the unit."""
    found = [line.partition("=")[2] for line in UNIT.read_text().splitlines() if line.startswith(f"{name}=")]
    assert len(found) == 1, f"{name}= is there {len(found)} times"
    return found[0]


@pytest.fixture
def current(tmp_path: Path) -> Path:
    """A link to a release with the hello application, and this environment as its virtual environment."""
    release = tmp_path / "releases" / "1"
    release.mkdir(parents=True)
    (release / "main.py").write_text(hello("1"))
    (release / ".venv").symlink_to(sys.prefix)
    link = tmp_path / "current"
    link.symlink_to("releases/1")
    return link


def words(name: str, current: Path) -> list[str]:
    """The command line of a directive, with the paths of the test."""
    return shlex.split(directive(name).replace(RELEASE_LINK, str(current)))


def verify(unit: Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("systemd-analyze is missing; install the package systemd")
        pytest.skip("systemd-analyze is not installed")
    return subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60, check=False
    )


def test_systemd_accepts_the_unit(tmp_path: Path, current: Path) -> None:
    unit = tmp_path / "web.service"
    unit.write_text(UNIT.read_text().replace(RELEASE_LINK, str(current)))
    done = verify(unit)
    assert done.returncode == 0, done.stderr
    assert unit.name not in done.stderr  # what systemd ignores is a warning only


def test_the_verification_would_notice_a_misspelled_directive(tmp_path: Path, current: Path) -> None:
    unit = tmp_path / "web.service"
    text = UNIT.read_text().replace(RELEASE_LINK, str(current))
    unit.write_text(text.replace("OOMPolicy=", "OMPolicy="))
    assert "OMPolicy" in verify(unit).stderr


@pytest.mark.parametrize("name", ["ExecStart", "ExecReload"])
def test_our_command_line_takes_the_line(name: str) -> None:
    program, command, *arguments = shlex.split(directive(name))
    assert program.endswith("/bin/handoff")
    with click.Context(handoff) as parent:
        found = handoff.get_command(parent, command)
        assert found is not None
        found.make_context(command, arguments, parent=parent)  # raises for what it does not take


def test_reload_asks_for_the_service_that_the_start_names() -> None:
    named = [line[line.index("--name") + 1] for line in map(shlex.split, map(directive, ("ExecStart", "ExecReload")))]
    assert named[0] == named[1]


def test_systemd_waits_for_a_stop_to_end() -> None:
    longest = DEFAULTS.stop_timeout_seconds + DRAIN_GRACE_SECONDS + STOP_GRACE_SECONDS
    assert parse_duration(directive("TimeoutStopSec")) > longest


def test_systemd_waits_for_a_reload_that_waits_for_another() -> None:
    longest = DEFAULTS.boot_timeout_seconds + DEFAULTS.probation_seconds + OPEN_SECONDS
    assert parse_duration(directive("TimeoutStartSec")) > 2 * longest


def test_a_killed_worker_does_not_stop_the_unit_and_a_stop_reaches_the_master_alone() -> None:
    assert directive("OOMPolicy") == "continue"
    assert directive("KillMode") == "mixed"


def test_the_lines_of_the_unit_start_reload_and_stop_a_service(tmp_path: Path, current: Path) -> None:
    assert directive("RuntimeDirectory") == "handoff"
    start = [word if word != "127.0.0.1:8000" else "127.0.0.1:0" for word in words("ExecStart", current)]
    reload = words("ExecReload", current)
    run_dir = tmp_path / "run" / "handoff"
    run_dir.mkdir(parents=True)  # as RuntimeDirectory= does
    service = Service(tmp_path, command=start[:1], environment={"RUNTIME_DIRECTORY": str(run_dir)})
    service.arguments, service.run_dir, service.directory = start[1:], run_dir, Path("/")
    with service:
        assert service.get()[2] == b"1"

        release = tmp_path / "releases" / "2"
        shutil.copytree(current, release, symlinks=True)
        (release / "main.py").write_text(hello("2"))
        current.unlink()
        current.symlink_to("releases/2")
        done = subprocess.run(
            reload, cwd="/", env=service.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "generation 2 is live" in done.stdout
        assert service.get()[2] == b"2"

        workers = service.family()
        assert workers
        service.signal(signal.SIGTERM)  # KillMode=mixed: to the master and to nobody else
        assert service.wait() == 0
        _, left = psutil.wait_procs(workers, 10)
        assert not left
        assert list(run_dir.iterdir()) == []
