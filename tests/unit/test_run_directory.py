"""Run directories: where they are, whose they are, and one master to each."""

from __future__ import annotations

import fcntl
import grp
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from handoff.errors import ExitCode, HandoffError, UsageError
from handoff.run_directory import RunDirectory, find_services, locate, run_directory_root
from tests.unit.fds import open_fds


@pytest.fixture
def root() -> Iterator[Path]:
    """A root short enough for a socket, which one below pytest's tmp_path need not be."""
    with tempfile.TemporaryDirectory(prefix="handoff-") as directory:
        yield Path(directory)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _failure(action: Callable[[], object]) -> HandoffError:
    with pytest.raises(HandoffError) as caught:
        action()
    assert caught.value.message.isprintable()
    return caught.value


def _leads_to(link: str, path: Path) -> bool:
    try:
        return os.readlink(link) == str(path)
    except FileNotFoundError:
        return False  # the fd that listed the others


def _unused_pid() -> int:
    """The pid of a process that has ended and been waited for."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    return pid


def test_the_root_is_the_first_that_is_known() -> None:
    environ = {"RUNTIME_DIRECTORY": "/run/a:/run/b", "XDG_RUNTIME_DIR": "/run/user/7"}
    assert run_directory_root("/typed", environ, 0) == Path("/typed")
    assert run_directory_root(None, environ, 0) == Path("/run/a")
    del environ["RUNTIME_DIRECTORY"]
    assert run_directory_root(None, environ, 0) == Path("/run/handoff")
    assert run_directory_root(None, environ, 7) == Path("/run/user/7/handoff")
    error = _failure(lambda: run_directory_root(None, {}, 7))
    assert error.message == "run directory: $XDG_RUNTIME_DIR is not set; pass --run-dir"


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_the_directory_is_private_and_the_root_is_not(root: Path, umask: int) -> None:
    directory = RunDirectory(root / "new", "web")
    assert not (root / "new").exists()
    before = os.umask(umask)
    try:
        directory.lock()
    finally:
        os.umask(before)
    assert _mode(root / "new") == 0o755
    assert _mode(directory.path) == 0o700
    assert _mode(directory.lock_path) == 0o600
    assert directory.control_socket_path == f"{root}/new/web/control.sock"
    assert directory.lock_path.read_text() == f"{os.getpid()}\n"
    directory.close()


def test_a_control_group_may_enter_and_ask(root: Path) -> None:
    gid = os.getegid()
    for group in (grp.getgrgid(gid).gr_name, str(gid)):
        directory = RunDirectory(root, "web", group)
        assert directory.group_id == gid
        directory.lock()
        assert _mode(directory.path) == 0o750
        assert _mode(directory.lock_path) == 0o640
        assert directory.path.stat().st_gid == directory.lock_path.stat().st_gid == gid
        directory.close()


def test_a_control_group_that_does_not_exist_is_refused(root: Path) -> None:
    error = _failure(lambda: RunDirectory(root, "web", "no-such-group"))
    assert error.message == "control group no-such-group: does not exist; create it or choose another"
    assert error.exit_code is ExitCode.USAGE


def test_a_control_group_that_we_are_not_in_is_refused_and_leaves_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    error = _failure(RunDirectory(root, "web", "4242").lock)
    assert error.message == (
        f"control group 4242: uid {os.geteuid()} is not a member of it; become one or choose another --control-group"
    )
    assert list(root.iterdir()) == []


def test_the_lock_is_not_passed_on(root: Path) -> None:
    directory = RunDirectory(root, "web")
    directory.lock()
    own = [int(fd) for fd in os.listdir("/proc/self/fd") if _leads_to(f"/proc/self/fd/{fd}", directory.lock_path)]
    assert [os.get_inheritable(fd) for fd in own] == [False]
    directory.close()


def test_closing_leaves_nothing(root: Path) -> None:
    before = open_fds()
    directory = RunDirectory(root, "web")
    directory.lock()
    assert repr(directory) == f"<RunDirectory {root}/web locked>"
    directory.close()
    directory.close()
    assert list(root.iterdir()) == []
    assert not open_fds() - before


def test_closing_leaves_what_others_put_there(root: Path) -> None:
    directory = RunDirectory(root, "web")
    directory.lock()
    (directory.path / "note").write_text("mine")
    directory.close()
    assert [entry.name for entry in directory.path.iterdir()] == ["note"]


def test_closing_leaves_a_lock_file_that_is_not_ours_any_more(root: Path) -> None:
    directory = RunDirectory(root, "web")
    directory.lock()
    directory.lock_path.unlink()
    successor = RunDirectory(root, "web")
    successor.lock()
    directory.close()
    assert successor.is_locked()
    successor.close()


def test_a_second_master_of_the_name_is_refused_with_the_pid_of_the_first(root: Path) -> None:
    first = RunDirectory(root, "web")
    first.lock()
    error = _failure(RunDirectory(root, "web").lock)
    assert error.message == (f"service web: already runs (pid {os.getpid()}); use handoff reload, or another --name")
    assert error.exit_code is ExitCode.LOCKED
    other = RunDirectory(root, "api")
    other.lock()
    other.close()
    first.close()
    second = RunDirectory(root, "web")
    second.lock()
    second.close()


def test_a_lock_file_that_a_dead_master_left_is_taken_over(root: Path) -> None:
    (root / "web").mkdir(mode=0o755)
    (root / "web" / "lock").write_text(f"{_unused_pid()}123456789\n")
    directory = RunDirectory(root, "web")
    directory.lock()
    assert directory.lock_path.read_text() == f"{os.getpid()}\n"
    assert _mode(directory.path) == 0o700
    directory.close()


def test_one_who_only_looks_does_not_stop_a_start(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "web").mkdir(mode=0o700)
    lock = root / "web" / "lock"
    lock.write_text("")
    looking = os.open(lock, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    yielded = []

    def look_away() -> None:
        yielded.append(True)
        fcntl.flock(looking, fcntl.LOCK_UN)

    monkeypatch.setattr(os, "sched_yield", look_away)
    directory = RunDirectory(root, "web")
    directory.lock()
    assert yielded == [True]
    directory.close()
    os.close(looking)


def test_a_lock_that_is_held_by_nobody_known_is_refused_after_a_bounded_number_of_attempts(root: Path) -> None:
    (root / "web").mkdir(mode=0o700)
    lock = root / "web" / "lock"
    lock.write_text("not a pid")
    holder = os.open(lock, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    error = _failure(RunDirectory(root, "web").lock)
    os.close(holder)
    assert error.message == "service web: already runs (its lock is held); use handoff reload, or another --name"
    assert error.exit_code is ExitCode.LOCKED


def test_a_lock_file_that_is_unlinked_while_we_lock_it_is_not_trusted(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = RunDirectory(root, "web")
    first.lock()
    real_flock = fcntl.flock
    calls: list[int] = []

    def flock(fd: int, operation: int) -> None:
        if not calls:
            first.close()  # between the other's open and its flock
        calls.append(fd)
        real_flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    second = RunDirectory(root, "web")
    second.lock()
    monkeypatch.undo()
    assert len(calls) == 2
    assert second.is_locked()
    assert _failure(RunDirectory(root, "web").lock).exit_code is ExitCode.LOCKED
    second.close()


def test_a_directory_that_is_removed_before_the_lock_file_is_opened_is_made_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_lstat = os.lstat
    calls: list[Path] = []

    def lstat(path: Path) -> os.stat_result:
        if not calls:
            os.rmdir(root / "web")
        calls.append(path)
        return real_lstat(path)

    monkeypatch.setattr(os, "lstat", lstat)
    directory = RunDirectory(root, "web")
    directory.lock()
    monkeypatch.undo()
    assert directory.is_locked()
    directory.close()


def test_a_directory_of_another_user_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "web").mkdir()
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    error = _failure(RunDirectory(root, "web").lock)
    assert error.message == (
        f"run directory {root}/web: belongs to uid {uid}, we are uid {uid + 1}; remove it or choose another --run-dir"
    )
    assert list((root / "web").iterdir()) == []


def test_a_directory_that_anybody_can_write_to_is_refused(root: Path) -> None:
    (root / "web").mkdir()
    (root / "web").chmod(0o777)
    error = _failure(RunDirectory(root, "web").lock)
    assert error.message == f"run directory {root}/web: anybody can write to it; chmod it to 0700"


def test_what_is_no_directory_is_refused(root: Path) -> None:
    (root / "web").write_text("")
    remedy = "is not a directory; remove it or choose another --run-dir"
    assert _failure(RunDirectory(root, "web").lock).message == f"run directory {root}/web: {remedy}"
    (root / "real").mkdir()
    (root / "link").symlink_to(root / "real")
    assert _failure(RunDirectory(root, "link").lock).message == f"run directory {root}/link: {remedy}"
    assert _failure(RunDirectory(root / "web", "x").lock).message == (
        f"run directory {root}/web/x: leads through a file that is not a directory; choose another --run-dir"
    )


def test_a_lock_file_that_is_a_link_is_refused(root: Path) -> None:
    (root / "web").mkdir(mode=0o700)
    (root / "precious").write_text("precious")
    (root / "web" / "lock").symlink_to(root / "precious")
    error = _failure(RunDirectory(root, "web").lock)
    assert error.message == (
        f"run directory {root}/web: the lock file is a symbolic link; remove it or choose another --run-dir"
    )
    assert (root / "precious").read_text() == "precious"


def test_a_root_without_permission_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", refuse)
    error = _failure(RunDirectory(root, "web").lock)
    assert error.message == (f"run directory {root}/web: no permission; grant it or choose another --run-dir")


def test_a_path_too_long_for_the_control_socket_is_refused(root: Path) -> None:
    room = 107 - len(f"{root}//web/control.sock")
    fits = RunDirectory(root / ("d" * room), "web")
    assert len(fits.control_socket_path) == 107
    error = _failure(lambda: RunDirectory(root / ("d" * (room + 1)), "web"))
    assert error.message == (
        f"service web: control socket {root}/{'d' * (room + 1)}/web/control.sock has 108 bytes, at most 107 fit;"
        " choose a shorter --run-dir or --name"
    )
    assert error.exit_code is ExitCode.USAGE


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", "x" * 65, "a\nb"])
def test_a_name_that_is_none_is_refused(root: Path, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        RunDirectory(root, name)
    assert caught.value.message == (f"service name {name!r}: is none; use up to 64 letters, digits and . _ -")


def test_services_are_found_by_their_lock_alone(root: Path) -> None:
    running = [RunDirectory(root, name) for name in ("web", "api")]
    for directory in running:
        directory.lock()
    (root / "stale").mkdir()
    (root / "stale" / "lock").write_text("1\n")
    (root / "empty").mkdir()
    (root / ".hidden").mkdir()
    (root / "file").write_text("")
    assert find_services(root) == ["api", "web"]
    assert find_services(root) == ["api", "web"]
    running[1].close()
    assert find_services(root) == ["web"]
    running[0].close()
    assert find_services(root / "gone") == []


def test_a_service_that_we_may_not_look_at_is_not_listed_but_named_when_asked_for(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "web").mkdir()

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    assert find_services(root) == []
    error = _failure(lambda: locate("web", root))
    assert error.message == (f"run directory {root}/web: no permission; grant it or choose another --run-dir")


def test_a_client_locates_a_service_that_runs(root: Path) -> None:
    directory = RunDirectory(root, "web")
    directory.lock()
    assert locate("web", root).control_socket_path == directory.control_socket_path
    assert directory.is_locked()
    directory.close()


def test_a_client_of_a_service_that_does_not_run_learns_which_do(root: Path) -> None:
    error = _failure(lambda: locate("web", root))
    assert error.message == (f"no service named web in {root}; none runs there, start one with handoff run")
    assert error.exit_code is ExitCode.NO_SUCH_SERVICE
    running = [RunDirectory(root, name) for name in ("edge", "api")]
    for directory in running:
        directory.lock()
    assert _failure(lambda: locate("web", root)).message == f"no service named web in {root}; running: api, edge"
    for directory in running:
        directory.close()
