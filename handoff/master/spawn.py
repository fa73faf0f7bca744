"""Starting a worker: fork and exec, so that every generation loads new code in a fresh interpreter."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

import msgspec

from handoff.core.dialects import FIRST_FD
from handoff.core.messages import Failed

CHANNEL_VARIABLE = "HANDOFF_CHANNEL"
POST_MORTEM_VARIABLE = "HANDOFF_POST_MORTEM"
PACED_VARIABLE = "HANDOFF_PACED"
"""For so many seconds, at most, a boot pauses where others want its processor (handoff/pacing.py)."""
_EXEC_FAILED = 127


class Command(NamedTuple):
    """What to execute, where, with what, and which fds it inherits: under their own numbers, or as 3, 4, …"""

    executable: str
    arguments: Sequence[str]
    directory: str
    environment: Mapping[str, str]
    channel_fd: int
    inherited_fds: Sequence[int]
    listen_fds: Sequence[int] | None = None
    """sd_listen_fds(3): for a command that is not ours. The channel is closed by the exec, which tells that it runs."""


def spawn(command: Command) -> tuple[int, int]:
    """Start the command in a process group of its own. Returns its pid and a pidfd, which the caller owns.

    Never waits: a failure to execute reaches the master over the channel, as any other failed boot.
    Raises OSError when there can be no new process.
    """
    reserved = os.dup(command.channel_fd)  # a number for the pidfd: after the fork it must not fail
    # A signal between fork and exec would run our handler in the child and write into our wakeup socket.
    mask = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _become(command)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(reserved)
    try:
        return pid, os.pidfd_open(pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)  # our child, not reaped yet: the pid is still its own
        os.waitpid(pid, 0)
        raise


def _become(command: Command) -> NoReturn:
    """In the child: nothing here may return, or raise to the master's code."""
    try:
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            if number not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.setpgid(0, 0)  # Ctrl-C and systemd signal the master's group; a worker's end is the master's decision
        os.chdir(command.directory)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        environment = dict(command.environment)
        if command.listen_fds is None:
            for fd in (command.channel_fd, *command.inherited_fds):
                os.set_inheritable(fd, True)
        else:
            command = command._replace(channel_fd=_place(command.listen_fds, command.channel_fd))
            if "LISTEN_FDS" in environment:
                environment["LISTEN_PID"] = str(os.getpid())
            if "WATCHDOG_USEC" in environment:
                environment["WATCHDOG_PID"] = str(os.getpid())
        os.execve(command.executable, list(command.arguments), environment)
    except BaseException as error:
        _report(command, error)
    finally:
        os._exit(_EXEC_FAILED)


def _place(fds: Sequence[int], channel_fd: int) -> int:
    """Copy the fds to 3, 4, …, inheritable; everything else is closed by the exec. Returns the channel's new number."""
    beyond = FIRST_FD + len(fds)
    channel_fd = fcntl.fcntl(channel_fd, fcntl.F_DUPFD_CLOEXEC, beyond)
    copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, beyond) for fd in fds]
    for number, fd in enumerate(copies, FIRST_FD):
        os.dup2(fd, number)
    return channel_fd


def _report(command: Command, error: BaseException) -> None:
    reason = error.strerror if isinstance(error, OSError) else repr(error)
    subject = getattr(error, "filename", None) or command.executable
    message = Failed(reason=f"cannot start {subject}: {reason}")
    os.write(command.channel_fd, msgspec.json.encode(message))
