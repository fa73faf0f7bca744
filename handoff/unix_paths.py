"""Paths of unix sockets: whose they are, and how one comes to lie there that listens already."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator

from handoff.addresses import MAX_UNIX_PATH_BYTES
from handoff.errors import HandoffError

Inode = tuple[int, int]
"""st_dev, st_ino: whether what lies at a path is still what we put there."""


def bind_path(path: str, mode: int, backlog: int, subject: str) -> tuple[socket.socket, Inode | None]:
    """Bind under a temporary name beside the path, then rename: the path always leads to a socket that listens.

    The caller owns the socket, which is non-blocking. `subject` begins the line of a HandoffError.
    """
    with contextlib.ExitStack() as undo:
        try:
            directory_fd = undo.enter_context(_locked_directory(os.path.dirname(path), subject))
            _refuse_what_lives(path, subject)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            undo_socket = undo.enter_context(contextlib.ExitStack())
            undo_socket.enter_context(sock)
            sock.setblocking(False)
            temporary = f".{os.path.basename(path)[:32]}.{os.urandom(4).hex()}"
            sock.bind(_bindable(os.path.dirname(path), directory_fd, temporary))
            undo_socket.callback(_unlink_quietly, temporary, directory_fd)
            os.chmod(temporary, mode, dir_fd=directory_fd)  # bind(2) took the umask off
            sock.listen(backlog)
            os.rename(temporary, os.path.basename(path), src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
        except OSError as error:
            raise HandoffError(_unix_problem(path, subject, error)) from error
        undo_socket.pop_all()
        return sock, inode_of(path)


@contextlib.contextmanager
def _locked_directory(directory: str, subject: str) -> Iterator[int]:
    """An fd of the directory, locked: no other master probes and replaces a socket in it meanwhile."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HandoffError(
                f"{subject}: {directory} is locked by another process that binds there; try again"
            ) from None
        yield fd
    finally:
        os.close(fd)


def _refuse_what_lives(path: str, subject: str) -> None:
    """Return if nothing is there, or a socket that nobody listens on any more; HandoffError for anything else."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise HandoffError(f"{subject}: is a directory; choose another path")
    if not stat.S_ISSOCK(mode):
        raise HandoffError(f"{subject}: is not a socket; remove it or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        # unix(7): refused if nobody listens, EAGAIN if the queue is full, EPROTOTYPE if it is another type of socket.
        if probe.connect_ex(path) not in (errno.ECONNREFUSED, errno.ENOENT):
            raise HandoffError(f"{subject}: belongs to a living server; stop it or choose another path")


def _bindable(directory: str, directory_fd: int, name: str) -> str:
    """A path to the new name that fits into an address, also where the directory's own path leaves no room."""
    path = os.path.join(directory, name)
    return path if len(os.fsencode(path)) <= MAX_UNIX_PATH_BYTES else f"/proc/self/fd/{directory_fd}/{name}"


def _unlink_quietly(name: str, directory_fd: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory_fd)


def _unix_problem(path: str, subject: str, error: OSError) -> str:
    directory = os.path.dirname(path)
    match error.errno:
        case errno.ENOENT:
            return f"{subject}: directory {directory} does not exist; create it or choose another path"
        case errno.ENOTDIR:
            return f"{subject}: {directory} is not a directory; choose another path"
        case errno.EACCES | errno.EPERM:
            return f"{subject}: no permission to create it in {directory}; grant it or choose another path"
        case _:
            return f"{subject}: cannot be bound ({os.strerror(error.errno or 0)}); choose another path"


def inode_of(path: str) -> Inode | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
