"""Workers that are commands of any language: what they say to NOTIFY_SOCKET, and when silence counts as ready."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

from handoff.core.dialects import (
    DEFAULT_FD_NAME,
    MAXIMUM_NOTIFICATION_BYTES,
    Notification,
    listens_for_words,
    read_notification,
    ready_after_seconds,
    takes_acks,
    takes_stored_fds,
)
from handoff.core.vocabulary import (
    ClosedSaid,
    Event,
    FailedSaid,
    HelloSaid,
    LeavingSaid,
    NotedSaid,
    OpenedSaid,
    ProgressSaid,
    ReadySaid,
)
from handoff.durations import format_duration
from handoff.master.ack import AckSocket
from handoff.master.command_check import Checked, CommandCheck
from handoff.master.fd_store import MAXIMUM_STORED_FDS, FdStore, Place
from handoff.master.log import MasterLog
from handoff.master.loop import Loop, Order
from handoff.settings import Settings

_CREDENTIALS = struct.Struct("3i")
_MAXIMUM_FDS = 253
_ANCILLARY_BYTES = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(_MAXIMUM_FDS * 4)
_MAXIMUM_ANCESTORS = 64
_DATAGRAMS_PER_TURN = 16
_MAXIMUM_LAST_DATAGRAMS = 1024
"""More than a queue holds (net.unix.max_dgram_qlen), unless somebody goes on to send."""
_EXPECTED = "expected to say READY=1 to $NOTIFY_SOCKET; for a command that cannot, give --ready-after"


BeginCheck = Callable[[Callable[[Checked], None]], CommandCheck]
"""Takes who is told how it ended. Raises OSError."""


class ForeignWorker:
    """What stands in for the channel of a worker that is a command. Owns the sockets that it says its words to.

    Its life is told as the others' are: hello when the command is executed, ready by its word or after a while, and
    opened at once, since a command cannot be held back from accepting.
    """

    def __init__(
        self,
        worker: int,
        companion: str,
        slot: int,
        settings: Settings,
        loop: Loop,
        log: MasterLog,
        on_event: Callable[[Event], None],
        directory: Path,
        store: FdStore,
        begin_check: BeginCheck | None = None,
    ) -> None:
        """`companion`: its name, or none. `directory`: the service's, for sockets that have a path; `store` is
        borrowed. `begin_check`: before it counts as ready it must pass that. Raises OSError."""
        self.worker = worker
        self.place: Place = companion or slot
        """Whose successor gets what it stores."""
        self._store = store if takes_stored_fds(settings.dialect) else None
        self.pid = 0
        self._ready_at: float | None = None
        self._watchdog_seconds = settings.watchdog_seconds
        self._watchdog_at: float | None = None
        """By when it must have said WATCHDOG=1; None: not yet, not any more, or never."""
        self._ready_after = ready_after_seconds(settings.dialect, settings.ready_after_seconds)
        self._loop = loop
        self._log = log
        self._on_event = on_event
        self._is_executed = self._is_ready = self._is_leaving = False
        self._has_heard_stranger = False
        self._begin_check = begin_check
        self._check: CommandCheck | None = None
        self._shown_check = f"check {settings.check}"
        self._socket: socket.socket | None = None
        self.notify_address = ""
        """For NOTIFY_SOCKET; empty where the dialect has none."""
        if listens_for_words(settings.dialect, settings.watchdog_seconds):
            # Abstract: a command that becomes another user still reaches it; who may speak its credentials tell.
            self.notify_address = f"@handoff-{secrets.token_hex(16)}"
            self._socket = _notify_socket(self.notify_address)
        # Companions are numbered by themselves.
        ack_name = f"c{worker}" if companion else str(worker)
        self._acks = self._ack_socket(directory, ack_name) if takes_acks(settings.dialect) else None

    @property
    def ack_path(self) -> str:
        """For EINHORN_SOCK_PATH; empty where the dialect has none."""
        return self._acks.path if self._acks is not None else ""

    def _ack_socket(self, directory: Path, name: str) -> AckSocket | None:
        """Most commands never ack: that they could not must not keep them from starting."""
        try:
            return AckSocket(directory, name, self.worker, self._loop, self._log, self._is_of_worker, self._ready)
        except OSError as error:
            self._log.warning(f"no socket for acks in {directory}: {error.strerror}", worker=self.worker)
            return None

    @property
    def helpers(self) -> frozenset[int]:
        """Pids of our own processes that work for it."""
        return frozenset() if self._check is None else self._check.pids

    def _is_of_worker(self, pid: int) -> bool:
        return _is_of(pid, self.pid)

    def started(self, pid: int) -> None:
        self.pid = pid
        if self._socket is not None:
            self._loop.watch(self._socket, Order.CHANNEL, self._hear, on_failure=self._failed)
        if self._acks is not None:
            self._acks.watch()

    def executed(self, now: float) -> None:
        """The command runs: the channel was closed by the exec. May be told again."""
        if self._is_executed:
            return
        self._is_executed = True
        self._on_event(HelloSaid(self.worker))
        if self._ready_after is not None:
            self._on_event(ProgressSaid(self.worker, "starting"))
            self._ready_at = now + self._ready_after
        else:
            self._on_event(ProgressSaid(self.worker, _EXPECTED))

    def next_deadline(self) -> float | None:
        return min((at for at in (self._ready_at, self._watchdog_at) if at is not None), default=None)

    def check(self, now: float) -> None:
        if self._ready_at is not None and self._ready_at <= now:
            self._ready()
        if self._watchdog_at is not None and self._watchdog_at <= now:
            assert self._watchdog_seconds is not None
            self._broke(f"said no WATCHDOG=1 for {format_duration(self._watchdog_seconds)}")

    def opened(self) -> None:
        self._on_event(OpenedSaid(self.worker))

    def closed(self) -> None:
        """It was asked to drain; when it does, no dialect tells."""
        self._on_event(ClosedSaid(self.worker))

    @property
    def is_ready(self) -> bool:
        return self._is_ready

    def may_drain(self) -> bool:
        """True for the first time only: a second signal may mean something else to the command."""
        was, self._is_leaving = self._is_leaving, True
        self._watchdog_at = None  # it finishes; the drain has a deadline of its own
        return not was

    def hear_last(self) -> None:
        """What it said before it ended."""
        if self._socket is not None:
            self._hear(_MAXIMUM_LAST_DATAGRAMS)
        if self._acks is not None:
            self._acks.hear_last()

    def close(self) -> None:
        if self._check is not None:
            self._check.close()
        if self._acks is not None:
            self._acks.close()
        if self._socket is not None:
            if self.pid:
                self._loop.forget(self._socket)
            self._socket.close()
            self._socket = None

    # --- its words --------------------------------------------------------------------------------------------------

    def _hear(self, limit: int = _DATAGRAMS_PER_TURN) -> None:
        assert self._socket is not None
        for _ in range(limit):
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(
                    MAXIMUM_NOTIFICATION_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            sender, fds = _take_ancillary(ancillary)
            try:
                if not _is_of(sender, self.pid):
                    self._heard_stranger(sender)
                elif flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):  # half a word might be another one
                    self._log.warning("notification that is too long was ignored", worker=self.worker)
                else:
                    self._said(data, fds)
            finally:
                for fd in fds:  # also those of BARRIER=1, which waits for that
                    os.close(fd)

    def _heard_stranger(self, pid: int) -> None:
        """Told once: anybody on the machine may send here, as often as he likes."""
        if not self._has_heard_stranger:
            self._log.warning("notification of a stranger was ignored", worker=self.worker, sender_pid=pid)
        self._has_heard_stranger = True

    def _failed(self, error: Exception) -> None:
        self._log.failure(f"notifications of worker {self.worker}", error)
        self._watchdog_seconds = self._watchdog_at = None  # it cannot be heard any more
        self.close()

    def _said(self, data: bytes, fds: list[int]) -> None:
        """What is kept of the fds is taken out of the list."""
        said = read_notification(data)
        if self._store is not None:
            self._keep_fds(self._store, said, fds)
        if said.status is not None and not self._is_ready:
            self._on_event(ProgressSaid(self.worker, said.status))
        if said.is_ready:
            self._ready()
        if said.is_broken and not self._is_leaving:
            self._broke("said WATCHDOG=trigger")
        if said.watchdog_seconds is not None and self._watchdog_seconds is not None:
            self._watchdog_seconds = said.watchdog_seconds
            self._wind_watchdog()
        if said.is_alive:
            self._wind_watchdog()
        if said.is_stopping and self._is_ready and not self._is_leaving:
            self._on_event(LeavingSaid(self.worker, "the command says that it is stopping"))

    def _keep_fds(self, store: FdStore, said: Notification, fds: list[int]) -> None:
        if said.removes_fds and said.fd_name is not None:
            store.remove(self.place, said.fd_name)
        elif said.stores_fds:
            taken = list(fds)
            fds.clear()
            refused = store.add(self.place, said.fd_name or DEFAULT_FD_NAME, taken, said.polls_fds)
            if refused:
                self._log.warning(
                    f"{refused} fds were not kept; a slot may have {MAXIMUM_STORED_FDS}", worker=self.worker
                )

    def _ready(self) -> None:
        """It says so, or has lived long enough."""
        self._ready_at = None
        if self._is_ready or self._is_leaving or self._check is not None:
            return
        self.executed(time.monotonic())  # what speaks runs, even where the channel's end was not read yet
        self._ready_at = None
        if self._begin_check is None:
            self._works()
            return
        self._on_event(ProgressSaid(self.worker, f"answering the {self._shown_check}"))
        try:
            self._check = self._begin_check(self._checked)
        except OSError as error:
            self._checked(Checked(None, f"cannot be made ({error.strerror})"))

    def _checked(self, checked: Checked) -> None:
        if self._is_leaving:
            return
        if checked.is_good is False:
            self._fails(f"{self._shown_check}: {checked.reason}")
            return
        if checked.is_good is None:
            self._on_event(NotedSaid(self.worker, f"{self._shown_check}: {checked.reason}, so it was not checked"))
        self._works()

    def _works(self) -> None:
        self._is_ready = True
        self._on_event(ReadySaid(self.worker))
        self._wind_watchdog()

    def _wind_watchdog(self) -> None:
        """From now on it has the whole interval again."""
        if self._is_ready and not self._is_leaving and self._watchdog_seconds is not None:
            self._watchdog_at = time.monotonic() + self._watchdog_seconds

    def _broke(self, what: str) -> None:
        self._fails(f"worker {self.worker} {what}")

    def _fails(self, reason: str) -> None:
        self._is_leaving = True  # it is told to end once, and its drain signal is not for that
        self._ready_at = self._watchdog_at = None
        self._on_event(FailedSaid(self.worker, reason, is_ending=False))


def _notify_socket(address: str) -> socket.socket:
    """The caller owns it. Raises OSError."""
    found = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        found.bind("\0" + address[1:])
    except OSError:
        found.close()
        raise
    return found


def _take_ancillary(ancillary: list[tuple[int, int, bytes]]) -> tuple[int, list[int]]:
    """The sender's pid, 0: it did not say; and fds, which the caller owns."""
    sender, fds = 0, []
    for level, kind, payload in ancillary:
        if level != socket.SOL_SOCKET:
            continue
        if kind == socket.SCM_CREDENTIALS:
            sender = _CREDENTIALS.unpack(payload[: _CREDENTIALS.size])[0]
        elif kind == socket.SCM_RIGHTS:
            fds += [fd for (fd,) in struct.iter_unpack("i", payload[: len(payload) - len(payload) % 4])]
    return sender, fds


def _is_of(pid: int, ancestor: int) -> bool:
    """The process is the ancestor, or one of its descendants."""
    for _ in range(_MAXIMUM_ANCESTORS):
        if pid == ancestor:
            return True
        if pid <= 1:
            return False
        pid = _parent(pid)
    return False


def _parent(pid: int) -> int:
    """0 where it is gone."""
    with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[1])
    return 0
