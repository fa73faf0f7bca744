"""Who may hand connections over to whom."""

from __future__ import annotations

from handoff.core.fleet import Fleet
from handoff.core.worker import WorkerRecord, WorkerState

Slot = tuple[int, int]
"""(generation, slot): what has a mailbox."""

MAXIMUM_RECEIVERS = 32
"""Enough to spread over; each is an fd in every worker that may hand over to it."""
_READS = frozenset({WorkerState.OPENING, WorkerState.ACCEPTING})


def accepting(fleet: Fleet, live: int | None, is_stopping: bool) -> list[WorkerRecord]:
    """Who takes connections, in the order of their slots."""
    if live is None or is_stopping:
        return []
    found = (worker for worker in fleet.workers_of(live) if worker.state is WorkerState.ACCEPTING)
    return sorted(found, key=lambda worker: worker.slot)


def receivers(fleet: Fleet, live: int | None, is_stopping: bool) -> dict[int, tuple[int, ...]]:
    """For each worker that may hand over, the workers that take: those of the live generation that accept.

    A draining worker hands over everything, an accepting one what is above its share. Nobody does once the service
    stops: there is nobody who stays.
    """
    takers = accepting(fleet, live, is_stopping)
    if not takers:
        return {}
    givers = takers + [one for one in fleet.workers.values() if one.state is WorkerState.DRAINING]
    return {giver.worker: _nearest(giver, takers) for giver in givers}


def _nearest(giver: WorkerRecord, takers: list[WorkerRecord]) -> tuple[int, ...]:
    """Beginning with the next slot, and around: where there are more than enough, not all givers take the same."""
    later = [one.worker for one in takers if one.slot > giver.slot]
    earlier = [one.worker for one in takers if one.slot <= giver.slot and one is not giver]
    return tuple((later + earlier)[:MAXIMUM_RECEIVERS])


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
