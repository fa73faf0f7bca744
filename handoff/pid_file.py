"""A pid file that cannot lie: it is locked for as long as the process that it names lives."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat

from handoff.errors import ExitCode, HandoffError

_MAX_PID_BYTES = 32
# Each attempt is lost only to another process that acts at this very moment.
_MAX_ATTEMPTS = 100


class PidFile:
    """One pid file. After `create()`, owns the file and the lock on it until `close()`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd: int | None = None

    def __repr__(self) -> str:
        return f"<PidFile {self.path}{'' if self._fd is None else ' locked'}>"

    def create(self) -> None:
        """Write our pid: readers see the whole file or none, and by then it is locked.

        A file that a dead process left is replaced. HandoffError with exit code LOCKED if its process lives, and
        others if the file is no pid file or cannot be written.
        """
        assert self._fd is None, f"{self!r}: is created already"
        temporary = f"{self.path}.{os.urandom(4).hex()}"
        try:
            with contextlib.ExitStack() as undo:
                fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
                undo.callback(os.close, fd)
                with contextlib.ExitStack() as always:
                    always.callback(_unlink_quietly, temporary)
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.fchmod(fd, 0o644)  # open(2) took the umask off
                    os.write(fd, f"{os.getpid()}\n".encode())
                    self._put_in_place(temporary)
                undo.pop_all()
        except OSError as error:
            raise HandoffError(self._problem(error)) from error
        self._fd = fd

    def close(self) -> None:
        """Remove the file, if it is still ours, and only then let the lock go. May be called again."""
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        with contextlib.suppress(OSError):  # somebody removed it, or the directory went read-only
            if os.path.samestat(os.fstat(fd), os.lstat(self.path)):
                os.unlink(self.path)
        os.close(fd)

    def _put_in_place(self, temporary: str) -> None:
        for _ in range(_MAX_ATTEMPTS):
            try:
                os.link(temporary, self.path)  # unlike a rename it takes nothing away from one who came first
                return
            except FileExistsError:
                pass
            try:
                stale_fd = self._lock_stale()
            except FileNotFoundError:
                continue  # its owner has just removed it
            try:
                # With the lock on the old one held, nobody else replaces it now, unless it was replaced before.
                if os.path.samestat(os.fstat(stale_fd), os.lstat(self.path)):
                    os.rename(temporary, self.path)
                    return
            except FileNotFoundError:
                continue
            finally:
                os.close(stale_fd)
        raise HandoffError(f"pid file {self.path}: others keep replacing it; choose another path")

    def _lock_stale(self) -> int:
        """The fd of the file that is there, locked; HandoffError if a living process locks it, or it is no pid file."""
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, fd)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise HandoffError(f"pid file {self.path}: is not a regular file; choose another path")
            text = os.pread(fd, _MAX_PID_BYTES, 0).strip()
            if text and not text.isdigit():
                raise HandoffError(f"pid file {self.path}: holds something else than a pid; choose another path")
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = f"pid {text.decode()}" if text else "another process"
                raise HandoffError(
                    f"pid file {self.path}: locked by {holder}; stop it or choose another path", ExitCode.LOCKED
                ) from None
            undo.pop_all()
        return fd

    def _problem(self, error: OSError) -> str:
        subject = f"pid file {self.path}"
        directory = os.path.dirname(self.path) or "."
        match error.errno:
            case errno.ENOENT:
                return f"{subject}: directory {directory} does not exist; create it or choose another path"
            case errno.ENOTDIR:
                return f"{subject}: {directory} is not a directory; choose another path"
            case errno.EACCES | errno.EPERM:
                return f"{subject}: no permission to create it in {directory}; grant it or choose another path"
            case errno.ELOOP:
                return f"{subject}: is a symbolic link; remove it or choose another path"
            case _:
                return f"{subject}: cannot be written ({os.strerror(error.errno or 0)}); choose another path"


def _unlink_quietly(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
