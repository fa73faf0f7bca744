"""From the command line as typed to what a generation is pinned to, on real directories and links."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec
import pytest

from handoff.config import ServiceOptions
from handoff.errors import ExitCode, HandoffError, UsageError
from handoff.resolve import make_launch, resolve, service_changes
from handoff.settings import Launch, Settings


def _executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def _release(root: Path, name: str) -> Path:
    """A release with a virtual environment of its own, in which `python` is a link, as venv makes it."""
    release = root / "releases" / name
    system = _executable(root / "usr" / "python3")
    _executable(release / ".venv" / "bin" / "handoff")
    (release / ".venv" / "bin" / "python").symlink_to(system)
    return release


def _switch(root: Path, release: Path) -> None:
    (root / "next").symlink_to(release)
    (root / "next").rename(root / "current")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two releases; `current` leads to the first."""
    root = Path(os.path.realpath(tmp_path))
    _release(root, "2")
    _switch(root, _release(root, "1"))
    return root


def _typed(root: Path, **environ: str) -> Launch:
    """`handoff run` in the directory `current`, with the command of its virtual environment."""
    return make_launch(
        {"app": "m:app"},
        argv0=".venv/bin/handoff",
        cwd=str(root / "releases" / "1"),
        environ={"PWD": str(root / "current"), **environ},
    )


def _failure(launch: Launch) -> HandoffError:
    with pytest.raises(HandoffError) as caught:
        resolve(launch)
    assert caught.value.message.isprintable()
    return caught.value


def test_the_directory_and_the_interpreter_stay_as_typed(root: Path) -> None:
    launch = _typed(root)
    assert launch.directory == f"{root}/current"
    assert launch.python == f"{root}/current/.venv/bin/python"


def test_a_pwd_that_is_another_directory_or_none_is_not_believed(root: Path) -> None:
    cwd = str(root / "releases" / "1")
    for pwd in (str(root / "releases" / "2"), str(root / "gone"), "current", ""):
        assert make_launch({}, argv0="handoff", cwd=cwd, environ={"PWD": pwd}).directory == cwd
    assert make_launch({}, argv0="handoff", cwd=cwd, environ={}).directory == cwd


def test_paths_are_joined_to_the_directory_as_typed_and_not_resolved(root: Path) -> None:
    launch = make_launch(
        {"log_config": "log.json", "run_dir": "run", "pidfile": "/run/pid", "workers": 2},
        argv0="handoff",
        cwd=str(root),
        environ={"PATH": ""},
        chdir="current",
        python="current/.venv/bin/python",
        config="web.toml",
        env_file="../web.env",
    )
    assert launch.directory == f"{root}/current"
    assert launch.python == f"{root}/current/.venv/bin/python"
    assert launch.config == f"{root}/web.toml"
    assert launch.env_file == f"{root}/../web.env"
    assert launch.overrides == {
        "log_config": f"{root}/log.json",
        "run_dir": f"{root}/run",
        "pidfile": "/run/pid",
        "workers": 2,
    }


def test_a_command_without_a_slash_is_looked_up_in_path_with_its_links_left_in(root: Path) -> None:
    environ = {"PATH": f"/nowhere:{root}/current/.venv/bin:/usr/bin"}
    launch = make_launch({}, argv0="handoff", cwd="/", environ=environ)
    assert launch.python == f"{root}/current/.venv/bin/python"
    relative = make_launch({}, argv0="handoff", cwd=str(root), environ={"PATH": "current/.venv/bin"})
    assert relative.python == f"{root}/current/.venv/bin/python"


def test_without_an_interpreter_beside_the_command_it_is_the_one_that_runs_us(root: Path) -> None:
    for argv0 in (str(_executable(root / "bin" / "handoff")), "handoff", "gone/handoff", ""):
        assert make_launch({}, argv0=argv0, cwd="/", environ={"PATH": "/nowhere"}).python == sys.executable


def test_an_interpreter_without_a_slash_is_looked_up_in_path(root: Path) -> None:
    launch = make_launch({}, argv0="handoff", cwd="/", environ={"PATH": f"{root}/usr"}, python="python3")
    assert launch.python == f"{root}/usr/python3"
    launch = make_launch({}, argv0="handoff", cwd="/srv", environ={"PATH": "/nowhere"}, python="python3")
    assert launch.python == "/srv/python3"


def test_what_was_meant_for_us_alone_is_not_passed_on(root: Path) -> None:
    environ = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "NOTIFY_SOCKET": "@x", "HANDOFF_SLOT": "1", "NOTIFY": "kept"}
    assert make_launch({}, argv0="handoff", cwd="/", environ=environ).environment == {"NOTIFY": "kept"}


def test_a_generation_is_pinned_to_the_release_that_the_link_leads_to_now(root: Path) -> None:
    launch = _typed(root)
    first = resolve(launch)
    _switch(root, root / "releases" / "2")
    second = resolve(launch)
    assert (first.directory, second.directory) == (f"{root}/releases/1", f"{root}/releases/2")
    assert second.settings.name == "current"


def test_the_interpreters_own_link_is_kept_for_it_makes_the_virtual_environment(root: Path) -> None:
    assert resolve(_typed(root)).python == f"{root}/releases/1/.venv/bin/python"


def test_the_settings_are_those_of_the_release(root: Path) -> None:
    (root / "releases" / "1" / "handoff.toml").write_text("workers = 3")
    (root / "releases" / "2" / "handoff.toml").write_text("workers = 4")
    launch = _typed(root)
    assert resolve(launch).settings == Settings(app="m:app", name="current", workers=3)
    _switch(root, root / "releases" / "2")
    assert resolve(launch).settings.workers == 4


def test_the_environment_file_wins_and_is_read_afresh(root: Path) -> None:
    release = root / "releases" / "1"
    (release / "handoff.toml").write_text('env_file = "web.env"')
    (release / "web.env").write_text("A=file\nWEB_CONCURRENCY=5\nHANDOFF_SLOT=9\n")
    launch = _typed(root, A="typed", B="typed")
    pins = resolve(launch)
    assert pins.environment == {"PWD": f"{root}/current", "A": "file", "B": "typed", "WEB_CONCURRENCY": "5"}
    assert pins.settings.workers == 5
    (release / "web.env").write_text("A=changed\n")
    assert resolve(launch).environment["A"] == "changed"
    typed = root / "typed.env"
    typed.write_text("A=from the command line\n")
    launch = msgspec.structs.replace(launch, env_file=str(typed))
    assert resolve(launch).environment["A"] == "from the command line"


def test_a_directory_that_cannot_be_is_one_line(root: Path) -> None:
    launch = msgspec.structs.replace(_typed(root), directory=f"{root}/gone")
    error = _failure(launch)
    assert error.message == f"directory {root}/gone: does not exist; create it or give another with --chdir"
    assert error.exit_code is ExitCode.FAILED
    (root / "dangling").symlink_to(root / "gone")
    launch = msgspec.structs.replace(launch, directory=f"{root}/dangling")
    assert _failure(launch).message == (
        f"directory {root}/dangling: does not exist; create it or give another with --chdir"
    )
    (root / "file").write_text("")
    launch = msgspec.structs.replace(launch, directory=f"{root}/file")
    assert _failure(launch).message == f"directory {root}/file: is not a directory; give one with --chdir"
    launch = msgspec.structs.replace(launch, directory=f"{root}/file/x")
    assert "--chdir" in _failure(launch).message


def test_an_interpreter_that_cannot_be_is_one_line(root: Path) -> None:
    launch = _typed(root)
    (root / "releases" / "1" / ".venv" / "bin" / "python").unlink()
    assert _failure(launch).message == (
        f"python {root}/current/.venv/bin/python: does not exist; create it or give another with --python"
    )
    (root / "releases" / "1" / ".venv" / "bin" / "python").write_text("")
    assert _failure(launch).message == (
        f"python {root}/current/.venv/bin/python: is not an executable file; give an interpreter with --python"
    )
    launch = msgspec.structs.replace(launch, python=f"{root}/current/.venv")
    assert _failure(launch).message == (
        f"python {root}/current/.venv: is not an executable file; give an interpreter with --python"
    )


def test_a_missing_environment_file_and_a_broken_config_are_usage_errors(root: Path) -> None:
    launch = msgspec.structs.replace(_typed(root), env_file=f"{root}/gone")
    error = _failure(launch)
    assert isinstance(error, UsageError)
    assert error.message == f"env file {root}/gone: does not exist; create it or give another one"
    (root / "releases" / "1" / "handoff.toml").write_text("worker = 2")
    error = _failure(_typed(root))
    assert isinstance(error, UsageError)
    assert error.message == 'handoff.toml: unknown key "worker"; did you mean "workers"?'


def test_what_cannot_change_in_a_reload_is_named() -> None:
    web, api = Settings(app="m:app", name="web"), Settings(app="m:other", name="api", workers=9)
    before = ServiceOptions(pidfile="/run/a")
    after = ServiceOptions(run_dir="/run/x", control_group="www")
    assert service_changes(web, before, web, before) == []
    assert service_changes(web, before, api, after) == [
        "handoff.toml: name: cannot change in a reload (web, now api); restart the service",
        "handoff.toml: run_dir: cannot change in a reload (not set, now /run/x); restart the service",
        "handoff.toml: pidfile: cannot change in a reload (/run/a, now not set); restart the service",
        "handoff.toml: control_group: cannot change in a reload (not set, now www); restart the service",
    ]
    assert service_changes(web, before, api, before, "/etc/web.toml") == [
        "/etc/web.toml: name: cannot change in a reload (web, now api); restart the service"
    ]
