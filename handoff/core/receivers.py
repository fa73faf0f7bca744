"""Who may hand connections over to whom."""

from __future__ import annotations

from handoff.core.fleet import Fleet
from handoff.core.worker import WorkerState

Slot = tuple[int, int]
"""(generation, slot): what has a mailbox."""

_READS = frozenset({WorkerState.OPENING, WorkerState.ACCEPTING})


def receivers(fleet: Fleet, live: int | None, is_stopping: bool) -> dict[int, tuple[int, ...]]:
    """For each worker that may hand over, the workers that take: those of the live generation that accept.

    A draining worker hands over everything, an accepting one what is above its share. Nobody does once the service
    stops: there is nobody who stays.
    """
    if live is None or is_stopping:
        return {}
    accepting = sorted(
        (worker for worker in fleet.workers_of(live) if worker.state is WorkerState.ACCEPTING),
        key=lambda worker: worker.slot,
    )
    numbers = [worker.worker for worker in accepting]
    givers = numbers + [one.worker for one in fleet.workers.values() if one.state is WorkerState.DRAINING]
    return {giver: tuple(number for number in numbers if number != giver) for giver in givers}


def read_slots(fleet: Fleet) -> set[Slot]:
    """The slots whose mailbox a worker reads."""
    return {(worker.generation, worker.slot) for worker in fleet.workers.values() if worker.state in _READS}


def kept_slots(fleet: Fleet, live: int | None) -> set[Slot]:
    """The slots whose mailbox a worker reads, or will: the others are retired for good."""
    kept = {(worker.generation, worker.slot) for worker in fleet.workers.values() if worker.fills_slot}
    for record in fleet.generations.values():
        if record.is_starting or record.generation == live:
            kept |= {(record.generation, slot) for slot in range(record.workers_wanted)}
    return kept
