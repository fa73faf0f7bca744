"""Listeners with a socket for each slot: new connections go where somebody serves, and no socket is left alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from handoff.binding import Listener
from handoff.core.messages import AlsoAccept, SlotSocket
from handoff.core.steering import plan
from handoff.core.supervisor import Supervisor
from handoff.core.worker import WorkerState
from handoff.counters import HEARTBEAT
from handoff.master.crew import Crew
from handoff.master.generations import PreparedGeneration
from handoff.master.log import MasterLog
from handoff.rights import MAXIMUM_FDS

HUNG_SECONDS = 3.0
"""A worker whose event loop did not turn for this long is steered away from, until it turns again."""
LOOK_SECONDS = 0.5
RETRY_SECONDS = 0.05


@dataclass(slots=True)
class _Heart:
    beats: int
    seen_at: float


@dataclass(slots=True)
class _Told:
    """What one worker was told to accept from, beside its own sockets."""

    sockets: tuple[tuple[str, int], ...] = ()


@dataclass(slots=True)
class _Wanted:
    sockets: list[tuple[str, int]] = field(default_factory=list)
    listeners: dict[tuple[str, int], Listener] = field(default_factory=dict)


class SlotDesk:
    """One service's. Borrows what it is given."""

    def __init__(
        self, supervisor: Supervisor, crew: Crew, generations: Mapping[int, PreparedGeneration], log: MasterLog
    ) -> None:
        self._supervisor = supervisor
        self._crew = crew
        self._generations = generations
        self._log = log
        self._hearts: dict[int, _Heart] = {}
        self._told: dict[int, _Told] = {}
        self._steered: dict[Listener, tuple[int, ...]] = {}
        self._look_at: float | None = None
        self._facts: tuple[object, ...] = ()

    def next_deadline(self) -> float | None:
        return self._look_at

    def check(self, now: float) -> None:
        """Bring programs and workers up to date with the supervisor's facts; called after every turn."""
        listeners = self._listeners()
        self._steered = {listener: slots for listener, slots in self._steered.items() if listener in listeners}
        if not listeners:
            self._look_at, self._facts = None, ()
            return
        if self._look_at is None or self._look_at <= now:
            self._look_at = now + LOOK_SECONDS
        serving = self._serving(now)
        facts = (serving, *((listener, len(listener.slots or ())) for listener in listeners))
        if facts != self._facts:
            self._facts = facts
            self._apply(listeners, serving)

    def _listeners(self) -> list[Listener]:
        """Those with a socket for each slot that any generation holds."""
        found: dict[Listener, None] = {}
        for number in self._supervisor.fleet.generations:
            prepared = self._generations.get(number)
            for listener in () if prepared is None else prepared.listeners.values():
                if listener.slots is not None and listener.socket.fileno() >= 0:
                    found[listener] = None
        return list(found)

    def _serving(self, now: float) -> dict[int, int]:
        """The slots of the workers that accept and do not hang."""
        accepting = [
            worker for worker in self._supervisor.fleet.workers.values() if worker.state is WorkerState.ACCEPTING
        ]
        hearts = {}
        for worker in accepting:
            process = self._crew.get(worker.worker)
            if process is None:
                continue
            beats = self._crew.counters(process)[HEARTBEAT]
            heart = self._hearts.get(worker.worker)
            hearts[worker.worker] = heart if heart is not None and heart.beats == beats else _Heart(beats, now)
        self._hearts = hearts
        slots = {worker.worker: worker.slot for worker in accepting if worker.worker in hearts}
        lively = {one: slot for one, slot in slots.items() if now - hearts[one].seen_at < HUNG_SECONDS}
        return lively or slots

    def _apply(self, listeners: list[Listener], serving: Mapping[int, int]) -> None:
        wanted: dict[int, _Wanted] = {}
        for listener in listeners:
            names = {worker: name for worker in serving if (name := self._name(worker, listener)) is not None}
            made = plan({worker: serving[worker] for worker in names}, range(len(listener.slots or ())))
            if made is None:
                continue
            self._steer(listener, made.steered)
            for worker, slots in made.adopted.items():
                one = wanted.setdefault(worker, _Wanted())
                for slot in slots:
                    one.sockets.append((names[worker], slot))
                    one.listeners[names[worker], slot] = listener
        for worker in {*wanted, *self._told}:
            self._tell(worker, wanted.get(worker, _Wanted()))

    def _name(self, worker: int, listener: Listener) -> str | None:
        """What the worker's generation calls the listener; None where it does not have it."""
        prepared = self._generations.get(self._supervisor.fleet.workers[worker].generation)
        mapping = {} if prepared is None else prepared.listeners
        return next((name for name, one in mapping.items() if one is listener), None)

    def _steer(self, listener: Listener, slots: tuple[int, ...]) -> None:
        if self._steered.get(listener) == slots or listener.slots is None:
            return
        try:
            listener.slots.steer(slots)
        except OSError as error:  # the kernel spreads by a hash then; siblings accept from every socket all the same
            self._log.warning("new connections cannot be steered", listener=listener.name, reason=error.strerror)
        self._steered[listener] = slots

    def _tell(self, worker: int, wanted: _Wanted) -> None:
        if self._crew.get(worker) is None:
            self._told.pop(worker, None)
            return
        told = self._told.setdefault(worker, _Told())
        fresh = [one for one in wanted.sockets if one not in told.sockets]
        later = set(fresh[MAXIMUM_FDS:])  # one message takes no more; the rest follows at once
        sockets = tuple(one for one in wanted.sockets if one not in later)
        if later:
            self._facts, self._look_at = (), time.monotonic()
        if sockets == told.sockets:
            return
        infos = tuple(SlotSocket(name, slot, (name, slot) not in told.sockets) for name, slot in sockets)
        fds = [wanted.listeners[info.name, info.slot].socket_of(info.slot).fileno() for info in infos if info.is_new]
        if self._crew.pass_on(worker, AlsoAccept(sockets=infos, fds=len(fds)), fds):
            told.sockets = sockets
        else:
            self._facts, self._look_at = (), time.monotonic() + RETRY_SECONDS
