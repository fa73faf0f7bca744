"""The master: carries out what the supervisor decides, and tells it what happened. It decides nothing itself."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

from handoff.addresses import Bind, absolute_bind, parse_bind
from handoff.config import ServiceOptions
from handoff.core import control, messages
from handoff.core.supervisor import Supervisor
from handoff.core.vocabulary import (
    Action,
    ClosedSaid,
    Committed,
    Drain,
    Event,
    Exit,
    Forget,
    GenerationStopRequested,
    LogTransition,
    LogWarning,
    Open,
    Prepare,
    Prepared,
    PrepareFailed,
    ReloadRequested,
    ScaleRequested,
    SendSignal,
    Spawn,
    StopRequested,
    Tick,
    Unbind,
    Verdict,
)
from handoff.core.worker import WorkerState
from handoff.errors import HandoffError
from handoff.inherited import InheritedSocket
from handoff.listeners import ListenerSet
from handoff.master.ack import remove_stale
from handoff.master.companions import CompanionDesk
from handoff.master.control import ControlServer
from handoff.master.crew import Crew
from handoff.master.describing import Describing, Outcome
from handoff.master.generations import PreparedGeneration, Preparer
from handoff.master.log import MasterLog
from handoff.master.loop import Loop, Order
from handoff.master.mailboxes import Mailboxes
from handoff.master.parent import Parent
from handoff.master.processes import reap_strangers
from handoff.master.signals import UNUSED, SignalSocket
from handoff.master.slots import SlotDesk
from handoff.master.status import StatusDesk
from handoff.pacing import end_pacing
from handoff.pid_file import PidFile
from handoff.settings import Launch
from handoff.status_file import StatusFile

if TYPE_CHECKING:
    from handoff.master.metrics import Metrics, MetricsServer

_SIGNAL_EVENTS: dict[signal.Signals, Event] = {
    signal.SIGHUP: ReloadRequested(),
    signal.SIGINT: StopRequested(),
    signal.SIGTERM: StopRequested(),
    signal.SIGQUIT: StopRequested(is_now=True),
    signal.SIGTTIN: ScaleRequested(change=1),
    signal.SIGTTOU: ScaleRequested(change=-1),
}


def serve(
    launch: Launch,
    options: ServiceOptions,
    inherited: Sequence[InheritedSocket],
    control_socket: Path,
    group_id: int | None,
    notify_address: str | None = None,
) -> tuple[Exit, str]:
    """Be the master until the service has ended. Returns how, and the traceback of a first boot that failed.

    The caller holds the lock of the service. Raises HandoffError when it cannot even begin: everything is bound
    before any worker is started, and nothing is left behind.
    """
    end_pacing()
    with ExitStack() as stack:
        listeners = ListenerSet()
        stack.callback(listeners.close_all)
        preparer = Preparer(launch, options, inherited, listeners)
        first = preparer.prepare(1, None, None)
        signals = SignalSocket()  # from here on a signal waits for the loop, and nothing that is made is left behind
        stack.callback(signals.close)
        if options.pidfile:
            pid_file = PidFile(options.pidfile)
            pid_file.create()
            stack.callback(pid_file.close)
        status_file = StatusFile(options.status_file) if options.status_file else None
        if status_file is not None:
            status_file.create()
            stack.callback(status_file.close)
        log = MasterLog(first.pins.settings.log_format)
        stack.callback(log.close)
        loop = Loop()
        stack.callback(loop.close)
        remove_stale(control_socket.parent)
        parent = Parent(notify_address, log)
        stack.callback(parent.close)
        measures = options.metrics is not None
        given = Given(
            preparer, first, listeners, log, loop, signals, parent, control_socket.parent, measures, status_file
        )
        master = Master(given)
        if options.metrics is not None:
            stack.callback(master.serve_metrics(absolute_bind(parse_bind(options.metrics), launch.directory)))
        server = ControlServer(control_socket, group_id, loop, log, master.requested)
        stack.callback(server.close)
        return master.run(server)


@dataclass(slots=True, frozen=True)
class Given:
    """What a master works with, all of it borrowed. `directory` is the service's own."""

    preparer: Preparer
    first: PreparedGeneration
    listeners: ListenerSet
    log: MasterLog
    loop: Loop
    signals: SignalSocket
    parent: Parent
    directory: Path
    measures: bool
    status_file: StatusFile | None


class Master:
    """One service."""

    def __init__(self, given: Given) -> None:
        self._preparer = given.preparer
        self._first: PreparedGeneration | None = given.first
        self._name = given.first.pins.settings.name
        self._listeners = given.listeners
        self._log = given.log
        self._loop = given.loop
        self._signals = given.signals
        self._parent = given.parent
        self._supervisor = Supervisor()
        self._events: deque[Event] = deque()
        self._crew = Crew(self._loop, self._log, self._events.append, given.directory, given.measures)
        self._metrics: Metrics | None = None
        self._metrics_server: MetricsServer | None = None
        self._status_file = given.status_file
        self._mailboxes = Mailboxes(self._supervisor, self._crew, self._loop, self._log)
        self._generations: dict[int, PreparedGeneration] = {}
        """All that are not gone, and the one that a rollback goes back to."""
        self._slots = SlotDesk(self._supervisor, self._crew, self._generations, self._log)
        self._companions = CompanionDesk(self._loop, self._log, given.directory, self._log_transition)
        self._describing = Describing(self._loop)
        self._describing_for = 0
        """A generation."""
        self._last_actions: list[Action] = []
        """Those that end the service; they wait for the companions to end."""
        self._exit: Exit | None = None
        self._told_of_stop = False

    def serve_metrics(self, bind: Bind) -> Callable[[], None]:
        """Answer Prometheus at this address. Returns what closes it. Raises HandoffError."""
        from handoff.master.metrics import Metrics, MetricsServer  # 12 MB that only this needs

        self._metrics = Metrics(self._name, self._supervisor, self._crew)
        self._metrics_server = MetricsServer(bind, self._metrics, self._loop, self._log)
        return self._metrics_server.close

    def run(self, server: ControlServer) -> tuple[Exit, str]:
        """Serve. Returns how it ended, and the traceback of a first boot that failed."""
        self._server = server
        self._status = StatusDesk(
            self._name,
            self._supervisor,
            self._crew,
            self._listeners,
            self._generations,
            self._log,
            self._companions,
            server.answer,
        )
        self._loop.watch(self._signals, Order.SIGNAL, self._signalled)
        self._log.hold()
        if self._metrics_server is not None:
            self._log.info("metrics", address=self._metrics_server.address)
        self._events.append(ReloadRequested())
        self._handle_events()
        while self._exit is None:
            self._loop.turn(self._timeout_seconds())
            now = time.monotonic()
            self._crew.check(now)
            self._server.check(now)
            if self._metrics_server is not None:
                self._metrics_server.check(now)
            self._describing.check(now)
            self._events.append(Tick())
            self._handle_events()
            self._companions.check(now)
            self._end_after_companions()
            self._mailboxes.check(now)
            self._slots.check(now)
            self._status.check(now)
            self._parent.check(now)
        self._mailboxes.close()
        self._crew.close()
        self._companions.close()
        self._log.release()
        verdict = self._supervisor.last_verdict
        return self._exit, verdict.traceback if verdict is not None else ""

    def _timeout_seconds(self) -> float | None:
        sources = (
            *(self._supervisor, self._crew, self._mailboxes, self._status, self._server, self._parent),
            *(self._slots, self._companions, self._describing, self._metrics_server),
        )
        deadlines = [source.next_deadline() for source in sources if source is not None]
        earliest = min((deadline for deadline in deadlines if deadline is not None), default=None)
        return None if earliest is None else max(0.0, earliest - time.monotonic())

    # --- what happened ----------------------------------------------------------------------------------------------

    def _handle_events(self) -> None:
        while self._events:
            event = self._events.popleft()
            if isinstance(event, StopRequested) and (event.is_now or self._supervisor.is_stopping):
                self._companions.stop(is_now=True)
            actions = self._supervisor.handle(event, time.monotonic())
            held = self._to_be_held(event, actions)
            self._last_actions += held
            self._act_all(action for action in actions if action not in held)
            if self._last_actions:
                self._companions.stop(is_now=False)  # after the workers, which may need them to the end
                self._end_after_companions()
        if self._supervisor.is_stopping and not self._told_of_stop:
            self._tell_of_stop()
        if self._crew.has_stored:
            self._crew.keep_stored_of(self._slots_of_commands())
        if self._status_file is not None:
            self._write_status_file(self._status_file)

    def _to_be_held(self, event: Event, actions: Sequence[Action]) -> list[Action]:
        """What ends the service, or says that it has ended: not before the companions have, too."""
        is_stop = isinstance(event, StopRequested) and self._supervisor.has_exited
        if is_stop or any(isinstance(action, Exit) for action in actions):
            return [action for action in actions if isinstance(action, Verdict | Exit)]
        return []

    def _act_all(self, actions: Iterable[Action]) -> None:
        for action in actions:
            self._act(action)

    def _end_after_companions(self) -> None:
        if self._last_actions and self._companions.is_empty:
            actions, self._last_actions = self._last_actions, []
            self._act_all(actions)

    def _slots_of_commands(self) -> set[int]:
        """The slots that have, or will have, a command in them again."""
        found: set[int] = set()
        for number, record in self._supervisor.fleet.generations.items():
            prepared = self._generations.get(number)
            if prepared is not None and prepared.pins.settings.command and record.wants_workers:
                found |= set(range(record.workers_wanted))
        return found

    def _write_status_file(self, file: StatusFile) -> None:
        try:
            file.update((process.boot.generation, process.pid) for process in self._crew)
        except OSError as error:  # the service goes on without it
            self._log.warning(f"status file {file.path}: cannot be written ({error.strerror})")

    def _tell_of_stop(self) -> None:
        """Workers that drain already: nobody will take their connections any more."""
        self._told_of_stop = True
        self._parent.stopping()
        now = time.monotonic()
        for worker in self._supervisor.fleet.workers.values():
            if worker.state is WorkerState.DRAINING and worker.deadline is not None:
                seconds = max(0.0, worker.deadline - now)  # it never moves a deadline to later
                self._crew.send(worker.worker, messages.Drain(seconds=seconds, moves=False))

    def _signalled(self) -> None:
        for number in self._signals.read():
            if number is signal.SIGCHLD:
                if os.getpid() == 1:
                    reap_strangers(self._crew.pids() | self._companions.crew.pids() | self._describing.pids())
                continue
            if number in UNUSED:
                self._log.warning(
                    "signal: means nothing here; reload with SIGHUP, end with SIGTERM", signal=number.name
                )
                continue
            self._log.info("signal", signal=number.name)
            self._events.append(_SIGNAL_EVENTS[number])

    def requested(self, number: int, request: control.AnyRequest) -> None:
        """A request of a control peer."""
        match request:
            case control.Status():
                self._status.request(number, request.drain, time.monotonic())
            case control.Reload():
                self._reload(number, request.wait, ReloadRequested(number, request.label))
            case control.Rollback():
                self._reload(number, request.wait, ReloadRequested(number, None, is_rollback=True))
            case control.Scale():
                self._events.append(ScaleRequested(number, request.workers))
            case control.Stop():
                if request.generation is None:
                    self._events.append(StopRequested(number, request.now))
                else:
                    self._events.append(GenerationStopRequested(request.generation, number, request.now))
            case _:
                assert_never(request)

    def _reload(self, number: int, is_waiting: bool, event: ReloadRequested) -> None:
        if not is_waiting:
            word = "rollback" if event.is_rollback else "reload"
            self._server.answer(number, control.Answer(exit_code=0, message=f"{word} requested"))
            event = ReloadRequested(None, event.label, event.is_rollback)
        self._events.append(event)

    # --- what is to be done -----------------------------------------------------------------------------------------

    def _act(self, action: Action) -> None:
        match action:
            case Prepare():
                self._describe_and_prepare(action)
            case Spawn():
                prepared = self._generations[action.generation]
                slot = (action.generation, action.slot)
                self._set_blocking(prepared)
                self._crew.spawn(
                    action, prepared.pins, prepared.label, prepared.listeners, lambda: self._mailboxes.reader_fd(slot)
                )
                if self._metrics is not None:
                    self._metrics.spawned(action.generation, action.slot)
            case Open():
                self._crew.send(action.worker, messages.Open())
            case Drain():
                if self._metrics is not None:
                    self._metrics.drains(action.worker)
                ending = self._ending_listeners(action.worker)
                moves = not self._supervisor.is_stopping
                self._crew.send(action.worker, messages.Drain(seconds=action.seconds, ending=ending, moves=moves))
                if not self._has_listeners(action.worker):  # it may be at work, and look at it much later
                    self._events.append(ClosedSaid(action.worker))
            case SendSignal():
                self._crew.signal(action.worker, action.signal)
            case Committed():
                self._committed(action)
            case Unbind():
                self._listeners.release(action.generation)
            case Forget():
                if action.generation == self._describing_for:
                    self._describing.cancel()
                self._listeners.release(action.generation)
                if action.generation != self._supervisor.previous:
                    self._generations.pop(action.generation, None)
            case Verdict():
                self._verdict(action)
            case LogTransition():
                process = self._crew.get(action.worker) if action.worker is not None else None
                self._log_transition(action, None if process is None else process.pid)
            case LogWarning():
                self._log.warning(action.message)
            case Exit():
                self._exit = action
            case _:
                assert_never(action)

    def _set_blocking(self, prepared: PreparedGeneration) -> None:
        """A command gets listeners that block, as from systemd; ours do not, and the flag is one for all processes."""
        present = [self._generations.get(number, prepared) for number in self._supervisor.fleet.generations]
        if all(one.pins.settings.command for one in present):
            for listener in prepared.listeners.values():
                os.set_blocking(listener.socket.fileno(), True)

    def _has_listeners(self, worker: int) -> bool:
        return bool(self._generations[self._supervisor.fleet.workers[worker].generation].listeners)

    def _ending_listeners(self, worker: int) -> tuple[str, ...]:
        """The names of the worker's listeners that no generation accepts from after it."""
        supervisor = self._supervisor
        generation = supervisor.fleet.workers[worker].generation
        mine = self._generations[generation].listeners
        if supervisor.is_stopping:
            return tuple(mine)
        live = self._generations[supervisor.live].listeners.values() if supervisor.live is not None else ()
        return tuple(name for name, listener in mine.items() if listener not in live)

    def _describe_and_prepare(self, action: Prepare) -> None:
        """A reload from what was typed first asks the description command, if there is one."""
        launch = self._preparer.launch
        if self._first is not None or action.source is not None or not launch.describe:
            self._prepare(action)
            return

        def described(outcome: Outcome) -> None:
            if isinstance(outcome, HandoffError):
                self._events.append(PrepareFailed(action.generation, outcome.message, outcome.exit_code))
            else:
                self._preparer.described(outcome)
                self._prepare(action)

        self._describing_for = action.generation
        self._describing.start(launch, described)

    def _prepare(self, action: Prepare) -> None:
        try:
            if self._first is not None:
                prepared, self._first = self._first, None
            else:
                source = self._generations[action.source] if action.source is not None else None
                prepared = self._preparer.prepare(action.generation, source, action.label)
        except HandoffError as error:
            self._events.append(PrepareFailed(action.generation, error.message, error.exit_code))
            return
        except Exception as error:  # our mistake must not end the service, which runs on
            if self._supervisor.live is None:
                raise
            self._log.failure(f"generation {action.generation} could not be prepared", error)
            self._events.append(PrepareFailed(action.generation, f"could not be prepared: {error!r}"))
            return
        self._generations[action.generation] = prepared
        self._events.append(Prepared(action.generation, prepared.timings, prepared.label))

    def _committed(self, action: Committed) -> None:
        keep = {action.generation, action.previous, *self._supervisor.fleet.generations}
        for number in [number for number in self._generations if number not in keep]:
            del self._generations[number]
        if action.previous is None:
            self._log.release()
            for name in self._listeners.close_unclaimed():
                self._log.warning("an inherited socket that no bind names was closed", listener=name)
        addresses = ", ".join(self._listeners.addresses(action.generation).values()) or "none"
        self._companions.committed(self._generations[action.generation])
        pins = self._generations[action.generation].pins
        interface = next((one.interface for one in self._crew if one.boot.generation == action.generation), "")
        self._log.info(
            "serving",
            name=self._name,
            app=pins.settings.runs,
            interface=interface,
            addresses=addresses,
            directory=pins.directory,
        )
        status = f"generation {action.generation} serves {pins.settings.runs} on {addresses}"
        if action.previous is None:
            self._parent.ready(status)
        else:
            self._parent.status(status)

    def _verdict(self, verdict: Verdict) -> None:
        if self._metrics is not None:
            self._metrics.ended(verdict)
        answer = control.Answer(
            exit_code=verdict.exit_code,
            message=verdict.message,
            generation=verdict.generation,
            traceback=verdict.traceback,
            seconds=verdict.seconds,
        )
        for request in verdict.requests:
            self._server.answer(request, answer)
        if verdict.is_reload and verdict.seconds:
            if self._supervisor.live is None and not verdict.traceback:
                self._log.mute()
            else:
                self._log.release()
            level = "info" if verdict.exit_code == 0 else "warning"
            self._log.line(level, f"verdict: {verdict.message}", {"seconds": round(verdict.seconds, 3)})
            if verdict.exit_code != 0 and self._supervisor.live is not None:
                self._parent.status(verdict.message)

    def _log_transition(self, action: LogTransition, pid: int | None) -> None:
        fields: dict[str, object] = {"generation": action.generation}
        if action.companion:
            fields["name"] = action.companion
        elif action.worker is not None:
            fields |= {"worker": action.worker, "slot": action.slot}
        if pid is not None:
            fields["pid"] = pid
        fields |= {"from": action.came_from.replace(" ", "-"), "to": action.to.replace(" ", "-")}
        if action.reason:
            fields["reason"] = action.reason
        self._log.line("info", action.event, fields)
