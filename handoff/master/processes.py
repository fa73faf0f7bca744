"""The processes behind the supervisor's workers: pid, pidfd, channel, counters, and how they ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from dataclasses import dataclass, field

from handoff.channel import Channel
from handoff.core.messages import Boot, Holds, WorkerMessage
from handoff.core.vocabulary import Signal
from handoff.master.foreign import ForeignWorker

MAXIMUM_POST_MORTEM_BYTES = 16 * 1024

_SIGNALS = {Signal.TERM: signal.SIGTERM, Signal.DUMP: signal.SIGABRT, Signal.KILL: signal.SIGKILL}


@dataclass(slots=True)
class WorkerProcess:
    """One child. Owns its pidfd, its channel and its post-mortem memfd (stack dumps of faulthandler)."""

    worker: int
    boot: Boot
    pid: int
    pidfd: int
    channel: Channel[WorkerMessage]
    post_mortem_fd: int
    is_channel_open: bool = True
    interface: str = ""
    adopts: tuple[str, ...] = ()
    holds: Holds | None = field(default=None)
    foreign: ForeignWorker | None = None
    """It is a command of any language; owned."""

    def send_signal(self, which: Signal) -> None:
        """Through the pidfd: the pid may already belong to somebody else."""
        self.send_number(_SIGNALS[which])
        if self.foreign is not None and which is Signal.KILL:
            self.kill_group()

    def send_number(self, number: signal.Signals) -> None:
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            return  # it ended; its exit is on the way

    def kill_group(self) -> None:
        """What a command started must not outlive it. Only before it is reaped: until then the number is its own."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def reap(self) -> str | None:
        """Collect the exit status of the child, which has ended. Returns how it ended, in words.

        None: not yet. A debugger that is attached to the child hears of the end before its parent does.
        """
        if self.foreign is not None and os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self.kill_group()
        status = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        if status is None:
            return None
        if status.si_code == os.CLD_EXITED:
            return f"exited with status {status.si_status}"
        return f"was killed by {_signal_name(status.si_status)}"

    def post_mortem(self) -> str:
        size = os.fstat(self.post_mortem_fd).st_size
        data = os.pread(self.post_mortem_fd, MAXIMUM_POST_MORTEM_BYTES, max(0, size - MAXIMUM_POST_MORTEM_BYTES))
        return data.decode(errors="replace").strip()

    def close(self) -> None:
        os.close(self.pidfd)
        os.close(self.post_mortem_fd)
        self.channel.close()
        if self.foreign is not None:
            self.foreign.close()


def post_mortem_file() -> int:
    """A memfd that a dying worker writes its stacks to. The caller owns it."""
    return os.memfd_create("handoff-post-mortem", os.MFD_CLOEXEC)


def reap_strangers(own_pids: frozenset[int]) -> None:
    """As PID 1 (in a container) collect what was orphaned to us. A child of our own is left to its pidfd."""
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if found is None or found.si_pid in own_pids:
            return
        os.waitpid(found.si_pid, os.WNOHANG)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def peer_groups(peer: socket.socket) -> list[int]:
    """The supplementary groups of a unix socket's peer (unix(7), SO_PEERGROUPS, Linux 4.13); at most 256.

    Of a peer with more groups than that the kernel tells none.
    """
    so_peergroups = 59
    try:
        data = peer.getsockopt(socket.SOL_SOCKET, so_peergroups, 1024)  # CPython allows no more
    except OSError:
        return []
    return list(memoryview(data).cast("I"))
