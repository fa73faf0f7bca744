"""The records of all generations and workers, the one place where they change state, and questions about them."""

from __future__ import annotations

from collections.abc import Iterator

from handoff.core.generation import GENERATION_TABLE, GenerationEvent, GenerationRecord, GenerationState
from handoff.core.machine import follow
from handoff.core.respawn import Respawn
from handoff.core.vocabulary import Action, Drain, LogTransition, LogWarning, Open, SendSignal, Signal, Spawn, Unbind
from handoff.core.worker import MAY_HOLD_CONNECTIONS, WORKER_TABLE, WorkerEvent, WorkerRecord, WorkerState

OPEN_SECONDS = 5.0
"""How long a worker may take to confirm that it accepts."""
DRAIN_GRACE_SECONDS = 5.0
"""After its drain deadline a worker closes what is left by itself; this much later it gets TERM."""
STOP_GRACE_SECONDS = 2.0
"""From TERM, or from the stack dump, to KILL."""
NOW_GRACE_SECONDS = 1.0
"""From "at once" to KILL."""


class Fleet:
    """Every worker and generation that is not gone. Actions are collected in `actions` until they are taken."""

    def __init__(self) -> None:
        self.workers: dict[int, WorkerRecord] = {}
        self.generations: dict[int, GenerationRecord] = {}
        self.actions: list[Action] = []
        self._next_worker = 1
        self._next_generation = 1

    # --- questions --------------------------------------------------------------------------------------------------

    def workers_of(self, generation: int) -> list[WorkerRecord]:
        return [worker for worker in self.workers.values() if worker.generation == generation]

    def in_state(self, *states: GenerationState) -> list[GenerationRecord]:
        return [record for record in self.generations.values() if record.state in states]

    def starting(self) -> GenerationRecord | None:
        return next((record for record in self.generations.values() if record.is_starting), None)

    def count(self, generation: int, state: WorkerState) -> int:
        return sum(worker.state is state for worker in self.workers_of(generation))

    def not_closed_before(self, generation: int) -> list[int]:
        """Workers of older generations that drain, and have not said that they accept nobody any more."""
        drain = (worker for worker in self.workers.values() if worker.state is WorkerState.DRAINING)
        return [worker.worker for worker in drain if worker.generation < generation and not worker.has_closed]

    def deadlines(self) -> Iterator[float]:
        for worker in self.workers.values():
            if worker.deadline is not None:
                yield worker.deadline
        for record in self.generations.values():
            if record.deadline is not None:
                yield record.deadline

    # --- changes of state -------------------------------------------------------------------------------------------

    def move(self, worker: WorkerRecord, event: WorkerEvent, reason: str = "", deadline: float | None = None) -> None:
        """Raises IllegalTransition, and changes nothing, where the table has no such row."""
        came_from, worker.state = worker.state, follow(WORKER_TABLE, worker.state, event)
        worker.deadline = deadline
        if came_from is not worker.state:
            kind = "companion" if worker.companion else "worker"
            states = (came_from.value, worker.state.value)
            number, slot, companion = worker.worker, worker.slot, worker.companion
            self.actions.append(LogTransition(kind, worker.generation, *states, reason, number, slot, companion))

    def move_generation(self, record: GenerationRecord, event: GenerationEvent, reason: str = "") -> None:
        came_from, record.state = record.state, follow(GENERATION_TABLE, record.state, event)
        record.deadline = None
        self.actions.append(LogTransition("generation", record.generation, came_from.value, record.state.value, reason))
        if record.state in (GenerationState.DRAINING, GenerationState.ABORTING):
            self.actions.append(Unbind(record.generation))

    def new_generation(self, label: str | None, is_rollback: bool, now: float) -> GenerationRecord:
        record = GenerationRecord(self._next_generation, label or "", is_rollback, now)
        self._next_generation += 1
        self.generations[record.generation] = record
        return record

    def spawn(self, record: GenerationRecord, slot: int, now: float, yields: bool = False) -> None:
        assert record.timings is not None
        worker = WorkerRecord(self._next_worker, record.generation, slot, now)
        self._spawn(worker, record.timings.boot_timeout_seconds, yields)

    def spawn_companion(self, name: str, generation: int, boot_timeout_seconds: float, now: float) -> None:
        self._spawn(WorkerRecord(self._next_worker, generation, 0, now, companion=name), boot_timeout_seconds)

    def _spawn(self, worker: WorkerRecord, boot_timeout_seconds: float, yields: bool = False) -> None:
        worker.deadline = worker.started_at + boot_timeout_seconds
        self._next_worker += 1
        self.workers[worker.worker] = worker
        self.actions.append(Spawn(worker.worker, worker.generation, worker.slot, worker.companion, yields))

    # --- telling workers --------------------------------------------------------------------------------------------

    def open(self, worker: WorkerRecord, now: float) -> None:
        self.move(worker, WorkerEvent.OPEN, deadline=now + OPEN_SECONDS)
        self.actions.append(Open(worker.worker))

    def drain(self, worker: WorkerRecord, seconds: float, now: float, reason: str) -> None:
        """Begin a drain, or shorten one; a drain's deadline never moves later."""
        grace = DRAIN_GRACE_SECONDS if seconds > 0 else NOW_GRACE_SECONDS
        deadline = now + seconds + grace
        if worker.state is WorkerState.DRAINING and worker.deadline is not None and worker.deadline <= deadline:
            return
        self.move(worker, WorkerEvent.DRAIN, reason, deadline)
        self.actions.append(Drain(worker.worker, seconds))

    def stop(self, worker: WorkerRecord, now: float, reason: str, signal: Signal = Signal.TERM) -> None:
        if worker.state in (WorkerState.STOPPING, WorkerState.KILLED):
            return
        self.move(worker, WorkerEvent.STOP, reason, now + STOP_GRACE_SECONDS)
        self.actions.append(SendSignal(worker.worker, signal))

    def expect_exit(self, worker: WorkerRecord, now: float, reason: str) -> None:
        """The worker said that it ends: no signal, unless it does not."""
        if worker.state not in (WorkerState.STOPPING, WorkerState.KILLED):
            self.move(worker, WorkerEvent.STOP, reason, now + STOP_GRACE_SECONDS)

    def kill(self, worker: WorkerRecord, reason: str) -> None:
        if worker.state is WorkerState.KILLED:
            return
        self.move(worker, WorkerEvent.KILL, reason)
        self.actions.append(SendSignal(worker.worker, Signal.KILL))

    def dismiss(self, worker: WorkerRecord, seconds: float, now: float, reason: str) -> None:
        """Send a worker away: one that may hold connections drains, another is stopped."""
        if worker.state in MAY_HOLD_CONNECTIONS:
            self.drain(worker, seconds, now, reason)
        else:
            self.stop(worker, now, reason)

    # --- telling people ---------------------------------------------------------------------------------------------

    def warn_of_crash(
        self, worker: WorkerRecord, respawn: Respawn, reason: str, traceback: str, was_open: bool
    ) -> None:
        text = f"generation {worker.generation}: slot {worker.slot}: {reason}; crash {respawn.crashes} in a row"
        if traceback:
            text += "\n" + traceback
        self.actions.append(LogWarning(text))
        if respawn.is_breaker_open and not was_open:
            self.actions.append(
                LogWarning(
                    f"generation {worker.generation}: slot {worker.slot} is in a crash loop; "
                    "trying slowly from now on; roll back or reload with a fix"
                )
            )
