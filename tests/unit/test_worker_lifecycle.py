"""The whole product of worker states and events."""

from __future__ import annotations

import itertools

import pytest

from handoff.core.fleet import DRAIN_GRACE_SECONDS, NOW_GRACE_SECONDS, Fleet
from handoff.core.generation import Timings
from handoff.core.machine import IllegalTransition
from handoff.core.worker import (
    MAY_HOLD_CONNECTIONS,
    SERVES_OR_WILL,
    WORKER_TABLE,
    WorkerEvent,
    WorkerRecord,
    WorkerState,
)

DOCUMENTED = """
            hello     ready     open     opened     drain     stop      kill    exit
starting    booting   -         -        -          -         stopping  killed  exited
booting     -         ready     -        -          -         stopping  killed  exited
ready       -         -         opening  -          draining  stopping  killed  exited
opening     -         -         -        accepting  draining  stopping  killed  exited
accepting   -         -         -        -          draining  stopping  killed  exited
draining    -         -         -        draining   draining  stopping  killed  exited
stopping    stopping  stopping  -        stopping   -         -         killed  exited
killed      killed    killed    -        killed     -         -         -       exited
exited      -         -         -        -          -         -         -       -
"""


def documented() -> dict[tuple[WorkerState, WorkerEvent], WorkerState | None]:
    head, *rows = [line.split() for line in DOCUMENTED.strip().splitlines()]
    return {
        (WorkerState(row[0]), WorkerEvent(event)): None if cell == "-" else WorkerState(cell)
        for row in rows
        for event, cell in zip(head, row[1:], strict=True)
    }


PRODUCT = list(itertools.product(WorkerState, WorkerEvent))


def record_in(state: WorkerState) -> WorkerRecord:
    return WorkerRecord(1, 1, 0, 0.0, state=state, deadline=7.0)


def reachable_from(state: WorkerState) -> set[WorkerState]:
    reached = {state}
    while more := {to for (came_from, _), to in WORKER_TABLE.items() if came_from in reached} - reached:
        reached |= more
    return reached


def test_the_documented_table_covers_the_whole_product() -> None:
    assert set(documented()) == set(PRODUCT)


@pytest.mark.parametrize(("state", "event"), PRODUCT, ids=lambda value: value.name)
def test_each_pair_gives_the_documented_state_or_changes_nothing(state: WorkerState, event: WorkerEvent) -> None:
    fleet, record, to = Fleet(), record_in(state), documented()[state, event]
    if to is None:
        with pytest.raises(IllegalTransition, match=f"WorkerState {state.name}: {event.name} "):
            fleet.move(record, event, deadline=9.0)
        assert (record.state, record.deadline, fleet.actions) == (state, 7.0, [])
    else:
        fleet.move(record, event, deadline=9.0)
        assert (record.state, record.deadline) == (to, 9.0)
        assert len(fleet.actions) == (to is not state), "one log line for each change of state"


@pytest.mark.parametrize("state", WorkerState)
def test_every_state_is_reachable_and_ends(state: WorkerState) -> None:
    assert state in reachable_from(WorkerState.STARTING)
    assert WorkerState.EXITED in reachable_from(state)


@pytest.mark.parametrize("state", [state for state in WorkerState if state is not WorkerState.EXITED])
def test_the_exit_is_possible_in_every_state_but_the_final_one(state: WorkerState) -> None:
    assert WORKER_TABLE[state, WorkerEvent.EXIT] is WorkerState.EXITED


def test_nothing_follows_the_exit() -> None:
    assert not [pair for pair in WORKER_TABLE if pair[0] is WorkerState.EXITED]


def test_a_drain_never_turns_back_into_serving() -> None:
    for state in (WorkerState.DRAINING, WorkerState.STOPPING, WorkerState.KILLED):
        assert not reachable_from(state) & SERVES_OR_WILL


def test_kill_can_be_sent_once_to_every_worker_that_lives() -> None:
    can_be_killed = {state for state, event in WORKER_TABLE if event is WorkerEvent.KILL}
    assert can_be_killed == set(WorkerState) - {WorkerState.KILLED, WorkerState.EXITED}


@pytest.mark.parametrize("state", [state for state in WorkerState if state is not WorkerState.EXITED])
def test_dismissing_is_possible_in_every_state_of_a_living_worker(state: WorkerState) -> None:
    fleet, record = Fleet(), record_in(state)
    record.deadline = 100.0
    fleet.dismiss(record, 30.0, 0.0, "test")
    expected = WorkerState.DRAINING if state in MAY_HOLD_CONNECTIONS else WorkerState.STOPPING
    assert record.state is (WorkerState.KILLED if state is WorkerState.KILLED else expected)
    assert not record.fills_slot


def test_a_drain_can_be_shortened_and_never_lengthened() -> None:
    fleet, record = Fleet(), record_in(WorkerState.ACCEPTING)
    fleet.drain(record, 30.0, 0.0, "test")
    assert record.deadline == 30.0 + DRAIN_GRACE_SECONDS
    fleet.drain(record, 60.0, 0.0, "test")
    assert record.deadline == 30.0 + DRAIN_GRACE_SECONDS
    fleet.drain(record, 0.0, 5.0, "test")
    assert record.deadline == 5.0 + NOW_GRACE_SECONDS


def test_a_worker_that_failed_holds_its_slot_until_it_exits() -> None:
    record = record_in(WorkerState.STOPPING)
    assert not record.holds_slot
    record.failure = "ImportError"
    assert record.holds_slot
    record.state = WorkerState.EXITED
    assert not record.holds_slot


def test_a_spawned_worker_has_its_boot_deadline() -> None:
    fleet = Fleet()
    generation = fleet.new_generation("v1", False, 0.0)
    generation.timings = Timings(1, None, 30.0, 1.0, 30.0, 30.0, 3)
    fleet.spawn(generation, 0, 5.0)
    assert list(fleet.deadlines()) == [35.0]
