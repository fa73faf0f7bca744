"""The companions of a service: carries out what handoff.core.companions decides, with a crew of their own."""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import cast

from handoff.core import control, messages
from handoff.core.companions import CompanionEvent, Companions
from handoff.core.vocabulary import (
    Action,
    CompanionsWanted,
    Drain,
    Event,
    LogTransition,
    LogWarning,
    Open,
    SendSignal,
    Spawn,
    StopRequested,
    Tick,
)
from handoff.core.worker import WorkerRecord
from handoff.mailbox import mailbox_pair
from handoff.master.crew import Crew
from handoff.master.generations import PreparedGeneration
from handoff.master.log import MasterLog
from handoff.master.loop import Loop


class CompanionDesk:
    """Owns its processes. `on_transition` writes one line into the log."""

    def __init__(
        self, loop: Loop, log: MasterLog, directory: Path, on_transition: Callable[[LogTransition, int | None], None]
    ) -> None:
        self._log = log
        self._on_transition = on_transition
        self._core = Companions()
        self._events: deque[Event] = deque()
        self.crew = Crew(loop, log, self._events.append, directory)
        self._prepared: PreparedGeneration | None = None
        self._mailbox: socket.socket | None = None
        """One that nobody can write to: connections never move to companions."""

    @property
    def is_empty(self) -> bool:
        return not self._core.fleet.workers

    def next_deadline(self) -> float | None:
        deadlines = [source.next_deadline() for source in (self._core, self.crew)]
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def committed(self, prepared: PreparedGeneration) -> None:
        """The generation is live: its companions take the place of the former's."""
        self._prepared = prepared
        timings = {name: one.timings for name, one in prepared.companions.items()}
        if timings or not self.is_empty:
            self._handle(CompanionsWanted(prepared.generation, timings))

    def stop(self, is_now: bool) -> None:
        self._handle(StopRequested(is_now=is_now))

    def check(self, now: float) -> None:
        """What happened and what is due; called after every turn."""
        self.crew.check(now)
        while self._events:
            self._handle(cast("CompanionEvent", self._events.popleft()))
        self._handle(Tick())
        if self.crew.has_stored:
            prepared = {} if self._prepared is None else self._prepared.companions
            self.crew.keep_stored_of([name for name, one in prepared.items() if one.pins.settings.command])

    def close(self) -> None:
        self.crew.close()
        if self._mailbox is not None:
            self._mailbox.close()
            self._mailbox = None

    def statuses(self, now: float) -> tuple[control.CompanionStatus, ...]:
        running = [self._status(worker, now) for worker in self._core.fleet.workers.values()]
        waiting = [
            control.CompanionStatus(
                name=name, state="waiting", restarts=self._core.crashes(name), runs=self._runs(name)
            )
            for name in self._core.missing()
        ]
        return tuple(sorted((*running, *waiting), key=lambda one: one.name))

    # --- acting -----------------------------------------------------------------------------------------------------

    def _handle(self, event: CompanionEvent) -> None:
        for action in self._core.handle(event, time.monotonic()):
            self._act(action)

    def _act(self, action: Action) -> None:
        match action:
            case Spawn():
                self._spawn(action)
            case Open():
                self.crew.send(action.worker, messages.Open())
            case Drain():
                self.crew.send(action.worker, messages.Drain(seconds=action.seconds))
            case SendSignal():
                self.crew.signal(action.worker, action.signal)
            case LogTransition():
                process = self.crew.get(action.worker) if action.worker is not None else None
                self._on_transition(action, None if process is None else process.pid)
            case LogWarning():
                self._log.warning(action.message)
            case _:
                raise AssertionError(f"no action of companions: {action}")

    def _spawn(self, action: Spawn) -> None:
        prepared = self._prepared
        assert prepared is not None
        assert prepared.generation == action.generation
        companion = prepared.companions[action.companion]
        for listener in companion.listeners.values():  # only one process at a time has them
            os.set_blocking(listener.socket.fileno(), bool(companion.pins.settings.command))
        self.crew.spawn(action, companion.pins, prepared.label, companion.listeners, self._mailbox_fd)

    def _mailbox_fd(self) -> int:
        if self._mailbox is None:
            writer, self._mailbox = mailbox_pair()
            writer.close()
        return self._mailbox.fileno()

    def _status(self, worker: WorkerRecord, now: float) -> control.CompanionStatus:
        process = self.crew.get(worker.worker)
        return control.CompanionStatus(
            name=worker.companion,
            state=worker.state.value,
            generation=worker.generation,
            pid=0 if process is None else process.pid,
            age_seconds=now - worker.started_at,
            restarts=self._core.crashes(worker.companion),
            runs="" if process is None else process.boot.settings.runs,
        )

    def _runs(self, name: str) -> str:
        assert self._prepared is not None
        return self._prepared.companions[name].pins.settings.runs
