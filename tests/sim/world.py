"""A simulated world for the real supervisor: a clock, processes that obey, hang, crash or lie, and their channels.

The world does what a master would do with each action, and checks after every event what must always hold.
The kernel's rules are kept: what one process says arrives in order and before its exit, between processes
anything may overtake, and KILL always works.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from handoff.core.fleet import DRAIN_GRACE_SECONDS, NOW_GRACE_SECONDS, OPEN_SECONDS, STOP_GRACE_SECONDS
from handoff.core.generation import GenerationState, Timings
from handoff.core.respawn import delay_seconds
from handoff.core.supervisor import CLOSED_SECONDS, Supervisor
from handoff.core.vocabulary import (
    Action,
    ClosedSaid,
    Committed,
    Drain,
    Event,
    Exit,
    FailedSaid,
    Forget,
    GenerationStopRequested,
    HelloSaid,
    LeavingSaid,
    LogTransition,
    LogWarning,
    Open,
    OpenedSaid,
    Prepare,
    Prepared,
    PrepareFailed,
    ReadySaid,
    ReloadRequested,
    ScaleRequested,
    SendSignal,
    Signal,
    Spawn,
    StopRequested,
    Tick,
    Unbind,
    Verdict,
    WorkerBroke,
    WorkerExited,
)
from handoff.errors import ExitCode

LONGEST_STEPS = 20_000
"""A quiet world settles within this many events; more is a busy loop."""


@dataclass(slots=True)
class Process:
    """One simulated worker. What it said and what the master heard of it are kept apart."""

    worker: int
    generation: int
    slot: int
    started_at: float
    boot_timeout_seconds: float
    said: int = 0
    """How far its own program is: 0 nothing, 1 hello, 2 ready, 3 opened."""
    is_told_to_open: bool = False
    is_told_to_leave: bool = False
    is_hung: bool = False
    has_ended: bool = False
    outbox: deque[Event] = field(default_factory=deque)
    """Under way to the master; an exit is always the last."""
    has_closed: bool = False
    """It said, in its drain, that it accepts nobody any more."""
    is_closed_heard: bool = False
    is_ready_heard: bool = False
    is_opened_heard: bool = False
    opened_deadline: float | None = None
    drain_deadline: float | None = None
    signal_deadline: float | None = None
    is_killed: bool = False
    has_failed: bool = False
    """The master heard that it failed, or broke the protocol, before anybody sent it away."""
    failed_deadline: float | None = None
    """When one that said that it failed, and ends, must have ended."""

    @property
    def is_sent_away(self) -> bool:
        return self.drain_deadline is not None or self.signal_deadline is not None or self.is_killed

    @property
    def is_sent_away_for_good(self) -> bool:
        return self.signal_deadline is not None or self.is_killed or self.has_failed

    @property
    def is_serving(self) -> bool:
        """As far as the master can know: it accepts, and nobody sent it away."""
        return self.is_opened_heard and not self.is_sent_away and not self.is_told_to_leave

    def end(self, how: str) -> None:
        if not self.has_ended:
            self.has_ended = True
            self.outbox.append(WorkerExited(self.worker, how))

    def step(self) -> bool:
        """Do the next thing of its own accord. False where it has nothing to do."""
        if self.has_ended or self.is_hung:
            return False
        if self.drain_deadline is not None and not self.has_closed:
            self.has_closed = True
            self.outbox.append(ClosedSaid(self.worker))
        elif self.is_told_to_leave:
            self.end("exited 0")
        elif self.said == 0:
            self._say(1, HelloSaid(self.worker))
        elif self.said == 1:
            self._say(2, ReadySaid(self.worker))
        elif self.said == 2 and self.is_told_to_open:
            self._say(3, OpenedSaid(self.worker))
        else:
            return False
        return True

    def _say(self, said: int, event: Event) -> None:
        self.said = said
        self.outbox.append(event)


class World:
    """The supervisor under test and everything around it. `now` is its only clock."""

    def __init__(self) -> None:
        self.supervisor = Supervisor()
        self.now = 0.0
        self.processes: dict[int, Process] = {}
        """Whose exit the master has not seen."""
        self.preparing: list[Prepare] = []
        self.timings: dict[int, Timings] = {}
        """Of each generation that is not forgotten."""
        self.pins: set[int] = set()
        """What the master keeps: all that are not gone, and the one that a rollback goes back to."""
        self.live: int | None = None
        self.committed: dict[int, float] = {}
        """When each generation was."""
        self.unbound: set[int] = set()
        self.forgotten: set[int] = set()
        self.asked: set[int] = set()
        self.answers: dict[int, Verdict] = {}
        self.verdicts_of_generations: dict[int, Verdict] = {}
        self.exit: Exit | None = None
        self.is_stop_asked = False
        self.crashes: dict[tuple[int, int], tuple[int, float]] = {}
        """By generation and slot: crashes in a row since a worker last accepted there, and when the last was."""
        self.actions: list[Action] = []
        """Everything that the supervisor ever asked for."""
        self.history: list[tuple[float, Event, list[Action]]] = []
        """When, what happened, and what was asked for then: for the reader of a failure."""

    # --- events in --------------------------------------------------------------------------------------------------

    def serving(self) -> set[int]:
        """The accepting workers that the service stands on: what opens before its commit may be rolled back."""
        return {
            process.worker
            for process in self.processes.values()
            if process.is_serving and process.generation in self.committed
        }

    def next_request(self) -> int:
        request = len(self.asked) + 1
        self.asked.add(request)
        return request

    def handle(self, event: Event) -> list[Action]:
        """Let the supervisor take the event, do what it asks, and check what must always hold."""
        serving = self.serving()
        self._heard(event)
        actions = self.supervisor.handle(event, self.now)
        self.history.append((self.now, event, actions))
        for action in actions:
            self.actions.append(action)
            assert self.exit is None, f"{action} after Exit"
            self._act(action)
        self._check_service(event, serving)
        self.check()
        return actions

    def _heard(self, event: Event) -> None:
        if isinstance(event, StopRequested):
            self.is_stop_asked = True
        if isinstance(event, WorkerExited):
            self._exit_heard(self.processes.pop(event.worker, None))
            return
        process = self.processes.get(getattr(event, "worker", 0))
        if process is None:
            return
        if isinstance(event, ReadySaid):
            process.is_ready_heard = True
        elif isinstance(event, OpenedSaid) and process.opened_deadline is not None:
            process.is_opened_heard = True
            self.crashes.pop((process.generation, process.slot), None)
        elif isinstance(event, ClosedSaid):
            process.is_closed_heard = True
        elif isinstance(event, LeavingSaid):
            process.is_told_to_leave = True
        elif isinstance(event, FailedSaid | WorkerBroke) and not process.is_told_to_leave:
            if isinstance(event, FailedSaid) and not process.has_failed and not process.is_sent_away:
                process.failed_deadline = self.now + STOP_GRACE_SECONDS
            process.has_failed = True

    def _exit_heard(self, process: Process | None) -> None:
        if process is not None and (process.has_failed or not (process.is_sent_away or process.is_told_to_leave)):
            slot = (process.generation, process.slot)
            count, _ = self.crashes.get(slot, (0, 0.0))
            self.crashes[slot] = (count + 1, self.now)

    def tick(self) -> list[Action]:
        return self.handle(Tick())

    def deliver(self, process: Process) -> None:
        """The master reads the next message of this process."""
        self.handle(process.outbox.popleft())

    def prepared(self, prepare: Prepare, timings: Timings) -> None:
        self.preparing.remove(prepare)
        if prepare.generation not in self.forgotten:
            self.timings[prepare.generation] = timings
            self.pins.add(prepare.generation)
        self.handle(Prepared(prepare.generation, timings, prepare.label or ""))

    def prepare_failed(self, prepare: Prepare) -> None:
        self.preparing.remove(prepare)
        self.handle(PrepareFailed(prepare.generation, "port taken", ExitCode.FAILED))

    def reload(self, label: str | None = None, is_rollback: bool = False) -> int:
        request = self.next_request()
        self.handle(ReloadRequested(request, label, is_rollback))
        return request

    def scale(self, workers: int | None = None, change: int = 0) -> int:
        request = self.next_request()
        self.handle(ScaleRequested(request, workers, change))
        return request

    def stop(self, is_now: bool = False) -> int:
        request = self.next_request()
        self.handle(StopRequested(request, is_now))
        return request

    def stop_generation(self, generation: int, is_now: bool = False) -> int:
        request = self.next_request()
        self.handle(GenerationStopRequested(generation, request, is_now))
        return request

    def advance(self, seconds: float) -> None:
        """Let time pass, with a Tick at each deadline on the way and one at its end."""
        end = self.now + seconds
        for _ in range(LONGEST_STEPS):
            deadline = self.supervisor.next_deadline()
            if deadline is None or deadline > end or self.exit is not None:
                break
            self.now = deadline
            self.tick()
        else:
            raise AssertionError("the deadlines come without end")
        self.now = end
        if self.exit is None:
            self.tick()

    def run(self, timings: Timings) -> None:
        """Everybody who can does all there is to do, while no time passes."""
        for _ in range(LONGEST_STEPS):
            if self.exit is not None:
                return
            if self.preparing:
                self.prepared(self.preparing[0], self.timings.get(self.preparing[0].source or 0, timings))
                continue
            moved = False
            for process in list(self.processes.values()):
                moved |= process.step()
                if process.outbox:
                    self.deliver(process)
                    moved = True
            if not moved:
                return
        raise AssertionError("the world does not come to rest")

    def settle(self, timings: Timings) -> None:
        """Everybody does all there is to do, and time passes until nothing more is due."""
        for _ in range(LONGEST_STEPS):
            self.run(timings)
            deadline = self.supervisor.next_deadline()
            if deadline is None or self.exit is not None:
                return
            self.now = deadline
            self.tick()
        raise AssertionError("the world does not come to rest")

    # --- actions out ------------------------------------------------------------------------------------------------

    def _act(self, action: Action) -> None:
        match action:
            case Prepare():
                self.preparing.append(action)
                assert action.source is None or action.source in self.pins, f"{action}: its pins are gone"
            case Spawn():
                self._spawn(action)
            case Open() | Drain() | SendSignal():
                self._tell(self.processes[action.worker], action)
            case Committed():
                assert action.previous == self.supervisor.previous
                self.live = action.generation
                self.committed[action.generation] = self.now
                self.pins &= {action.generation, action.previous or 0, *self.timings}
            case Unbind():
                assert action.generation not in self.unbound, "unbound twice"
                self.unbound.add(action.generation)
            case Forget():
                self._forget(action.generation)
            case Verdict():
                self._verdict(action)
            case Exit():
                assert not self.processes, "Exit while a worker lives"
                self.exit = action
            case LogTransition() | LogWarning():
                pass

    def _spawn(self, action: Spawn) -> None:
        timings = self.timings[action.generation]
        assert action.worker not in self.processes
        count, crashed_at = self.crashes.get((action.generation, action.slot), (0, 0.0))
        assert self.now >= crashed_at + delay_seconds(count), f"{action}: replaced without back-off"
        for other in self.processes.values():
            if (other.generation, other.slot) == (action.generation, action.slot):
                assert not other.has_failed, f"{action}: replaced before the one that failed has ended"
        process = Process(
            action.worker, action.generation, action.slot, self.now, boot_timeout_seconds=timings.boot_timeout_seconds
        )
        self.processes[action.worker] = process
        self._check_memory(action.generation, timings)

    def _check_memory(self, generation: int, timings: Timings) -> None:
        fleet = self.supervisor.fleet
        record = fleet.generations[generation]
        is_surging = record.is_starting or bool(fleet.in_state(GenerationState.RETIRING))
        if timings.surge is None or not is_surging:
            return
        live = fleet.generations.get(self.live or 0)
        wanted = max(record.workers_wanted, live.workers_wanted if live is not None else 0)
        assert len(self.processes) <= wanted + timings.surge, f"{len(self.processes)} workers in a surge"

    def _tell(self, process: Process, action: Open | Drain | SendSignal) -> None:
        match action:
            case Open():
                assert process.is_ready_heard, "told to accept before it was ready"
                assert process.opened_deadline is None, "told to accept twice"
                process.is_told_to_open = True
                process.opened_deadline = self.now + OPEN_SECONDS
            case Drain(seconds=seconds):
                process.is_told_to_leave = True
                deadline = self.now + seconds + (DRAIN_GRACE_SECONDS if seconds > 0 else NOW_GRACE_SECONDS)
                process.drain_deadline = min(deadline, process.drain_deadline or deadline)
            case SendSignal(signal=Signal.KILL):
                process.is_killed = True
                process.end("was killed")
            case SendSignal():
                assert process.signal_deadline is None, "signalled twice"
                process.signal_deadline = self.now + STOP_GRACE_SECONDS
                process.is_told_to_leave = True

    def _forget(self, generation: int) -> None:
        assert generation not in self.forgotten, "forgotten twice"
        assert all(process.generation != generation for process in self.processes.values()), "forgotten with workers"
        self.forgotten.add(generation)
        self.timings.pop(generation, None)
        if generation != self.supervisor.previous:
            self.pins.discard(generation)

    def _verdict(self, verdict: Verdict) -> None:
        for request in verdict.requests:
            assert request in self.asked, f"request {request} was never made"
            assert request not in self.answers, f"request {request} was answered twice"
            self.answers[request] = verdict
        if verdict.message.startswith(f"generation {verdict.generation} is live") and verdict.generation == self.live:
            self._check_commit(verdict.generation)

    def _check_commit(self, generation: int) -> None:
        """Who asked for it may rely on it: no new client gets to the old version."""
        is_late = self.now >= self.committed[generation] + CLOSED_SECONDS
        is_live = self.supervisor.fleet.generations[generation].state is GenerationState.LIVE
        for process in self.processes.values():
            if process.generation < generation and process.drain_deadline is not None and is_live and not is_late:
                assert process.is_closed_heard or process.is_sent_away_for_good, f"{process} may accept still"

    # --- what must always hold --------------------------------------------------------------------------------------

    def _check_service(self, event: Event, before: set[int]) -> None:
        """Nobody but the last accepting worker itself, or a stop, ends the service."""
        is_asked_for = self.is_stop_asked or isinstance(event, GenerationStopRequested)
        if before and not self.serving() and not is_asked_for:
            assert before == {getattr(event, "worker", None)}, f"{event} took away the last that accepted: {before}"

    def check(self) -> None:
        supervisor = self.supervisor
        deadline = supervisor.next_deadline()
        assert deadline is None or deadline > self.now, "the next deadline is due already: a busy loop"
        starting = [record for record in supervisor.fleet.generations.values() if record.is_starting]
        assert len(starting) <= 1, "two generations start"
        assert set(supervisor.fleet.workers) == set(self.processes), "workers and processes differ"
        assert not self.forgotten & set(supervisor.fleet.generations)
        slots = [(worker.generation, worker.slot) for worker in supervisor.fleet.workers.values() if worker.fills_slot]
        assert len(slots) == len(set(slots)), "two workers fill one slot"
        if self.exit is not None:
            assert not supervisor.fleet.generations, "Exit before all generations were gone"
            assert self.asked == set(self.answers), "Exit with requests that nobody answered"
        for process in self.processes.values():
            assert not (process.is_serving and process.generation in self.unbound), f"{process} serves, unbound"
            self._check_deadlines(process)

    def _check_deadlines(self, process: Process) -> None:
        if process.is_killed:
            return
        if process.signal_deadline is not None:
            assert self.now < process.signal_deadline, f"{process} was signalled and is not killed"
        elif process.drain_deadline is not None:
            assert self.now < process.drain_deadline, f"{process} is past its drain deadline"
        elif process.failed_deadline is not None:
            assert self.now < process.failed_deadline, f"{process} said that it ends, and lives on"
        elif not process.is_ready_heard:
            assert self.now < process.started_at + process.boot_timeout_seconds, f"{process} is past its boot timeout"
        elif process.opened_deadline is not None and not process.is_opened_heard and not process.is_told_to_leave:
            assert self.now < process.opened_deadline, f"{process} did not confirm and goes on"


def lies(process: Process) -> tuple[Event, ...]:
    """What a worker may say at any time, whether it makes sense or not."""
    worker = process.worker
    return (
        HelloSaid(worker),
        ReadySaid(worker),
        OpenedSaid(worker),
        ClosedSaid(worker),
        LeavingSaid(worker, "TERM"),
        FailedSaid(worker, "ImportError"),
        WorkerBroke(worker, "garbage"),
    )
