"""Companions: single processes beside the workers, one of a name at a time, of the generation that is live.

Old before new: the one of the former generation has ended before its successor is started. A companion that dies is
started again, with back-off; nothing of that touches the workers. No I/O.
"""

from __future__ import annotations

from handoff.core.fleet import Fleet
from handoff.core.generation import CompanionTimings
from handoff.core.machine import IllegalTransition
from handoff.core.respawn import STABLE_SECONDS, Respawn
from handoff.core.vocabulary import (
    Action,
    ClosedSaid,
    CompanionsWanted,
    FailedSaid,
    HelloSaid,
    LeavingSaid,
    LogWarning,
    OpenedSaid,
    ProgressSaid,
    ReadySaid,
    Said,
    Signal,
    StopRequested,
    Tick,
    WorkerBroke,
    WorkerExited,
)
from handoff.core.worker import WorkerEvent, WorkerRecord, WorkerState

_W = WorkerState

CompanionEvent = CompanionsWanted | StopRequested | Said | WorkerExited | Tick


class Companions:
    """`handle` is the only way in; it returns what is to be done, in order."""

    def __init__(self) -> None:
        self.fleet = Fleet()
        self.is_stopping = False
        self._wanted = CompanionsWanted(0, {})
        self._timings: dict[int, CompanionTimings] = {}
        """Of each process, those that it was started with."""
        self._respawns: dict[str, Respawn] = {}
        self._now = 0.0

    def handle(self, event: CompanionEvent, now: float) -> list[Action]:
        self._now = now
        match event:
            case CompanionsWanted():
                self._wanted = event
                self._respawns.clear()  # other code: it gets its own chances
            case StopRequested():
                self._stop(event, now)
            case WorkerExited():
                self._exited(event, now)
            case Tick():
                pass
            case _:
                worker = self.fleet.workers.get(event.worker)
                if worker is not None:
                    self._said(worker, event, now)
        self._reconcile(now)
        actions, self.fleet.actions = self.fleet.actions, []
        return actions

    def next_deadline(self) -> float | None:
        deadlines = list(self.fleet.deadlines())
        deadlines += [at for name in self._missing() if (at := self._not_before(name)) > self._now]
        return min(deadlines, default=None)

    def crashes(self, name: str) -> int:
        """In a row, up to now."""
        return self._respawns[name].crashes if name in self._respawns else 0

    def missing(self) -> list[str]:
        """Those that are wanted and wait to be started again."""
        return [] if self.is_stopping else self._missing()

    # --- what happens -----------------------------------------------------------------------------------------------

    def _said(self, worker: WorkerRecord, event: Said, now: float) -> None:
        try:
            match event:
                case HelloSaid():
                    self.fleet.move(worker, WorkerEvent.HELLO, deadline=worker.deadline)
                    worker.step = "loading"
                case ProgressSaid():
                    worker.step = event.step
                case ReadySaid():
                    keep = worker.deadline if worker.state is not _W.BOOTING else None
                    self.fleet.move(worker, WorkerEvent.READY, deadline=keep)
                    if worker.state is _W.READY:
                        self.fleet.open(worker, now)
                case OpenedSaid():
                    deadline = now + STABLE_SECONDS if worker.state is _W.OPENING else worker.deadline
                    self.fleet.move(worker, WorkerEvent.OPENED, deadline=deadline)
                case ClosedSaid():
                    pass
                case LeavingSaid():
                    if worker.fills_slot:
                        worker.failure = event.reason
                        self._dismiss(worker, now, event.reason)
                case FailedSaid():
                    if worker.fills_slot:
                        worker.failure, worker.traceback = event.reason, event.traceback
                        self.fleet.stop(worker, now, event.reason)
                case WorkerBroke():
                    self._broke(worker, event.reason)
        except IllegalTransition as error:
            self._broke(worker, str(error))

    def _broke(self, worker: WorkerRecord, reason: str) -> None:
        if worker.fills_slot:
            worker.failure = f"broke the protocol: {reason}"
        self.fleet.kill(worker, reason)

    def _exited(self, event: WorkerExited, now: float) -> None:
        worker = self.fleet.workers.get(event.worker)
        if worker is None:
            return
        was_unexpected = worker.fills_slot or bool(worker.failure)
        reason = worker.failure or event.how
        self.fleet.move(worker, WorkerEvent.EXIT, event.how)
        del self.fleet.workers[worker.worker], self._timings[worker.worker]
        if not was_unexpected or self.is_stopping or not self._is_wanted(worker):
            return
        respawn = self._respawns.setdefault(worker.companion, Respawn())
        respawn.crashed(now)
        text = f"companion {worker.companion}: {reason}; crash {respawn.crashes} in a row"
        trace = worker.traceback or event.post_mortem
        self.fleet.actions.append(LogWarning(f"{text}\n{trace}" if trace else text))

    def _stop(self, event: StopRequested, now: float) -> None:
        self.is_stopping = True
        if event.is_now:
            for worker in list(self.fleet.workers.values()):
                self.fleet.dismiss(worker, 0.0, now, "the service is stopping at once")

    # --- what is, and what should be --------------------------------------------------------------------------------

    def _reconcile(self, now: float) -> None:
        for worker in list(self.fleet.workers.values()):
            if worker.deadline is not None and worker.deadline <= now:
                self._expire(worker, now)
            if worker.fills_slot and self.is_stopping:
                self._dismiss(worker, now, "the service is stopping")
            elif worker.fills_slot and not self._is_wanted(worker):
                self._dismiss(worker, now, f"generation {self._wanted.generation} is live")
        for name in self.missing():
            if self._not_before(name) <= now:
                timings = self._wanted.timings[name]
                self.fleet.spawn_companion(name, self._wanted.generation, timings.boot_timeout_seconds, now)
                self._timings[max(self.fleet.workers)] = timings

    def _is_wanted(self, worker: WorkerRecord) -> bool:
        return worker.generation == self._wanted.generation and worker.companion in self._wanted.timings

    def _missing(self) -> list[str]:
        there = {worker.companion for worker in self.fleet.workers.values()}
        return [name for name in self._wanted.timings if name not in there]

    def _not_before(self, name: str) -> float:
        respawn = self._respawns.get(name)
        return 0.0 if respawn is None else respawn.not_before

    def _dismiss(self, worker: WorkerRecord, now: float, reason: str) -> None:
        self.fleet.dismiss(worker, self._timings[worker.worker].stop_timeout_seconds, now, reason)

    def _expire(self, worker: WorkerRecord, now: float) -> None:
        match worker.state:
            case _W.STARTING | _W.BOOTING | _W.OPENING:
                worker.failure = f"was not ready after {round(now - worker.started_at, 1)} s; it was {worker.step}"
                self.fleet.stop(worker, now, "boot timeout", Signal.DUMP)
            case _W.ACCEPTING:
                worker.deadline = None
                self._respawns.pop(worker.companion, None)
            case _W.DRAINING:
                self.fleet.stop(worker, now, "stop deadline")
            case _W.STOPPING:
                self.fleet.kill(worker, "did not end")
            case _:
                raise AssertionError(f"{worker.state.name} has no deadline")
