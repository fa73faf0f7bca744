"""Where a running service keeps its control socket, and the lock that says it runs."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from handoff.addresses import MAX_UNIX_PATH_BYTES
from handoff.errors import ExitCode, HandoffError, UsageError
from handoff.option_table import is_service_name

CONTROL_SOCKET = "control.sock"
LOCK_FILE = "lock"
# Each attempt is lost only to another process that acts at this very moment.
MAX_LOCK_ATTEMPTS = 1000
_MAX_PID_BYTES = 32


def run_directory_root(run_dir: str | None, environ: Mapping[str, str], uid: int) -> Path:
    """The directory that holds one directory for each service. HandoffError if nothing says where it is to be."""
    if run_dir:
        return Path(run_dir)
    # systemd.exec(5): with more than one RuntimeDirectory=, they are separated by colons.
    runtime_directory = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    if runtime_directory:
        return Path(runtime_directory)
    if uid == 0:
        return Path("/run/handoff")
    user_directory = environ.get("XDG_RUNTIME_DIR", "")
    if user_directory:
        return Path(user_directory) / "handoff"
    raise HandoffError("run directory: $XDG_RUNTIME_DIR is not set; pass --run-dir")


class RunDirectory:
    """The directory of one service, `root/NAME`. Nothing is touched before `lock()`.

    After it, owns the directory and the lock until `close()`. Raises UsageError for a name, a path or a group that
    cannot be.
    """

    def __init__(self, root: Path, name: str, control_group: str | None = None) -> None:
        if not is_service_name(name):
            raise UsageError(f"service name {name!r}: is none; use up to 64 letters, digits and . _ -")
        self.name = name
        self.root = root
        self.path = root / name
        self.lock_path = self.path / LOCK_FILE
        self._group_id = None if control_group is None else _group_id(control_group)
        self._control_group = control_group
        self._lock_fd: int | None = None
        size_bytes = len(os.fsencode(self.control_socket_path))
        if size_bytes > MAX_UNIX_PATH_BYTES:
            raise UsageError(
                f"service {name}: control socket {self.control_socket_path} has {size_bytes} bytes, at most"
                f" {MAX_UNIX_PATH_BYTES} fit; choose a shorter --run-dir or --name"
            )

    def __repr__(self) -> str:
        return f"<RunDirectory {self.path}{'' if self._lock_fd is None else ' locked'}>"

    @property
    def control_socket_path(self) -> str:
        """Where the control socket of the service is, or is to be; whoever binds it unlinks it."""
        return str(self.path / CONTROL_SOCKET)

    @property
    def group_id(self) -> int | None:
        """The group that may use the control socket, next to the owner."""
        return self._group_id

    def lock(self) -> None:
        """Make the directory, take its lock and write our pid into it.

        HandoffError with exit code LOCKED if the service runs already; others if the directory is not ours alone.
        """
        assert self._lock_fd is None, f"{self!r}: is locked already"
        try:
            self._lock_fd = self._lock()
            self._admit_group(self._lock_fd)
            os.pwrite(self._lock_fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            self.close()
            raise HandoffError(_problem(self.path, error)) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the lock file and, if nothing else is in it, the directory. May be called again."""
        if self._lock_fd is None:
            return
        lock_fd, self._lock_fd = self._lock_fd, None
        with contextlib.suppress(OSError):  # somebody removed it, or the directory went read-only
            if _is_same_file(lock_fd, self.lock_path):
                os.unlink(self.lock_path)
        os.close(lock_fd)
        with contextlib.suppress(OSError):  # not empty, or a successor is there already
            os.rmdir(self.path)

    def is_locked(self) -> bool:
        """Whether the service runs, in whatever process. False too if there is no such service.

        PermissionError if we may not know.
        """
        try:
            fd = os.open(self.lock_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            return False
        try:
            # Shared, so that two who look do not take each other for the service.
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def _lock(self) -> int:
        """The fd of the locked lock file."""
        pid = None
        for _ in range(MAX_LOCK_ATTEMPTS):
            self._make_directory()
            try:
                # O_RDWR needs no more than the owner's right, which the check of the directory made sure of.
                fd = os.open(self.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except FileNotFoundError:
                continue  # the one before us has just removed the directory
            with contextlib.ExitStack() as undo:
                undo.callback(os.close, fd)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    pid = _living_pid(fd)
                    if pid is not None:
                        break
                    os.sched_yield()  # somebody who only looks whether the service runs, or who has not written yet
                    continue
                if _is_same_file(fd, self.lock_path):
                    os.ftruncate(fd, 0)
                    undo.pop_all()
                    return fd
                # The one before us unlinked it between our open and our flock: this lock guards nothing.
        holder = "its lock is held" if pid is None else f"pid {pid}"
        raise HandoffError(
            f"service {self.name}: already runs ({holder}); use handoff reload, or another --name", ExitCode.LOCKED
        )

    def _make_directory(self) -> None:
        if not self.root.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            self.root.chmod(0o755)  # mkdir(2) took the umask off
        with contextlib.suppress(FileExistsError):
            self.path.mkdir(mode=0o700)
        try:
            status = os.lstat(self.path)
        except FileNotFoundError:
            return  # the one before us has just removed it; opening the lock file finds that, too
        if not stat.S_ISDIR(status.st_mode):
            raise HandoffError(f"run directory {self.path}: is not a directory; remove it or choose another --run-dir")
        if status.st_uid != os.geteuid():
            raise HandoffError(
                f"run directory {self.path}: belongs to uid {status.st_uid}, we are uid {os.geteuid()};"
                " remove it or choose another --run-dir"
            )
        if status.st_mode & stat.S_IWOTH:
            raise HandoffError(f"run directory {self.path}: anybody can write to it; chmod it to 0700")

    def _admit_group(self, lock_fd: int) -> None:
        """Give directory and lock file the modes they are to have, which a predecessor may have set otherwise."""
        if self._group_id is None:
            os.chmod(self.path, 0o700)
            os.fchmod(lock_fd, 0o600)
            return
        try:
            os.chown(self.path, -1, self._group_id)
            os.fchown(lock_fd, -1, self._group_id)
        except PermissionError as error:
            raise HandoffError(
                f"control group {self._control_group}: uid {os.geteuid()} is not a member of it;"
                " become one or choose another --control-group"
            ) from error
        os.chmod(self.path, 0o750)
        os.fchmod(lock_fd, 0o640)  # a member must be able to ask whether it is locked


def find_services(root: Path) -> list[str]:
    """The names of the services that run, sorted; those we may not look at are left out."""
    try:
        names = sorted(os.listdir(root))
    except OSError:
        return []
    running = []
    for name in names:
        with contextlib.suppress(OSError, UsageError):  # not ours to look at, or not the directory of a service
            if RunDirectory(root, name).is_locked():
                running.append(name)
    return running


def locate(name: str, root: Path) -> RunDirectory:
    """The directory of a service that runs; HandoffError with exit code NO_SUCH_SERVICE, naming those that do."""
    directory = RunDirectory(root, name)
    try:
        is_running = directory.is_locked()
    except OSError as error:
        raise HandoffError(_problem(directory.path, error)) from error
    if not is_running:
        running = find_services(root)
        others = f"running: {', '.join(running)}" if running else "none runs there, start one with handoff run"
        raise HandoffError(f"no service named {name} in {root}; {others}", ExitCode.NO_SUCH_SERVICE)
    return directory


def _group_id(group: str) -> int:
    try:
        return int(group) if group.isascii() and group.isdecimal() else grp.getgrnam(group).gr_gid
    except KeyError:
        raise UsageError(f"control group {group}: does not exist; create it or choose another") from None


def _is_same_file(fd: int, path: Path) -> bool:
    """Whether the path still leads to the file that the fd has open."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _living_pid(fd: int) -> int | None:
    """The pid in the lock file, if there is such a process."""
    text = os.pread(fd, _MAX_PID_BYTES, 0).strip()
    if not text.isdigit() or int(text) == 0:
        return None
    try:
        os.kill(int(text), 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass  # it lives, as somebody else
    return int(text)


def _problem(path: Path, error: OSError) -> str:
    match error.errno:
        case errno.EACCES | errno.EPERM:
            return f"run directory {path}: no permission; grant it or choose another --run-dir"
        case errno.ENOTDIR | errno.EEXIST:
            return f"run directory {path}: leads through a file that is not a directory; choose another --run-dir"
        case errno.EROFS:
            return f"run directory {path}: the file system is read-only; choose another --run-dir"
        case errno.ELOOP:
            return f"run directory {path}: the lock file is a symbolic link; remove it or choose another --run-dir"
        case _:
            problem = os.strerror(error.errno or 0)
            return f"run directory {path}: cannot be used ({problem}); choose another --run-dir"
