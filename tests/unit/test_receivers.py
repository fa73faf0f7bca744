"""Who may hand over to whom, in every state of the fleet that matters."""

from __future__ import annotations

from handoff.core.fleet import Fleet
from handoff.core.generation import GenerationState, Timings
from handoff.core.receivers import MAXIMUM_RECEIVERS, accepting, kept_slots, read_slots, receivers
from handoff.core.worker import WorkerState

TIMINGS = Timings(
    workers=2,
    surge=None,
    boot_timeout_seconds=1,
    probation_seconds=1,
    drain_timeout_seconds=1,
    stop_timeout_seconds=1,
    max_generations=3,
)
S = WorkerState


def fleet(*generations: tuple[GenerationState, list[WorkerState]]) -> Fleet:
    """Workers are numbered from 1, over all generations, and fill the slots from 0."""
    made = Fleet()
    for state, workers in generations:
        record = made.new_generation(None, False, 0.0)
        record.timings, record.state, record.workers_wanted = TIMINGS, state, TIMINGS.workers
        for slot, worker_state in enumerate(workers):
            made.spawn(record, slot, 0.0)
            made.workers[len(made.workers)].state = worker_state
    return made


LIVE, DRAINING, BOOTING = GenerationState.LIVE, GenerationState.DRAINING, GenerationState.BOOTING


def test_siblings_hand_over_to_each_other() -> None:
    assert receivers(fleet((LIVE, [S.ACCEPTING, S.ACCEPTING])), 1, False) == {1: (2,), 2: (1,)}


def test_a_draining_generation_hands_over_to_all_of_the_live_one() -> None:
    found = receivers(fleet((DRAINING, [S.DRAINING, S.STOPPING]), (LIVE, [S.ACCEPTING, S.ACCEPTING])), 2, False)
    assert found == {1: (4, 3), 3: (4,), 4: (3,)}


def test_who_does_not_accept_yet_gets_nothing() -> None:
    found = receivers(fleet((LIVE, [S.ACCEPTING, S.BOOTING]), (BOOTING, [S.READY, S.OPENING])), 1, False)
    assert found == {1: ()}


def test_a_sole_worker_that_drains_waits_for_its_replacement() -> None:
    assert receivers(fleet((LIVE, [S.DRAINING])), 1, False) == {}


def test_one_that_accepts_alone_takes_what_lies_in_the_mailboxes_of_others() -> None:
    found = fleet((LIVE, [S.ACCEPTING]))
    assert [worker.worker for worker in accepting(found, 1, False)] == [1]
    assert receivers(found, 1, False) == {1: ()}
    assert accepting(found, 1, True) == []


def test_a_generation_whose_commit_failed_hands_back() -> None:
    found = receivers(fleet((LIVE, [S.ACCEPTING]), (GenerationState.ABORTING, [S.DRAINING])), 1, False)
    assert found == {1: (), 2: (1,)}


def test_a_worker_that_retires_still_accepts_and_keeps_its_connections() -> None:
    found = receivers(fleet((GenerationState.RETIRING, [S.ACCEPTING]), (LIVE, [S.ACCEPTING])), 2, False)
    assert found == {2: ()}


def test_nobody_hands_over_when_the_service_stops() -> None:
    assert receivers(fleet((LIVE, [S.ACCEPTING, S.DRAINING])), 1, True) == {}
    assert receivers(fleet((BOOTING, [S.BOOTING])), None, False) == {}


def test_a_mailbox_is_kept_as_long_as_its_slot_may_have_a_reader() -> None:
    found = fleet((DRAINING, [S.DRAINING, S.DRAINING]), (LIVE, [S.ACCEPTING]), (BOOTING, [S.BOOTING]))
    assert kept_slots(found, 2) == {(2, 0), (2, 1), (3, 0), (3, 1)}, "slot 1 of the live one is respawned"
    assert read_slots(found) == {(2, 0)}


def test_a_scaled_down_slot_is_retired_when_its_worker_drains() -> None:
    found = fleet((LIVE, [S.ACCEPTING, S.ACCEPTING, S.DRAINING]))
    assert kept_slots(found, 1) == {(1, 0), (1, 1)}


def test_of_many_each_gets_some_that_follow_it() -> None:
    found = receivers(fleet((LIVE, [S.ACCEPTING] * 50)), 1, False)
    assert found[1] == tuple(range(2, 2 + MAXIMUM_RECEIVERS))
    assert found[50] == tuple(range(1, 1 + MAXIMUM_RECEIVERS))
    assert all(len(numbers) == MAXIMUM_RECEIVERS for numbers in found.values())
