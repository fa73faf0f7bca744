"""Which workers live, for tools that read Server::Starter's --status-file: one line `GENERATION:PID` for each."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterable

from handoff.errors import HandoffError

_OURS = re.compile(rb"(?:[0-9]+:[0-9]+\n)*")
_MAXIMUM_BYTES = 64 * 1024


class StatusFile:
    """One status file. After `create()`, owns the file until `close()`; readers see a whole one at any moment."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lines: tuple[str, ...] | None = None

    def create(self) -> None:
        """Write it, empty. Raises HandoffError when it cannot be, or what is there is no status file."""
        try:
            self._check_present()
            self._write(())
        except OSError as error:
            raise HandoffError(self._problem(error)) from error

    def update(self, workers: Iterable[tuple[int, int]]) -> None:
        """`workers`: generation and pid of each. Written where that changed. Raises OSError, once for each change."""
        lines = tuple(f"{generation}:{pid}\n" for generation, pid in sorted(workers))
        if lines != self._lines:
            self._lines = lines  # before: a full disk is to be told of once, not in each turn
            self._write(lines)

    def close(self) -> None:
        """May be called again."""
        if self._lines is not None:
            self._lines = None
            with contextlib.suppress(OSError):  # somebody removed it, or the directory went read-only
                os.unlink(self.path)

    def _check_present(self) -> None:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise HandoffError(f"status file {self.path}: is not a regular file; choose another path")
            if not _OURS.fullmatch(os.read(fd, _MAXIMUM_BYTES)):
                raise HandoffError(f"status file {self.path}: holds something else; choose another path")
        finally:
            os.close(fd)

    def _write(self, lines: tuple[str, ...]) -> None:
        temporary = f"{self.path}.{os.urandom(4).hex()}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            with open(fd, "w") as file:
                os.fchmod(fd, 0o644)  # open(2) took the umask off
                file.writelines(lines)
            os.rename(temporary, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        self._lines = lines

    def _problem(self, error: OSError) -> str:
        subject = f"status file {self.path}"
        directory = os.path.dirname(self.path) or "."
        match error.errno:
            case errno.ENOENT:
                return f"{subject}: directory {directory} does not exist; create it or choose another path"
            case errno.ENOTDIR:
                return f"{subject}: {directory} is not a directory; choose another path"
            case errno.EACCES | errno.EPERM:
                return f"{subject}: no permission to write it in {directory}; grant it or choose another path"
            case errno.ELOOP:
                return f"{subject}: is a symbolic link; remove it or choose another path"
            case _:
                return f"{subject}: cannot be written ({os.strerror(error.errno or 0)}); choose another path"
