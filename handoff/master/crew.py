"""The crew: the worker processes, what they say, and how they end."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from handoff.binding import Listener
from handoff.channel import ChannelBroken, ChannelClosed, channel_pair, master_end
from handoff.core import messages
from handoff.core.dialects import (
    Inherited,
    einhorn_variables,
    listener_variables,
    takes_stored_fds,
    watchdog_variables,
)
from handoff.core.messages import (
    SERVED_PROTOCOLS,
    Boot,
    Closed,
    Failed,
    Hello,
    Holds,
    Leaving,
    ListenerInfo,
    Message,
    Opened,
    Progress,
    Ready,
    WorkerMessage,
)
from handoff.core.vocabulary import (
    ClosedSaid,
    Event,
    FailedSaid,
    HelloSaid,
    LeavingSaid,
    OpenedSaid,
    ProgressSaid,
    ReadySaid,
    Signal,
    Spawn,
    WorkerBroke,
    WorkerExited,
)
from handoff.counters import CONNECTIONS, CounterPage
from handoff.master.command_check import Checked, CommandCheck, address_of_check
from handoff.master.fd_store import FdStore, Place
from handoff.master.foreign import ForeignWorker
from handoff.master.log import MasterLog
from handoff.master.loop import Loop, Order
from handoff.master.processes import WorkerProcess, post_mortem_file
from handoff.master.spawn import CHANNEL_VARIABLE, PACED_VARIABLE, POST_MORTEM_VARIABLE, Command, spawn
from handoff.master.yielding import SHARE_OF_BOOT_TIMEOUT, Yielding
from handoff.resolve import worker_variables
from handoff.settings import Pins

CLOSED_CHANNEL_SECONDS = 5.0
"""A worker whose channel is closed is ending; one that still lives after this long is killed."""
REAP_AGAIN_SECONDS = 0.2
"""After an exit that a debugger has not let go of."""
_PASSING = (errno.EAGAIN, errno.ETOOMANYREFS, errno.ENOMEM, errno.ENOBUFS, errno.EMFILE, errno.ENFILE)
"""Errors of a send that may succeed later."""
_START = "from handoff.worker.start import start; start()"
MESSAGES_PER_TURN = 64
"""A worker that talks without end must not keep the others waiting."""


class Crew:
    """Starts workers, listens to them and reaps them. Everything that happens goes to `on_event`, in order."""

    def __init__(
        self,
        loop: Loop,
        log: MasterLog,
        on_event: Callable[[Event], None],
        directory: Path,
        measures: bool = False,
    ) -> None:
        """`directory`: the service's own. `measures`: workers count requests by status and duration."""
        self._loop = loop
        self._directory = directory
        self._measures = measures
        self._log = log
        self._on_event = on_event
        self._processes: dict[int, WorkerProcess] = {}
        self._closed_deadlines: dict[int, float] = {}
        self._unreaped: dict[int, float] = {}
        self._counters = CounterPage()
        self._store = FdStore()
        self._yielding = Yielding()

    # --- questions --------------------------------------------------------------------------------------------------

    def get(self, worker: int) -> WorkerProcess | None:
        return self._processes.get(worker)

    def __iter__(self) -> Iterator[WorkerProcess]:
        return iter(list(self._processes.values()))

    def pids(self) -> frozenset[int]:
        """Of all children, those included that check others."""
        helpers = (one.foreign.helpers for one in self if one.foreign is not None)
        return frozenset(process.pid for process in self).union(*helpers)

    def counters(self, process: WorkerProcess) -> tuple[int, ...]:
        return self._counters.read(process.boot.counters_row)

    def totals(self) -> list[int]:
        """Every cell of the counters over all workers since the start; for cells that only grow."""
        return self._counters.totals(process.boot.counters_row for process in self)

    def next_deadline(self) -> float | None:
        foreign = (one.foreign.next_deadline() for one in self if one.foreign is not None)
        due = [at for at in foreign if at is not None]
        yielding = self._yielding.next_deadline()
        due += [] if yielding is None else [yielding]
        return min((*self._closed_deadlines.values(), *self._unreaped.values(), *due), default=None)

    # --- what workers store -----------------------------------------------------------------------------------------

    @property
    def has_stored(self) -> bool:
        return bool(self._store)

    def keep_stored_of(self, places: Collection[Place]) -> None:
        """Of these places, and those that have a command, what was stored is kept; the rest is closed."""
        self._store.keep_only({*places, *(process.foreign.place for process in self if process.foreign is not None)})

    def close(self) -> None:
        self._store.close()

    # --- starting ---------------------------------------------------------------------------------------------------

    def spawn(
        self,
        action: Spawn,
        pins: Pins,
        label: str,
        listeners: Mapping[str, Listener],
        mailbox_fd: Callable[[], int],
    ) -> None:
        """Start a worker. Where no process, or no fd for it, can be had, that is told as an exit."""
        try:
            process = self._start(action, pins, label, listeners, -1 if pins.settings.command else mailbox_fd())
        except OSError as error:
            self._on_event(WorkerExited(action.worker, f"could not be started: {error.strerror}"))
            return
        self._processes[action.worker] = process
        if action.yields and process.foreign is None:  # a command serves as soon as it runs
            self._yielding.begin(action.worker, process.pid, time.monotonic() + _yielding_seconds(pins))
        self._loop.watch(
            process.channel,
            Order.CHANNEL,
            lambda: self._hear(process),
            on_failure=lambda error: self._failed(process, error),
        )
        self._watch_exit(process)
        if process.foreign is not None:
            process.interface = "command"
            process.foreign.started(process.pid)

    def _watch_exit(self, process: WorkerProcess) -> None:
        self._loop.watch(process.pidfd, Order.EXIT, lambda: self._ended(process))

    def _failed(self, process: WorkerProcess, error: Exception) -> None:
        """Our mistake, with one worker: it ends, the others do not."""
        self._log.failure(f"worker {process.worker}", error)
        self._close_channel(process)
        self._on_event(WorkerBroke(process.worker, repr(error)))

    def _start(
        self, action: Spawn, pins: Pins, label: str, listeners: Mapping[str, Listener], mailbox_fd: int
    ) -> WorkerProcess:
        row = self._counters.take_row()
        try:
            return self._start_in_row(row, action, pins, label, listeners, mailbox_fd)
        except BaseException:
            self._counters.give_back(row)
            raise

    def _start_in_row(
        self,
        row: int,
        action: Spawn,
        pins: Pins,
        label: str,
        listeners: Mapping[str, Listener],
        mailbox_fd: int,
    ) -> WorkerProcess:
        boot = self._boot(row, action, pins, label, listeners, mailbox_fd)
        environment = pins.environment | worker_variables(pins.settings.name, action.generation, label, action.slot)
        environment["HANDOFF_RUNTIME_DIRECTORY"] = str(self._directory)
        foreign = None
        with ExitStack() as undo:
            ours, theirs = channel_pair()
            undo.callback(ours.close)
            with theirs:
                post_mortem = post_mortem_file()
                undo.callback(os.close, post_mortem)
                if pins.settings.command:
                    foreign = self._foreign_worker(action, pins, listeners)
                    undo.callback(foreign.close)
                    stored = self._store.of(foreign.place) if takes_stored_fds(pins.settings.dialect) else []
                    command = _foreign_command(action, pins, environment, listeners, theirs.fileno(), foreign, stored)
                else:
                    environment |= {CHANNEL_VARIABLE: str(theirs.fileno()), POST_MORTEM_VARIABLE: str(post_mortem)}
                    if action.yields:
                        environment[PACED_VARIABLE] = str(_yielding_seconds(pins))
                    more_fds = (post_mortem, mailbox_fd)
                    command = self._own_command(action, pins, environment, listeners, theirs.fileno(), more_fds)
                pid, pidfd = spawn(command)
            undo.pop_all()
        return WorkerProcess(action.worker, boot, pid, pidfd, master_end(ours), post_mortem, foreign=foreign)

    def _foreign_worker(self, action: Spawn, pins: Pins, listeners: Mapping[str, Listener]) -> ForeignWorker:
        address = address_of_check(listeners.values())

        def begin_check(on_end: Callable[[Checked], None]) -> CommandCheck:
            if address is None:  # one that was passed to us, and is no TCP
                raise OSError(errno.EAFNOSUPPORT, "it has no TCP listener")
            pids = [process.pid for process in self if process.boot.generation == action.generation]
            return CommandCheck(self._loop, pids, address, pins.settings, on_end)

        return ForeignWorker(
            action.worker,
            action.companion,
            action.slot,
            pins.settings,
            self._loop,
            self._log,
            self._on_event,
            self._directory,
            self._store,
            None if pins.settings.check is None else begin_check,
        )

    def _own_command(
        self,
        action: Spawn,
        pins: Pins,
        environment: Mapping[str, str],
        listeners: Mapping[str, Listener],
        channel_fd: int,
        more_fds: Sequence[int],
    ) -> Command:
        title = f"{pins.settings.name}:{action.generation}:{action.companion or action.slot}"
        inherited = [listener.socket_of(action.slot).fileno() for listener in listeners.values()]
        return Command(
            pins.python,
            # -P: what lies in the working directory must not stand in for a module of ours.
            [pins.python, "-P", "-c", _START, title],
            pins.directory,
            environment,
            channel_fd,
            [*inherited, self._counters.fd, *more_fds],
        )

    def _boot(
        self, row: int, action: Spawn, pins: Pins, label: str, listeners: Mapping[str, Listener], mailbox_fd: int
    ) -> Boot:
        return Boot(
            generation=action.generation,
            label=label,
            slot=action.slot,
            worker=action.worker,
            settings=pins.settings,
            listeners=tuple(
                ListenerInfo(name, listener.address, listener.socket_of(action.slot).fileno())
                for name, listener in listeners.items()
            ),
            counters_fd=self._counters.fd,
            counters_row=row,
            mailbox_fd=mailbox_fd,
            measures=self._measures,
            tls=pins.tls,
        )

    # --- telling ----------------------------------------------------------------------------------------------------

    def send(self, worker: int, message: Message) -> None:
        if not self.pass_on(worker, message):  # it does not read; its deadline ends it
            self._log.warning("channel full; message dropped", worker=worker)

    def pass_on(self, worker: int, message: Message, fds: Sequence[int] = ()) -> bool:
        """Send a message and fds, which are borrowed. False when that may succeed later."""
        process = self._processes.get(worker)
        if process is not None and process.foreign is not None:
            try:
                _tell_command(process, process.foreign, message)
            except PermissionError:
                self._may_not_signal(process)
            return True
        if process is None or not process.is_channel_open:
            return True
        try:
            process.channel.send(message, fds)
        except UnicodeEncodeError as error:  # a setting that is no Unicode, and JSON has no place for
            self._failed(process, error)
        except OSError as error:
            # Anything else: it is gone, and its exit is on the way.
            return error.errno not in _PASSING
        return True

    def signal(self, worker: int, which: Signal) -> None:
        process = self._processes.get(worker)
        if process is None:
            return
        try:
            process.send_signal(which)
        except PermissionError:
            self._may_not_signal(process)

    def _may_not_signal(self, process: WorkerProcess) -> None:
        """It became another user."""
        self._log.warning(
            "may not signal the worker; its channel is closed instead", worker=process.worker, pid=process.pid
        )
        self._close_channel(process)
        process.channel.close()

    # --- hearing ----------------------------------------------------------------------------------------------------

    def _hear(self, process: WorkerProcess, limit: int = MESSAGES_PER_TURN) -> None:
        """What the worker has said so far, but no more than so many messages."""
        for _ in range(limit):
            if not process.is_channel_open:
                return
            try:
                message, fds = process.channel.receive()
            except BlockingIOError:
                return
            except ChannelClosed:
                self._close_channel(process)
                if process.foreign is not None:
                    process.foreign.executed(time.monotonic())
                    return
                self._closed_deadlines[process.worker] = time.monotonic() + CLOSED_CHANNEL_SECONDS
                return
            except (ChannelBroken, OSError) as error:
                self._close_channel(process)
                self._on_event(WorkerBroke(process.worker, str(error)))
                return
            for fd in fds:
                os.close(fd)  # no message of this protocol carries any yet
            if isinstance(message, Hello):
                self._greet(process, message)
            else:
                self._pass_on(process, message)

    def _greet(self, process: WorkerProcess, hello: Hello) -> None:
        if hello.protocol not in SERVED_PROTOCOLS:
            reason = (
                f"worker of handoff {hello.release} speaks protocol {hello.protocol}, this master serves "
                f"{', '.join(map(str, sorted(SERVED_PROTOCOLS)))}; restart the service "
                "with this release (`handoff upgrade` is to do that in place)"
            )
            self._on_event(FailedSaid(process.worker, reason))
            return
        self._on_event(HelloSaid(process.worker))
        if not self.pass_on(process.worker, process.boot):  # without it the worker would wait until its boot timeout
            self._on_event(WorkerBroke(process.worker, "its boot message could not be sent; out of fds or memory"))

    def _pass_on(self, process: WorkerProcess, message: WorkerMessage) -> None:
        match message:
            case Ready():
                self._yielding.end(process.worker)
                process.interface, process.adopts = message.interface, message.adopts
                for name in message.unserved:
                    self._log.warning("listener is not served by the application", listener=name)
                self._on_event(ReadySaid(process.worker))
            case Progress():
                self._on_event(ProgressSaid(process.worker, message.step))
            case Opened():
                self._on_event(OpenedSaid(process.worker))
            case Closed():
                self._on_event(ClosedSaid(process.worker))
            case Leaving():
                self._on_event(LeavingSaid(process.worker, message.reason))
            case Failed():
                self._on_event(FailedSaid(process.worker, message.reason, message.traceback))
            case Holds():
                process.holds = message
            case Hello():
                raise AssertionError("greeted elsewhere")

    def _close_channel(self, process: WorkerProcess) -> None:
        if process.is_channel_open:
            process.is_channel_open = False
            self._loop.forget(process.channel)

    def check(self, now: float) -> None:
        """What is due: exits that could not be collected, and workers whose channel is closed for too long."""
        self._yielding.check(now)
        for process in self:
            if process.foreign is not None:
                process.foreign.check(now)
        for worker, again_at in list(self._unreaped.items()):
            if again_at <= now:
                del self._unreaped[worker]
                self._watch_exit(self._processes[worker])
        for worker, deadline in list(self._closed_deadlines.items()):
            if deadline <= now:
                del self._closed_deadlines[worker]
                self._on_event(WorkerBroke(worker, "it closed its channel and lives on"))

    # --- ending -----------------------------------------------------------------------------------------------------

    def _ended(self, process: WorkerProcess) -> None:
        how = process.reap()
        if how is None:
            self._loop.forget(process.pidfd)  # it stays readable
            self._unreaped[process.worker] = time.monotonic() + REAP_AGAIN_SECONDS
            return
        self._hear(process, sys.maxsize)  # its last words come before its exit
        if process.foreign is not None:
            process.foreign.hear_last()
            if not process.foreign.is_ready:
                how += f" (its log is {_place_of_logs()})"
        self._close_channel(process)
        self._closed_deadlines.pop(process.worker, None)
        self._yielding.forget(process.worker)
        self._loop.forget(process.pidfd)
        if number := self.counters(process)[CONNECTIONS]:
            how += f" with {number} open connection{'s' if number > 1 else ''}"
        post_mortem = process.post_mortem()
        process.close()
        self._counters.give_back(process.boot.counters_row)
        del self._processes[process.worker]
        self._on_event(WorkerExited(process.worker, how, post_mortem))


def _yielding_seconds(pins: Pins) -> float:
    return pins.settings.boot_timeout_seconds * SHARE_OF_BOOT_TIMEOUT


def _place_of_logs() -> str:
    """Where workers write to, as we do: their standard error is ours."""
    with contextlib.suppress(OSError):
        place = os.readlink("/proc/self/fd/2")
        if place.startswith("/"):
            return place
    return "the standard error of the service"


def _foreign_command(
    action: Spawn,
    pins: Pins,
    environment: dict[str, str],
    listeners: Mapping[str, Listener],
    channel_fd: int,
    foreign: ForeignWorker,
    stored: Sequence[tuple[str, int]],
) -> Command:
    """A command of any language, with its listeners, what its predecessor stored, and its dialect's variables."""
    settings = pins.settings
    inherited = [Inherited(name, one.address, one.socket.family.name) for name, one in listeners.items()]
    stored_names = [name for name, _ in stored]
    environment |= listener_variables(settings.dialect, inherited, action.generation, stored_names)
    environment |= einhorn_variables(settings.dialect, action.slot, os.getpid(), foreign.ack_path)
    environment |= watchdog_variables(settings.watchdog_seconds)
    if foreign.notify_address:
        environment["NOTIFY_SOCKET"] = foreign.notify_address
    fds = [*(listener.socket.fileno() for listener in listeners.values()), *(fd for _, fd in stored)]
    return Command(pins.executable, settings.command, pins.directory, environment, channel_fd, (), fds)


def _tell_command(process: WorkerProcess, foreign: ForeignWorker, message: Message) -> None:
    """What a message is for a command: it cannot be held back, and is asked to drain by a signal."""
    match message:
        case messages.Open():
            foreign.opened()
        case messages.Drain() if foreign.may_drain():
            name = process.boot.settings.drain_signal.removeprefix("SIG")
            process.send_number(signal.Signals[f"SIG{name}"])
            foreign.closed()
        case messages.Report():
            process.holds = Holds(request=message.request, total=0, holds=())
