"""One command that was asked for under an id, as its directory tells of it. At each moment it is one of these:

never started  `request`, perhaps; no `started`: nothing of the command has run
running        `lock` is held by its supervisor; or its supervisor was killed, and the command lives on
done           `result`
lost           `started`, no `result`, and neither lives any more: how far it came nobody knows
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import TypeVar

import msgspec

from handoff.errors import ExitCode, HandoffError
from lb.control.files import boot_id, sync_directory, write_atomically

_T = TypeVar("_T")


class Request(msgspec.Struct, frozen=True):
    """What was asked for first. The command itself is not kept: there may be secrets in it."""

    digest: str
    """SHA-256 of its words."""
    token: int
    requested: float
    """Seconds since the epoch, for people and for the order."""


class Process(msgspec.Struct, frozen=True):
    """A process that cannot be taken for another one of its number."""

    pid: int
    start: int
    """proc(5), starttime: in ticks since the boot."""
    boot: str


class Started(msgspec.Struct, frozen=True):
    command: Process
    supervisor: Process
    started: float


class Result(msgspec.Struct, frozen=True):
    exit_code: int
    """128 and the signal's number for a command that was killed."""
    output: bytes
    left_out_bytes: int
    """So much of the output came before what is kept."""
    seconds: float


class Operation:
    """Owns nothing: everything is on the disk."""

    def __init__(self, path: Path, operation_id: str) -> None:
        self.path = path
        self.id = operation_id

    # --- what is known --------------------------------------------------------------------------------------------

    def request(self) -> Request | None:
        return self._read("request", Request)

    def started(self) -> Started | None:
        return self._read("started", Started)

    def result(self) -> Result | None:
        return self._read("result", Result)

    def has_result(self) -> bool:
        return (self.path / "result").exists()

    def output(self) -> bytes:
        """What it has written so far; of a lost one what was seen of it."""
        try:
            return (self.path / "output").read_bytes()
        except FileNotFoundError:
            return b""

    def is_running(self) -> bool:
        return not self.wait(time.monotonic())

    def wait(self, deadline: float) -> bool:
        """Until it is not running; False at the (monotonic) deadline."""
        try:
            fd = os.open(self.path / "lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return True
        try:
            if not wait_for_lock(fd, fcntl.LOCK_SH, deadline):  # shared: lookers do not take each other for it
                return False
        finally:
            os.close(fd)
        if self.has_result():
            return True
        started = self.started()
        return started is None or _wait_for_exit(started.command, deadline)

    # --- what changes it, inside the service's lock ---------------------------------------------------------------

    def begin(self, request: Request, deadline: float) -> int:
        """Forget earlier attempts, none of which may run; keep the request. The caller owns the operation's lock."""
        make_directory(self.path)
        fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if not wait_for_lock(fd, fcntl.LOCK_EX, deadline):  # those who look hold it for moments
                text = f"{self.path / 'lock'} is held by somebody who looks; see who that is"
                raise HandoffError(f"operation {self.id}: {text}", ExitCode.LOCKED)
            for name in ("result", "started", "output"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path / name)
            write_atomically(self.path / "request", msgspec.json.encode(request), is_durable=True)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def stop(self) -> None:
        """Ask its supervisor to end it; where that is gone, the command's process group."""
        started = self.started()
        if started is None:
            return
        with contextlib.suppress(ProcessLookupError):
            if (fd := _opened(started.supervisor)) is not None:
                try:
                    signal.pidfd_send_signal(fd, signal.SIGTERM)
                finally:
                    os.close(fd)
            elif (fd := _opened(started.command)) is not None:
                os.close(fd)
                os.killpg(started.command.pid, signal.SIGTERM)

    def remove(self) -> None:
        """At once, as far as others see."""
        gone = self.path.with_name(f".{os.urandom(8).hex()}")
        os.rename(self.path, gone)
        shutil.rmtree(gone, ignore_errors=True)

    # --- inside its lock ------------------------------------------------------------------------------------------

    def keep_started(self, pid: int) -> None:
        """Before the command does anything: on the disk when this returns. The supervisor is the caller."""
        record = Started(process_of(pid), process_of(os.getpid()), time.time())
        try:
            write_atomically(self.path / "started", msgspec.json.encode(record), is_durable=True)
        except OSError:
            with contextlib.suppress(OSError):  # it was renamed, and the directory could not be synced
                os.unlink(self.path / "started")
            raise

    def keep_output(self, data: bytes) -> None:
        write_atomically(self.path / "output", data, is_durable=False)

    def keep_result(self, result: Result) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path / "output")  # it is in the result; and the disk may be full
        write_atomically(self.path / "result", msgspec.json.encode(result), is_durable=True)

    def _read(self, name: str, kind: type[_T]) -> _T | None:
        try:
            return msgspec.json.decode((self.path / name).read_bytes(), type=kind)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise HandoffError(
                f"{self.path / name}: cannot be used ({error}); look at what was done, remove it"
            ) from None


def process_of(pid: int) -> Process:
    """Raises ProcessLookupError."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except FileNotFoundError:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None
    return Process(pid, int(fields[19]), boot_id())


def _opened(process: Process) -> int | None:
    """A pidfd, which the caller owns; None: it has ended."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None
    try:
        if process_of(process.pid) == process:
            return fd
    except ProcessLookupError:
        pass
    os.close(fd)
    return None


def _wait_for_exit(process: Process, deadline: float) -> bool:
    fd = _opened(process)
    if fd is None:
        return True
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
    finally:
        os.close(fd)


def wait_for_lock(fd: int, kind: int, deadline: float) -> bool:
    """Take the lock, flock(2), by the (monotonic) deadline; whether we have it.

    flock(2) takes no timeout: a thread waits. After False it still does, and the process is to end soon.
    """
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        if deadline <= time.monotonic():
            return False
    failure: list[OSError] = []

    def wait() -> None:
        try:
            fcntl.flock(fd, kind)
        except OSError as error:
            failure.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX))
    if thread.is_alive():
        return False
    if failure:
        raise failure[0]
    return True


def make_directory(path: Path) -> None:
    """0700, durably; or it is there already. Raises OSError."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
        sync_directory(path.parent)


def state_error(path: Path, error: OSError) -> HandoffError:
    reason = error.strerror or str(error)
    return HandoffError(f"state of this host, {path}: {reason[:1].lower()}{reason[1:]}; repair it and try again")
