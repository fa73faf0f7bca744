"""Pid files: locked while their process lives, whole or absent, never anybody else's."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

import pytest

from handoff.errors import ExitCode, HandoffError
from handoff.pid_file import PidFile
from tests.unit.fds import open_fds


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "web.pid"


def _failure(path: Path) -> HandoffError:
    before = sorted(os.listdir(path.parent)) if path.parent.is_dir() else []
    fds = open_fds()
    with pytest.raises(HandoffError) as caught:
        PidFile(str(path)).create()
    assert caught.value.message.isprintable()
    assert (sorted(os.listdir(path.parent)) if path.parent.is_dir() else []) == before
    assert not open_fds() - fds
    return caught.value


def _is_locked(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_the_file_holds_our_pid_can_be_read_by_all_and_is_locked(path: Path, umask: int) -> None:
    pid_file = PidFile(str(path))
    before = os.umask(umask)
    try:
        pid_file.create()
    finally:
        os.umask(before)
    assert path.read_text() == f"{os.getpid()}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert _is_locked(path)
    assert os.listdir(path.parent) == ["web.pid"]
    pid_file.close()


def test_closing_removes_the_file_and_the_lock(path: Path) -> None:
    fds = open_fds()
    pid_file = PidFile(str(path))
    pid_file.create()
    pid_file.close()
    pid_file.close()
    assert os.listdir(path.parent) == []
    assert not open_fds() - fds


def test_the_file_goes_before_the_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid_file = PidFile(str(path))
    pid_file.create()
    real_unlink = os.unlink
    was_locked = []

    def unlink(name: str) -> None:
        was_locked.append(_is_locked(path))
        real_unlink(name)

    monkeypatch.setattr(os, "unlink", unlink)
    pid_file.close()
    assert was_locked == [True]


def test_a_file_whose_process_lives_is_refused_with_its_pid(path: Path) -> None:
    first = PidFile(str(path))
    first.create()
    error = _failure(path)
    assert error.message == f"pid file {path}: locked by pid {os.getpid()}; stop it or choose another path"
    assert error.exit_code is ExitCode.LOCKED
    assert path.read_text() == f"{os.getpid()}\n"
    first.close()


def test_a_locked_file_without_a_pid_is_refused(path: Path) -> None:
    path.write_text("")
    fd = os.open(path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert _failure(path).message == f"pid file {path}: locked by another process; stop it or choose another path"
    os.close(fd)


@pytest.mark.parametrize("content", ["1\n", "", " 123 "])
def test_a_stale_file_is_replaced(path: Path, content: str) -> None:
    path.write_text(content)
    pid_file = PidFile(str(path))
    pid_file.create()
    assert path.read_text() == f"{os.getpid()}\n"
    assert _is_locked(path)
    assert os.listdir(path.parent) == ["web.pid"]
    pid_file.close()


def test_a_file_that_goes_while_we_look_at_it_is_no_obstacle(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = PidFile(str(path))
    first.create()
    real_link = os.link
    calls = []

    def link(source: str, target: str) -> None:
        calls.append(target)
        try:
            real_link(source, target)
        except FileExistsError:
            first.close()
            raise

    monkeypatch.setattr(os, "link", link)
    second = PidFile(str(path))
    second.create()
    assert len(calls) == 2
    second.close()


def test_a_stale_file_that_another_replaces_first_is_the_others(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text("1\n")
    first = PidFile(str(path))
    real_flock = fcntl.flock
    is_first_turn = [True]

    def flock(fd: int, operation: int) -> None:
        if os.fstat(fd).st_size == 2 and is_first_turn.pop():
            is_first_turn.append(False)
            first.create()  # between the second's open and its flock
        real_flock(fd, operation)

    second = PidFile(str(path))
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(HandoffError, match=f"locked by pid {os.getpid()}"):
        second.create()
    monkeypatch.undo()
    assert _is_locked(path)
    first.close()
    assert os.listdir(path.parent) == []


def test_closing_leaves_a_file_that_is_not_ours_any_more(path: Path) -> None:
    first = PidFile(str(path))
    first.create()
    path.unlink()
    second = PidFile(str(path))
    second.create()
    first.close()
    assert path.exists()
    second.close()


def test_what_is_no_pid_file_is_left_alone(path: Path) -> None:
    path.write_text("precious\n")
    assert _failure(path).message == f"pid file {path}: holds something else than a pid; choose another path"
    assert path.read_text() == "precious\n"
    path.unlink()
    path.mkdir()
    assert _failure(path).message == f"pid file {path}: is not a regular file; choose another path"
    path.rmdir()
    path.symlink_to("elsewhere")
    assert _failure(path).message == f"pid file {path}: is a symbolic link; remove it or choose another path"


def test_a_directory_that_is_none_is_one_line(path: Path) -> None:
    missing = path.parent / "missing" / "web.pid"
    assert _failure(missing).message == (
        f"pid file {missing}: directory {missing.parent} does not exist; create it or choose another path"
    )
    missing.parent.write_text("")
    assert _failure(missing).message == (
        f"pid file {missing}: {missing.parent} is not a directory; choose another path"
    )


def test_a_directory_without_permission_is_one_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "link", refuse)
    assert _failure(path).message == (
        f"pid file {path}: no permission to create it in {path.parent}; grant it or choose another path"
    )
