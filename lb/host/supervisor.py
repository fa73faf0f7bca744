"""The process that starts a command, watches it, and writes down what became of it; nobody needs to wait for it.

It is a fork of `handoff host exec` in a session of its own: neither a closed pipe nor a hang-up reaches it. It holds
the operation's lock for as long as it lives. SIGTERM ends the command: TERM to its process group, after a grace KILL.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Mapping
from typing import NoReturn

from handoff.errors import HandoffError
from lb.host.operation import Operation, Result, state_error

KEPT_BYTES = 64 * 1024
"""Of the output: the last."""
GRACE_SECONDS = 10.0
"""Between TERM and KILL."""
_SHOW_SECONDS = 1.0
"""So often the output is written to a file while the command runs."""
_MAXIMUM_DRAIN_BYTES = 1024 * 1024
"""What the pipe may still give when the command has ended: what it left in the background may write for ever."""
_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS, _MAXIMUM_RETRIES = 1.0, 60.0, 60
"""For a result that cannot be written: the disk is full."""
_MAXIMUM_MESSAGE_BYTES = 4096
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126
"""As in a shell."""


def start(operation: Operation, lock_fd: int, argv: tuple[str, ...], environ: Mapping[str, str]) -> None:
    """When this returns the command runs, or its records say otherwise: its supervisor may be killed at any moment.

    Takes ownership of the lock. Raises HandoffError: nothing of it has run.

    To be called in a process without other threads.
    """
    told, tell = os.pipe2(os.O_CLOEXEC)
    try:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _live(operation, lock_fd, tell, argv, environ)
    except OSError as error:
        os.close(told)
        raise state_error(operation.path, error) from error
    finally:
        os.close(lock_fd)
        os.close(tell)
    with open(told, "rb") as file:
        problem = file.read(_MAXIMUM_MESSAGE_BYTES).decode("utf-8", "replace")
    if problem:
        text = f"{problem[:1].lower()}{problem[1:]}; nothing of it has run, try again"
        raise HandoffError(f"operation {operation.id}: cannot be started: {text}")


def _live(operation: Operation, lock_fd: int, tell: int, argv: tuple[str, ...], environ: Mapping[str, str]) -> NoReturn:
    """The forked process, from its first to its last moment."""
    status = 1
    try:
        os.setsid()
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        _close_all_but(lock_fd, tell)
        watch = _Watch(operation)
        try:
            watch.start(argv, environ)
        except OSError as error:
            os.write(tell, (error.strerror or str(error)).encode()[:_MAXIMUM_MESSAGE_BYTES])
            raise
        os.close(tell)
        os.chdir("/")
        watch.run()
        status = 0
    finally:
        os._exit(status)


class _Watch:
    """Owns the command, both pipes, the pidfd, and what it has written last."""

    def __init__(self, operation: Operation) -> None:
        self._operation = operation
        self._began = time.monotonic()
        self._tail = bytearray()
        self._seen_bytes = 0
        self._is_unwritten = False
        self._show_at = 0.0
        self._kill_at: float | None = None
        self._is_killed = False
        self._pid = -1
        self._pidfd = -1
        self._poll = select.poll()
        self._output, self._output_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._output, False)
        self._signals, wakeup = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, _nothing)

    def start(self, argv: tuple[str, ...], environ: Mapping[str, str]) -> None:
        """The record of it is on the disk before it executes anything. Raises OSError: it has not, and will not."""
        gate, go = os.pipe2(os.O_CLOEXEC)
        self._pid = os.fork()
        if self._pid == 0:
            os.close(go)
            _become(argv, environ, self._output_end, gate)
        os.close(gate)
        os.close(self._output_end)
        try:
            self._pidfd = os.pidfd_open(self._pid)
            self._operation.keep_started(self._pid)
            os.write(go, b"g")
        finally:
            os.close(go)
        for fd in (self._output, self._pidfd, self._signals):
            self._poll.register(fd, select.POLLIN)

    def run(self) -> None:
        """To the command's end, and until that is on the disk."""
        has_ended, is_open = False, True
        while not has_ended or (self._kill_at is not None and is_open and time.monotonic() < self._kill_at):
            ready = {fd for fd, _ in self._poll.poll(self._timeout_milliseconds())}
            if self._signals in ready:
                self._terminate()
            if self._output in ready and not self._read():
                self._poll.unregister(self._output)
                is_open = False
            if self._pidfd in ready:
                self._poll.unregister(self._pidfd)
                has_ended = True
            self._act_on_time()
        if self._kill_at is not None:
            self._kill()  # what of its group has not ended within the grace; it is not reaped: the number is its own
        limit = self._seen_bytes + _MAXIMUM_DRAIN_BYTES
        with contextlib.suppress(BlockingIOError):
            while is_open and self._seen_bytes < limit:
                is_open = self._read_some()
        self._keep(os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1]))

    # --- in a turn ------------------------------------------------------------------------------------------------

    def _timeout_milliseconds(self) -> float | None:
        kill_at = None if self._is_killed else self._kill_at
        times = [one for one in (kill_at, self._show_at if self._is_unwritten else None) if one is not None]
        return max(0.0, min(times) - time.monotonic()) * 1000 + 1 if times else None

    def _act_on_time(self) -> None:
        now = time.monotonic()
        if self._is_unwritten and now >= self._show_at:
            self._is_unwritten = False
            self._show_at = now + _SHOW_SECONDS
            with contextlib.suppress(OSError):  # a full disk: the result says it all later
                self._operation.keep_output(bytes(self._tail[-KEPT_BYTES:]))
        if self._kill_at is not None and now >= self._kill_at and not self._is_killed:
            self._is_killed = True
            self._kill()

    def _terminate(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._signals, 4096)
        if self._kill_at is None:
            self._kill_at = time.monotonic() + GRACE_SECONDS
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGTERM)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)

    def _read(self) -> bool:
        """Some output; False: it has come to its end."""
        try:
            return self._read_some()
        except BlockingIOError:
            return True

    def _read_some(self) -> bool:
        data = os.read(self._output, KEPT_BYTES)
        self._seen_bytes += len(data)
        self._tail += data
        if len(self._tail) > 4 * KEPT_BYTES:
            del self._tail[:-KEPT_BYTES]
        self._is_unwritten = self._is_unwritten or bool(data)
        return bool(data)

    # --- the end --------------------------------------------------------------------------------------------------

    def _keep(self, status: int) -> None:
        output = bytes(self._tail[-KEPT_BYTES:])
        result = Result(
            exit_code=128 - status if status < 0 else status,
            output=output,
            left_out_bytes=self._seen_bytes - len(output),
            seconds=time.monotonic() - self._began,
        )
        delay = _FIRST_RETRY_SECONDS
        for _ in range(_MAXIMUM_RETRIES):
            try:
                self._operation.keep_result(result)
                return
            except OSError:
                if select.select([self._signals], [], [], delay)[0]:
                    break  # TERM: there is no time left
                delay = min(delay * 2, _LAST_RETRY_SECONDS)
        self._operation.keep_result(result)


def _become(argv: tuple[str, ...], environ: Mapping[str, str], output: int, gate: int) -> NoReturn:
    """In the command's process: wait for the word, and be it. Nothing here returns."""
    code = _NOT_EXECUTABLE
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGTERM, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if os.read(gate, 1) != b"g":
            os._exit(1)
        _close_all_but()
        os.execvpe(argv[0], argv, environ)
    except OSError as error:
        code = _NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_EXECUTABLE
        os.write(2, f"{argv[0]}: {error.strerror}\n".encode(errors="surrogateescape"))
    finally:
        os._exit(code)


def _close_all_but(*kept: int) -> None:
    """0 to 2 stay what they are for the command, and lead nowhere for the supervisor."""
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd not in kept:
            with contextlib.suppress(OSError):  # the one that listdir had
                os.close(fd)
    if kept:
        nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for fd in range(3):
            os.dup2(nowhere, fd)
        os.close(nowhere)


def _nothing(*_: object) -> None:
    """The byte in the wakeup pipe is enough."""
