"""Answers to `status`: what is known at once, and, when asked, what holds the draining workers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from handoff.core import control
from handoff.core.messages import Report
from handoff.core.supervisor import Supervisor
from handoff.core.worker import WorkerRecord, WorkerState
from handoff.counters import ADOPTED, CONNECTIONS, IN_PROGRESS, MOVED, REFUSED, REQUESTS, WAITING
from handoff.listeners import ListenerSet
from handoff.master.companions import CompanionDesk
from handoff.master.crew import Crew
from handoff.master.generations import PreparedGeneration
from handoff.master.log import MasterLog
from handoff.version import __version__

REPORT_SECONDS = 1.0
"""How long a draining worker may take to say what holds it; then the status goes out without."""


@dataclass(slots=True)
class _Waiting:
    request: int
    deadline: float
    workers: set[int] = field(default_factory=set)


class StatusDesk:
    """Builds status answers. Borrows everything it is given."""

    def __init__(
        self,
        name: str,
        supervisor: Supervisor,
        crew: Crew,
        listeners: ListenerSet,
        generations: Mapping[int, PreparedGeneration],
        log: MasterLog,
        companions: CompanionDesk,
        answer: Callable[[int, control.AnyAnswer], None],
    ) -> None:
        self._name = name
        self._supervisor = supervisor
        self._crew = crew
        self._listeners = listeners
        self._generations = generations
        self._log = log
        self._companions = companions
        self._answer = answer
        self._started_at = time.monotonic()
        self._waiting: list[_Waiting] = []
        self._next_report = 1

    # --- asking workers ---------------------------------------------------------------------------------------------

    def request(self, number: int, asks_drain: bool, now: float) -> None:
        """Answer the control peer `number`, at once or when the draining workers have reported."""
        waiting = _Waiting(number, now + REPORT_SECONDS)
        if asks_drain:
            for worker in self._supervisor.fleet.workers.values():
                process = self._crew.get(worker.worker)
                if worker.state is WorkerState.DRAINING and process is not None:
                    process.holds = None
                    self._crew.send(worker.worker, Report(request=self._next_report))
                    waiting.workers.add(worker.worker)
            self._next_report += 1
        self._waiting.append(waiting)
        self.check(now)

    def next_deadline(self) -> float | None:
        return min((waiting.deadline for waiting in self._waiting), default=None)

    def check(self, now: float) -> None:
        """Send the answers that are complete or due."""
        for waiting in list(self._waiting):
            if waiting.deadline <= now or all(self._has_reported(worker) for worker in waiting.workers):
                self._waiting.remove(waiting)
                self._answer(waiting.request, self._status(now))

    def _has_reported(self, worker: int) -> bool:
        process = self._crew.get(worker)
        return process is None or process.holds is not None

    # --- the answer -------------------------------------------------------------------------------------------------

    def _status(self, now: float) -> control.StatusAnswer:
        supervisor = self._supervisor
        totals = self._crew.totals()
        return control.StatusAnswer(
            name=self._name,
            pid=os.getpid(),
            release=__version__,
            age_seconds=now - self._started_at,
            is_stopping=supervisor.is_stopping,
            live=supervisor.live,
            previous=supervisor.previous,
            listeners=tuple(
                control.ListenerStatus(name=name, address=address)
                for name, address in self._listeners.addresses(supervisor.live).items()
            ),
            generations=tuple(self._generation(number, now) for number in supervisor.fleet.generations),
            last_verdict=self._last_verdict(),
            moves=control.MovesStatus(
                moved=totals[MOVED],
                waiting=sum(self._crew.counters(process)[WAITING] for process in self._crew),
                adopted=totals[ADOPTED],
                refused=totals[REFUSED],
            ),
            dropped_log_lines=self._log.dropped,
            open_fds=_count_fds(),
            companions=self._companions.statuses(now),
        )

    def _last_verdict(self) -> control.Answer | None:
        verdict = self._supervisor.last_verdict
        if verdict is None:
            return None
        return control.Answer(
            exit_code=verdict.exit_code,
            message=verdict.message,
            generation=verdict.generation,
            traceback=verdict.traceback,
            seconds=verdict.seconds,
        )

    def _generation(self, number: int, now: float) -> control.GenerationStatus:
        record = self._supervisor.fleet.generations[number]
        prepared = self._generations.get(number)
        workers = sorted(self._supervisor.fleet.workers_of(number), key=lambda worker: (worker.slot, worker.worker))
        return control.GenerationStatus(
            generation=number,
            label=record.label,
            state=record.state.value,
            age_seconds=now - record.started_at,
            workers_wanted=record.workers_wanted,
            directory=prepared.pins.directory if prepared else "",
            python=prepared.pins.python if prepared else "",
            app=prepared.pins.settings.runs if prepared else "",
            crash_loop_slots=tuple(slot for slot, respawn in record.respawns.items() if respawn.is_breaker_open),
            workers=tuple(status for worker in workers if (status := self._worker(worker, now)) is not None),
        )

    def _worker(self, worker: WorkerRecord, now: float) -> control.WorkerStatus | None:
        process = self._crew.get(worker.worker)
        if process is None:
            return None
        cells = self._crew.counters(process)
        return control.WorkerStatus(
            worker=worker.worker,
            slot=worker.slot,
            pid=process.pid,
            state=worker.state.value,
            age_seconds=now - worker.started_at,
            connections=cells[CONNECTIONS],
            requests=cells[REQUESTS],
            in_progress=cells[IN_PROGRESS],
            moved=cells[MOVED],
            waiting=cells[WAITING],
            adopted=cells[ADOPTED],
            refused=cells[REFUSED],
            interface=process.interface,
            holds=process.holds.holds if process.holds else (),
            holds_total=process.holds.total if process.holds else 0,
        )


def _count_fds() -> int:
    """-1 where it cannot be told: counting takes an fd."""
    try:
        return len(os.listdir("/proc/self/fd")) - 1
    except OSError:
        return -1
