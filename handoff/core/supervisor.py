"""The supervisor: decides, from events and the time, what the master does. It does no I/O.

Events change facts; `_reconcile` then compares what is with what should be and asks for the difference.
"""

from __future__ import annotations

from typing import assert_never

from handoff.core.fleet import Fleet
from handoff.core.generation import GenerationEvent, GenerationRecord, GenerationState, Timings
from handoff.core.machine import IllegalTransition
from handoff.core.respawn import STABLE_SECONDS, Respawn
from handoff.core.scaling import Scaling
from handoff.core.vocabulary import (
    Action,
    ClosedSaid,
    Committed,
    Event,
    Exit,
    FailedSaid,
    Forget,
    GenerationStopRequested,
    HelloSaid,
    LeavingSaid,
    LogWarning,
    NotedSaid,
    OpenedSaid,
    Pending,
    Prepare,
    Prepared,
    PrepareFailed,
    ProgressSaid,
    ReadySaid,
    ReloadRequested,
    Said,
    ScaleRequested,
    Signal,
    StopRequested,
    Tick,
    Verdict,
    WorkerBroke,
    WorkerExited,
)
from handoff.core.worker import MAY_HOLD_CONNECTIONS, WorkerEvent, WorkerRecord, WorkerState
from handoff.errors import ExitCode

MAXIMUM_WORKERS = 256
SQUEEZE_SECONDS = 2.0
"""What a generation that is one too many still has: connections move in a fraction of it (one that has only just begun
to drain would lose them all), and short requests end."""
CLOSED_SECONDS = 1.0
"""How long the verdict of a commit waits for the word of the old workers that they accept nobody any more."""
_ROUNDS = 50
"""Reconciling settles within a few rounds; more than this is our mistake."""

_G = GenerationState
_W = WorkerState


class Supervisor:
    """One service's generations and workers. `handle` is the only way in; it returns what is to be done, in order."""

    def __init__(self) -> None:
        self.fleet = Fleet()
        self.live: int | None = None
        self.previous: int | None = None
        """The generation that was live before; a rollback goes back to it."""
        self.is_stopping = False
        self.has_exited = False
        self.last_verdict: Verdict | None = None
        self._pending: Pending | None = None
        self._stop_requests: list[int] = []
        self._scaling = Scaling()
        self._first_failure: Verdict | None = None
        self._now = 0.0

    # --- the way in -------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event. Events of workers that are gone are ignored: they were under way."""
        self._now = now
        self._apply(event, now)
        self._reconcile(now)
        actions, self.fleet.actions = self.fleet.actions, []
        return actions

    def next_deadline(self) -> float | None:
        """When to come back with a Tick, if nothing else happens before."""
        deadlines = list(self.fleet.deadlines())
        record = self._live()
        if record is not None:
            # What is due already waits for room, that is for an exit, and not for the time.
            due_later = (self._not_before(record, slot) for slot in self._missing_slots(record))
            deadlines += [not_before for not_before in due_later if not_before > self._now]
        return min(deadlines, default=None)

    def _apply(self, event: Event, now: float) -> None:
        match event:
            case ReloadRequested():
                self._reload_requested(event, now)
            case ScaleRequested():
                self._scale_requested(event)
            case StopRequested():
                self._stop_requested(event, now)
            case GenerationStopRequested():
                self._generation_stop_requested(event, now)
            case Prepared():
                self._prepared(event, now)
            case PrepareFailed():
                record = self.fleet.generations.get(event.generation)
                if record is not None and record.is_starting:  # a stop may have come in between
                    self._fail(record, event.reason, now, exit_code=event.exit_code)
            case WorkerExited():
                self._exited(event, now)
            case Tick():
                pass
            case _:
                worker = self.fleet.workers.get(event.worker)
                if worker is not None:
                    self._said(worker, event, now)

    # --- what workers say -------------------------------------------------------------------------------------------

    def _said(
        self,
        worker: WorkerRecord,
        event: Said | NotedSaid,
        now: float,
    ) -> None:
        try:
            match event:
                case HelloSaid():
                    self.fleet.move(worker, WorkerEvent.HELLO, deadline=worker.deadline)
                    worker.step = "loading the application"
                case ProgressSaid():
                    worker.step = event.step
                case NotedSaid():
                    self._noted(worker, event.text)
                case ReadySaid():
                    keep = worker.deadline if worker.state is not _W.BOOTING else None
                    self.fleet.move(worker, WorkerEvent.READY, deadline=keep)
                case OpenedSaid():
                    opening = worker.state is _W.OPENING
                    self.fleet.move(
                        worker, WorkerEvent.OPENED, deadline=now + STABLE_SECONDS if opening else worker.deadline
                    )
                    worker.has_accepted |= opening
                case ClosedSaid():
                    worker.has_closed = True
                case LeavingSaid():
                    self._leaving(worker, event.reason, now)
                case FailedSaid():
                    if worker.fills_slot:  # of one that is on its way out the first reason counts
                        worker.failure, worker.traceback = event.reason, event.traceback
                    if worker.state in MAY_HOLD_CONNECTIONS or not event.is_ending:
                        self.fleet.stop(worker, now, event.reason)
                    else:
                        self.fleet.expect_exit(worker, now, event.reason)
                case WorkerBroke():
                    self._broke(worker, event.reason)
                case _:
                    assert_never(event)
        except IllegalTransition as error:
            self._broke(worker, str(error))

    def _noted(self, worker: WorkerRecord, text: str) -> None:
        self.fleet.actions.append(LogWarning(f"worker {worker.worker}: {text}"))
        notes = self.fleet.generations[worker.generation].notes
        if text not in notes:
            notes.append(text)

    def _broke(self, worker: WorkerRecord, reason: str) -> None:
        text = f"worker {worker.worker} broke the protocol: {reason}"
        if worker.fills_slot:
            worker.failure = text
        self.fleet.actions.append(LogWarning(text))
        self.fleet.kill(worker, reason)

    def _leaving(self, worker: WorkerRecord, reason: str, now: float) -> None:
        if not worker.fills_slot:
            return
        record = self.fleet.generations[worker.generation]
        assert record.timings is not None
        if record.is_starting:
            self._fail(record, f"worker {worker.worker} left before the commit: {reason}", now)
        elif worker.state in MAY_HOLD_CONNECTIONS:
            self.fleet.drain(worker, record.timings.drain_timeout_seconds, now, reason)
        else:
            worker.failure = f"worker {worker.worker} left before it accepted: {reason}"
            self.fleet.stop(worker, now, reason)

    def _exited(self, event: WorkerExited, now: float) -> None:
        worker = self.fleet.workers.get(event.worker)
        if worker is None:
            return
        was_unexpected = worker.fills_slot or bool(worker.failure)
        reason = worker.failure or worker.exit_reason(event.how)
        self.fleet.move(worker, WorkerEvent.EXIT, event.how)
        del self.fleet.workers[worker.worker]
        record = self.fleet.generations[worker.generation]
        traceback = worker.traceback or event.post_mortem
        if record.state is _G.ABORTING and not record.traceback:
            record.traceback = traceback
        if record.is_starting:
            self._fail(record, reason, now, traceback)
        elif record.state is _G.LIVE and was_unexpected:
            if not worker.has_accepted:
                self._fail_scale(f"scale: slot {worker.slot}: {reason}; it is tried again")
            respawn = record.respawns.setdefault(worker.slot, Respawn())
            was_open = respawn.is_breaker_open
            respawn.crashed(now)
            self.fleet.warn_of_crash(worker, respawn, reason, traceback, was_open)

    # --- what operators ask -----------------------------------------------------------------------------------------

    def _reload_requested(self, event: ReloadRequested, now: float) -> None:
        requests = [] if event.request is None else [event.request]
        if self.is_stopping or self.has_exited:
            self._answer(requests, ExitCode.ABORTED, "aborted: the service is stopping")
            return
        starting = self.fleet.starting()
        if event.is_rollback and starting is not None and self.live is not None:
            self._rollback_while_starting(starting, requests, now)
            return
        if event.is_rollback and self.previous is None:
            self._answer(requests, ExitCode.REFUSED, "rollback: there is no previous generation to go back to")
            return
        pending = Pending(event.label, event.is_rollback, requests)
        if self._pending is not None and self._pending.is_rollback == event.is_rollback:
            pending.requests = self._pending.requests + requests  # one reload serves them all; the latest label wins
            if event.label is None:  # a signal names no version
                pending.label = self._pending.label
        else:
            self._drop_pending("superseded by a later request")
        self._pending = pending

    def _rollback_while_starting(self, starting: GenerationRecord, requests: list[int], now: float) -> None:
        """What starts is aborted, and that is the rollback; but a rollback that starts already serves this one too."""
        self._drop_pending("superseded by a rollback")
        if starting.is_rollback:
            starting.requests.extend(requests)
            return
        reason = f"generation {starting.generation} was aborted by a rollback"
        self._fail(starting, reason, now, exit_code=ExitCode.ABORTED)
        self._answer(requests, ExitCode.DONE, f"{reason}; generation {self.live} stays live", self.live)

    def _drop_pending(self, reason: str) -> None:
        if self._pending is not None:
            self._answer(self._pending.requests, ExitCode.REFUSED, f"refused: {reason}")
            self._pending = None

    def _scale_requested(self, event: ScaleRequested) -> None:
        requests = [] if event.request is None else [event.request]
        record = self._live()
        if record is None or record.timings is None or self.is_stopping:
            self._answer(requests, ExitCode.REFUSED, "scale: no generation is live", is_reload=False)
            return
        wanted = event.workers if event.workers is not None else record.workers_wanted + event.change
        if not 1 <= wanted <= MAXIMUM_WORKERS:
            text = f"scale: {wanted} workers: must be between 1 and {MAXIMUM_WORKERS}"
            self._answer(requests, ExitCode.REFUSED, text, is_reload=False)
            return
        record.workers_wanted = wanted
        superseded = self._scaling.ask(wanted, record.timings.workers, requests)
        self._answer(superseded, ExitCode.REFUSED, "scale: superseded by a later one", is_reload=False)

    def _stop_requested(self, event: StopRequested, now: float) -> None:
        requests = [] if event.request is None else [event.request]
        if self.has_exited:
            self._answer(requests, ExitCode.DONE, "stopped", is_reload=False)
            return
        self._stop_requests += requests
        is_now = event.is_now or self.is_stopping
        self.is_stopping = True
        if self._pending is not None:
            self._answer(self._pending.requests, ExitCode.ABORTED, "aborted: the service is stopping")
            self._pending = None
        for record in list(self.fleet.generations.values()):
            self._stop_generation(record, "the service is stopping", now, is_now)

    def _generation_stop_requested(self, event: GenerationStopRequested, now: float) -> None:
        requests = [] if event.request is None else [event.request]
        record = self.fleet.generations.get(event.generation)
        if record is None:
            known = ", ".join(map(str, self.fleet.generations)) or "none"
            text = f"stop: no generation {event.generation}; there are: {known}"
            self._answer(requests, ExitCode.REFUSED, text, is_reload=False)
        elif record.state in (_G.LIVE, _G.RETIRING):
            text = f"stop: generation {event.generation} serves; stop the service, or reload it"
            self._answer(requests, ExitCode.REFUSED, text, is_reload=False)
        else:
            self._stop_generation(record, "stopped by the operator", now, event.is_now or not record.is_starting)
            text = f"generation {event.generation} is being stopped"
            self._answer(requests, ExitCode.DONE, text, event.generation, is_reload=False)

    def _stop_generation(self, record: GenerationRecord, reason: str, now: float, is_now: bool) -> None:
        if record.is_starting:
            self._fail(record, reason, now, exit_code=ExitCode.ABORTED)
        elif record.state in (_G.LIVE, _G.RETIRING):
            self.fleet.move_generation(record, GenerationEvent.STOPPED, reason)
        seconds = 0.0 if is_now or record.timings is None else record.timings.stop_timeout_seconds
        for worker in self.fleet.workers_of(record.generation):
            self.fleet.dismiss(worker, seconds, now, reason)

    # --- a generation's start and failure ---------------------------------------------------------------------------

    def _prepared(self, event: Prepared, now: float) -> None:
        record = self.fleet.generations.get(event.generation)
        if record is None or not record.is_starting:
            return  # a stop came in between
        record.timings, record.label = event.timings, event.label
        record.workers_wanted = self._scaling.workers(event.timings.workers)
        self.fleet.move_generation(record, GenerationEvent.PREPARED)
        room = self._room(record)
        if room < record.wave:
            text = f"generation {record.generation}: the surge leaves room for {room} workers; waits for drains to end"
            self.fleet.actions.append(LogWarning(text))

    def _drop_stale_scale(self, timings: Timings) -> None:
        """Only at the commit: a reload that is rolled back changes nothing."""
        dropped = self._scaling.drop_stale(timings.workers)
        if dropped is not None:
            text, requests = dropped
            self.fleet.actions.append(LogWarning(text))
            self._answer(requests, ExitCode.REFUSED, text, is_reload=False)

    def _squeeze(self, now: float) -> None:
        """Generations are capped: while there are too many, the oldest that drain are to end soon."""
        starting = self.fleet.starting()
        record = starting if starting is not None and starting.timings is not None else self._live()
        if record is None or record.timings is None:
            return
        limit = record.timings.max_generations
        leaving = self.fleet.in_state(_G.DRAINING, _G.ABORTING)
        for oldest in leaving[: max(0, len(self.fleet.generations) - limit)]:
            if oldest.is_squeezed:
                continue
            oldest.is_squeezed = True
            reason = f"more than {limit} generations"
            text = f"generation {oldest.generation} is ended early: {reason}; reloads come faster than drains end"
            self.fleet.actions.append(LogWarning(text))
            for worker in self.fleet.workers_of(oldest.generation):
                self.fleet.dismiss(worker, SQUEEZE_SECONDS, now, reason)

    def _fail(
        self,
        record: GenerationRecord,
        reason: str,
        now: float,
        traceback: str = "",
        exit_code: ExitCode = ExitCode.FAILED,
    ) -> None:
        record.failure, record.traceback, record.exit_code = reason, traceback, exit_code
        self.fleet.move_generation(record, GenerationEvent.FAILED, reason)
        seconds = record.timings.drain_timeout_seconds if record.timings is not None else 0.0
        for worker in self.fleet.workers_of(record.generation):
            self.fleet.dismiss(worker, seconds, now, reason)

    # --- reconciling ------------------------------------------------------------------------------------------------

    def _reconcile(self, now: float) -> None:
        for _ in range(_ROUNDS):
            before = len(self.fleet.actions)
            for worker in list(self.fleet.workers.values()):
                if worker.deadline is not None and worker.deadline <= now:
                    self._expire(worker, now)
            for record in list(self.fleet.generations.values()):
                self._step(record, now)
            self._squeeze(now)
            self._start_pending(now)
            self._answer_scale()
            self._finish()
            if len(self.fleet.actions) == before:
                return
        raise AssertionError("reconciling does not settle")

    def _expire(self, worker: WorkerRecord, now: float) -> None:
        match worker.state:
            case _W.STARTING | _W.BOOTING:
                seconds = round(now - worker.started_at, 1)
                worker.failure = f"worker {worker.worker} was not ready after {seconds} s; it was {worker.step}"
                self.fleet.stop(worker, now, "boot timeout", Signal.DUMP)
            case _W.OPENING:
                worker.failure = f"worker {worker.worker} did not begin to accept"
                self.fleet.stop(worker, now, "no confirmation", Signal.DUMP)
            case _W.ACCEPTING:
                worker.deadline = None
                self.fleet.generations[worker.generation].respawns.pop(worker.slot, None)
            case _W.DRAINING:
                self.fleet.stop(worker, now, "drain deadline")
            case _W.STOPPING:
                self.fleet.kill(worker, "did not end")
            case _W.READY | _W.KILLED | _W.EXITED:
                raise AssertionError(f"{worker.state.name} has no deadline")
            case _:
                assert_never(worker.state)

    def _step(self, record: GenerationRecord, now: float) -> None:
        match record.state:
            case _G.PREPARING | _G.GONE:
                pass
            case _G.BOOTING:
                self._boot(record, now)
            case _G.PROBATION:
                if record.deadline is not None and record.deadline <= now:
                    self._end_probation(record, now)
            case _G.OPENING:
                if self.fleet.count(record.generation, _W.ACCEPTING) >= record.wave:
                    self._commit(record, now)
            case _G.LIVE:
                self._populate(record, now)
                self._retire_older(record, now)
                self._confirm(record, now)
            case _G.RETIRING:
                self._confirm(record, now)
                if not any(worker.fills_slot for worker in self.fleet.workers_of(record.generation)):
                    self.fleet.move_generation(record, GenerationEvent.RETIRED)
            case _G.DRAINING | _G.ABORTING:
                self._confirm(record, now)
                self._wind_up(record, now)
            case _:
                assert_never(record.state)

    def _boot(self, record: GenerationRecord, now: float) -> None:
        assert record.timings is not None
        spawned = len(self.fleet.workers_of(record.generation))  # an exit fails a generation that boots
        for slot in range(spawned, min(record.wave, spawned + self._room(record))):
            self.fleet.spawn(record, slot, now, yields=self.live is not None)
        if self.fleet.count(record.generation, _W.READY) >= record.wave:
            self.fleet.move_generation(record, GenerationEvent.ALL_READY)
            record.deadline = now + record.timings.probation_seconds

    def _end_probation(self, record: GenerationRecord, now: float) -> None:
        if self.fleet.count(record.generation, _W.READY) < record.wave:
            record.deadline = None  # one of them failed and is ending: its exit fails the generation
            return
        self.fleet.move_generation(record, GenerationEvent.SURVIVED)
        for worker in self.fleet.workers_of(record.generation):
            self.fleet.open(worker, now)

    def _commit(self, record: GenerationRecord, now: float) -> None:
        assert record.timings is not None
        self.fleet.move_generation(record, GenerationEvent.ALL_OPENED)
        record.committed_at = now
        opened = record.wave
        self._drop_stale_scale(record.timings)
        record.workers_wanted = self._scaling.workers(
            record.timings.workers
        )  # a scale may have come since it was prepared
        superseded = self._live()
        if superseded is not None:
            self.previous = superseded.generation
            self.fleet.move_generation(superseded, GenerationEvent.SUPERSEDED)
        self.live = record.generation
        self.fleet.actions.append(Committed(record.generation, self.previous))
        text = f"generation {record.generation} is live"
        if opened < record.workers_wanted:
            text += f" with {opened} of {record.workers_wanted} workers; the others follow"
        record.news = "; ".join((text, *record.notes))
        record.deadline = now + CLOSED_SECONDS

    def _confirm(self, record: GenerationRecord, now: float) -> None:
        """Give the verdict of a commit: as soon as no new connection can reach the workers that drain."""
        if record.committed_at is None or record.is_verdict_given:
            return
        silent = self.fleet.not_closed_before(record.generation)
        is_late = now >= record.committed_at + CLOSED_SECONDS
        if silent and record.state is _G.LIVE and not is_late:
            return
        if silent and is_late:
            whose = ", ".join(f"worker {number}" for number in silent)
            record.news += f"; it is not known yet that the old accept nobody any more: {whose}"
        if record.state is _G.LIVE:
            record.deadline = None
        self._give_verdict(record, ExitCode.DONE, record.news, now)

    def _populate(self, record: GenerationRecord, now: float) -> None:
        """Fill the slots that are missing, let in who is ready, and send away who is too many."""
        self._send_away_surplus(record, now)
        for worker in self.fleet.workers_of(record.generation):
            if worker.state is _W.READY:
                self.fleet.open(worker, now)
        due = [slot for slot in self._missing_slots(record) if self._not_before(record, slot) <= now]
        for slot in due[: self._room(record)]:
            self.fleet.spawn(record, slot, now)

    def _send_away_surplus(self, record: GenerationRecord, now: float) -> None:
        """Highest slots first; one that accepts stays while the slots that are wanted do not all accept."""
        assert record.timings is not None
        accepting = self.fleet.count(record.generation, _W.ACCEPTING)
        surplus = [
            worker
            for worker in self.fleet.workers_of(record.generation)
            if worker.slot >= record.workers_wanted and worker.fills_slot
        ]
        for worker in sorted(surplus, key=lambda worker: -worker.slot):
            if worker.state is _W.ACCEPTING:
                if accepting <= record.workers_wanted:
                    continue
                accepting -= 1
            self.fleet.dismiss(worker, record.timings.drain_timeout_seconds, now, "scaled down")

    def _missing_slots(self, record: GenerationRecord) -> list[int]:
        filled = {worker.slot for worker in self.fleet.workers_of(record.generation) if worker.holds_slot}
        return [slot for slot in range(record.workers_wanted) if slot not in filled]

    def _not_before(self, record: GenerationRecord, slot: int) -> float:
        respawn = record.respawns.get(slot)
        return 0.0 if respawn is None else respawn.not_before

    def _room(self, record: GenerationRecord) -> int:
        """How many workers may be added: while a surge goes on, only as many as keep memory from doubling."""
        assert record.timings is not None
        is_surging = record.is_starting or bool(self.fleet.in_state(_G.RETIRING))
        if record.timings.surge is None or not is_surging:
            return MAXIMUM_WORKERS
        if self.fleet.starting() not in (None, record):
            return 0  # what starts will replace this one too, so it goes first
        live = self._live()
        wanted = record.workers_wanted if live is None else max(record.workers_wanted, live.workers_wanted)
        return max(0, wanted + record.timings.surge - len(self.fleet.workers))

    def _retire_older(self, live: GenerationRecord, now: float) -> None:
        """Each new worker that accepts retires one old; without a surge all have gone over at once.

        Those that do not accept go at once: they would never be let in, and must not stand in for one that serves.
        """
        older = [
            worker
            for record in self.fleet.in_state(_G.RETIRING)
            for worker in self.fleet.workers_of(record.generation)
            if worker.fills_slot
        ]
        older.sort(key=lambda worker: worker.state is _W.ACCEPTING)
        idle = sum(worker.state is not _W.ACCEPTING for worker in older)
        keep = 0
        if live.timings is not None and live.timings.surge is not None:
            keep = max(0, live.workers_wanted - self.fleet.count(live.generation, _W.ACCEPTING))
        for worker in older[: max(idle, len(older) - keep)]:
            timings = self.fleet.generations[worker.generation].timings
            assert timings is not None
            self.fleet.dismiss(worker, timings.drain_timeout_seconds, now, f"generation {live.generation} is live")

    def _wind_up(self, record: GenerationRecord, now: float) -> None:
        workers = self.fleet.workers_of(record.generation)
        is_settled = all(worker.state is _W.DRAINING for worker in workers)
        if record.state is _G.ABORTING and is_settled and not record.is_verdict_given:
            self._rolled_back(record, now)
        if not workers:
            self.fleet.move_generation(record, GenerationEvent.EMPTIED)
            del self.fleet.generations[record.generation]
            self.fleet.actions.append(Forget(record.generation))

    def _rolled_back(self, record: GenerationRecord, now: float) -> None:
        if self.live is None:
            text = record.failure
            code = ExitCode(record.exit_code)
        else:
            is_abort = record.exit_code == ExitCode.ABORTED
            code = ExitCode.ABORTED if is_abort else ExitCode.ROLLED_BACK
            text = f"{'aborted' if is_abort else 'rolled back'}: {record.failure}"
            if not self.is_stopping:
                text += f"; generation {self.live} stays live"
        self._give_verdict(record, code, text, now)
        if self.live is None:
            self._first_failure = self.last_verdict

    def _start_pending(self, now: float) -> None:
        if self._pending is None or self.is_stopping or self.fleet.starting() is not None:
            return
        if self.live is None and self.fleet.generations:
            return  # the first boot failed: the master ends
        if self._first_failure is not None:
            return
        pending, self._pending = self._pending, None
        record = self.fleet.new_generation(pending.label, pending.is_rollback, now)
        record.requests = pending.requests
        source = self.previous if pending.is_rollback else None
        self.fleet.actions.append(Prepare(record.generation, source, pending.label))

    def _answer_scale(self) -> None:
        record = self._live()
        if record is None or not self._scaling.is_waited_for:
            return
        workers = [worker for worker in self.fleet.workers_of(record.generation) if worker.fills_slot]
        accepting = sum(worker.state is _W.ACCEPTING for worker in workers)
        if accepting == len(workers) == record.workers_wanted:
            requests = self._scaling.take_requests()
            self._answer(requests, ExitCode.DONE, f"{accepting} workers accept", record.generation, is_reload=False)

    def _fail_scale(self, text: str) -> None:
        self._answer(self._scaling.take_requests(), ExitCode.FAILED, text, is_reload=False)

    def _finish(self) -> None:
        if self.has_exited or self.fleet.workers or self.fleet.starting() is not None:
            return
        if self.is_stopping:
            self.has_exited = True
            requests = self._scaling.take_requests()
            self._answer(requests, ExitCode.ABORTED, "aborted: the service is stopping", is_reload=False)
            self._answer(self._stop_requests, ExitCode.DONE, "stopped", is_reload=False)
            self.fleet.actions.append(Exit(ExitCode.DONE, "stopped"))
        elif self._first_failure is not None:
            self.has_exited = True
            if self._pending is not None:
                self._answer(self._pending.requests, ExitCode.FAILED, self._first_failure.message)
            self.fleet.actions.append(Exit(self._first_failure.exit_code, self._first_failure.message))

    # --- verdicts ---------------------------------------------------------------------------------------------------

    def _live(self) -> GenerationRecord | None:
        record = self.fleet.generations.get(self.live) if self.live is not None else None
        return record if record is not None and record.state is _G.LIVE else None

    def _give_verdict(self, record: GenerationRecord, code: ExitCode, text: str, now: float) -> None:
        assert not record.is_verdict_given, "one verdict for each reload"
        record.is_verdict_given = True
        seconds = now - record.started_at
        verdict = Verdict(tuple(record.requests), code, text, record.generation, record.traceback, seconds)
        if self.last_verdict is None or (self.last_verdict.generation or 0) <= record.generation:
            self.last_verdict = verdict  # a commit waits for the old workers; the next reload may have failed by then
        self.fleet.actions.append(verdict)

    def _answer(
        self, requests: list[int], code: ExitCode, text: str, generation: int | None = None, is_reload: bool = True
    ) -> None:
        if requests:
            self.fleet.actions.append(Verdict(tuple(requests), code, text, generation, is_reload=is_reload))
