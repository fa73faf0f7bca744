"""A service described by a command: `--describe COMMAND` prints, as JSON, what would stand in `handoff.toml`.

The command runs in a process of its own, at the start and at each reload, for a bounded time and with a bounded output.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shlex
import signal
import subprocess
import time
from typing import Any

import msgspec

from handoff.errors import HandoffError
from handoff.option_table import one_line
from handoff.resolve import find_executable, resolved_directory
from handoff.settings import Launch

DESCRIBE_SECONDS = 10.0
MAXIMUM_DESCRIPTION_BYTES = 1024 * 1024
_MAXIMUM_ERROR_BYTES = 64 * 1024
_MAXIMUM_REASON_CHARACTERS = 500


class Description:
    """One run of the command. Owns its process and what it writes; call `finish` or `kill` exactly once."""

    def __init__(self, launch: Launch) -> None:
        """Starts it. Raises HandoffError."""
        directory = resolved_directory(launch.directory)
        executable = find_executable(launch.describe[0], directory, launch.environment)
        self.deadline = time.monotonic() + DESCRIBE_SECONDS
        self._shown = shlex.join(launch.describe)
        with contextlib.ExitStack() as undo:
            self._output = bounded_file("description", MAXIMUM_DESCRIPTION_BYTES)
            undo.callback(os.close, self._output)
            self._errors = bounded_file("description-errors", _MAXIMUM_ERROR_BYTES)
            undo.callback(os.close, self._errors)
            try:
                self._process = subprocess.Popen(
                    launch.describe,
                    executable=executable,
                    cwd=directory,
                    env=launch.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=self._output,
                    stderr=self._errors,
                    process_group=0,
                )
                self._pidfd = os.pidfd_open(self._process.pid)
            except OSError as error:
                raise HandoffError(f"describe: {self._shown}: cannot be started ({error.strerror})") from None
            undo.pop_all()

    def fileno(self) -> int:
        """Readable when the command has ended."""
        return self._pidfd

    @property
    def pid(self) -> int:
        return self._process.pid

    def finish(self) -> dict[str, Any]:
        """What it printed, after its end; one that has not ended by now is too slow, and is killed.

        Raises HandoffError.
        """
        has_ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        self._end()
        status = self._process.returncode
        try:
            if not has_ended:
                raise HandoffError(
                    f"describe: {self._shown}: did not end within {DESCRIBE_SECONDS:g} s; make it quicker"
                )
            text = content_of(self._output)
            if len(text) >= MAXIMUM_DESCRIPTION_BYTES:  # a write beyond that fails, which it may have died of
                raise HandoffError(
                    f"describe: {self._shown}: printed more than {MAXIMUM_DESCRIPTION_BYTES} bytes; print less"
                )
            if status != 0:
                raise HandoffError(f"describe: {self._shown}: {_how(status)}{self._last_words()}")
            return self._decoded(text)
        finally:
            self._close()

    def kill(self) -> None:
        """Nobody wants to know any more."""
        self._end()
        self._close()

    def _end(self) -> None:
        with contextlib.suppress(
            ProcessLookupError
        ):  # what it left behind ends, too; not reaped, the number is its own
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _close(self) -> None:
        for fd in (self._output, self._errors, self._pidfd):
            os.close(fd)

    def _last_words(self) -> str:
        lines = content_of(self._errors).decode(errors="replace").split("\n")
        words = [line.strip() for line in lines if line.strip()]
        return f": {one_line(words[-1])[:_MAXIMUM_REASON_CHARACTERS]}" if words else ""

    def _decoded(self, text: bytes) -> dict[str, Any]:
        try:
            return msgspec.json.decode(text, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            reason = f"printed no JSON object ({one_line(str(error))})"
            raise HandoffError(f"describe: {self._shown}: {reason}; print what handoff.toml would say") from None


def describe(launch: Launch) -> Launch:
    """The launch with what its description command prints now; one without such a command comes back as it is.

    Waits for the command. Raises HandoffError.
    """
    if not launch.describe:
        return launch
    running = Description(launch)
    try:
        poll = select.poll()
        poll.register(running, select.POLLIN)
        poll.poll(DESCRIBE_SECONDS * 1000)
    except BaseException:
        running.kill()
        raise
    return msgspec.structs.replace(launch, described=running.finish())


def _how(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"


def bounded_file(name: str, size_bytes: int) -> int:
    """A file that cannot grow beyond its size; the caller owns it. No pipe: nobody need read while it is written."""
    fd = os.memfd_create(f"handoff-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.truncate(fd, size_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    except BaseException:
        os.close(fd)
        raise
    return fd


def content_of(fd: int) -> bytes:
    """What was written: JSON, and text, hold no zero bytes."""
    size = os.fstat(fd).st_size
    return os.pread(fd, size, 0).rstrip(b"\0")
