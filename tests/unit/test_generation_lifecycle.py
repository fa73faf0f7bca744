"""The whole product of generation states and events."""

from __future__ import annotations

import itertools

import pytest

from handoff.core.fleet import Fleet
from handoff.core.generation import (
    GENERATION_TABLE,
    STARTING_STATES,
    GenerationEvent,
    GenerationRecord,
    GenerationState,
    Timings,
)
from handoff.core.machine import IllegalTransition
from handoff.core.vocabulary import LogTransition, Unbind

_S, _E = GenerationState, GenerationEvent

DOCUMENTED = {
    _S.PREPARING: {_E.PREPARED: _S.BOOTING, _E.FAILED: _S.ABORTING},
    _S.BOOTING: {_E.ALL_READY: _S.PROBATION, _E.FAILED: _S.ABORTING},
    _S.PROBATION: {_E.SURVIVED: _S.OPENING, _E.FAILED: _S.ABORTING},
    _S.OPENING: {_E.ALL_OPENED: _S.LIVE, _E.FAILED: _S.ABORTING},
    _S.LIVE: {_E.SUPERSEDED: _S.RETIRING, _E.STOPPED: _S.DRAINING},
    _S.RETIRING: {_E.RETIRED: _S.DRAINING, _E.STOPPED: _S.DRAINING},
    _S.DRAINING: {_E.EMPTIED: _S.GONE},
    _S.ABORTING: {_E.EMPTIED: _S.GONE},
    _S.GONE: {},
}
PRODUCT = list(itertools.product(GenerationState, GenerationEvent))


def record_in(state: GenerationState) -> GenerationRecord:
    return GenerationRecord(1, "v1", False, 0.0, state=state, deadline=7.0)


def reachable_from(state: GenerationState) -> set[GenerationState]:
    reached = {state}
    while more := {to for (came_from, _), to in GENERATION_TABLE.items() if came_from in reached} - reached:
        reached |= more
    return reached


@pytest.mark.parametrize(("state", "event"), PRODUCT, ids=lambda value: value.name)
def test_each_pair_gives_the_documented_state_or_changes_nothing(
    state: GenerationState, event: GenerationEvent
) -> None:
    fleet, record, to = Fleet(), record_in(state), DOCUMENTED[state].get(event)
    if to is None:
        with pytest.raises(IllegalTransition, match=f"GenerationState {state.name}: {event.name} "):
            fleet.move_generation(record, event)
        assert (record.state, record.deadline, fleet.actions) == (state, 7.0, [])
    else:
        fleet.move_generation(record, event)
        assert (record.state, record.deadline) == (to, None)
        logged = [action for action in fleet.actions if isinstance(action, LogTransition)]
        assert len(logged) == 1, "one log line for each change of state"
        assert (Unbind(1) in fleet.actions) == (to in (_S.DRAINING, _S.ABORTING))


@pytest.mark.parametrize("state", GenerationState)
def test_every_state_is_reachable_and_ends(state: GenerationState) -> None:
    assert state in reachable_from(_S.PREPARING)
    assert _S.GONE in reachable_from(state)


@pytest.mark.parametrize("state", sorted(STARTING_STATES, key=lambda state: state.value))
def test_every_starting_state_can_fail(state: GenerationState) -> None:
    assert GENERATION_TABLE[state, _E.FAILED] is _S.ABORTING


def test_what_was_aborted_or_superseded_is_never_live_again() -> None:
    for state in (_S.ABORTING, _S.RETIRING, _S.DRAINING, _S.GONE):
        assert _S.LIVE not in reachable_from(state)
        assert not STARTING_STATES & reachable_from(state)


@pytest.mark.parametrize(
    ("wanted", "surge", "wave"), [(4, None, 4), (4, 1, 1), (4, 3, 3), (2, 8, 2), (1, 1, 1)], ids=str
)
def test_the_first_wave_is_all_or_the_surge_and_never_more_than_wanted(
    wanted: int, surge: int | None, wave: int
) -> None:
    record = record_in(_S.BOOTING)
    record.timings, record.workers_wanted = Timings(9, surge, 30.0, 1.0, 30.0, 30.0, 3), wanted
    assert record.wave == wave


def test_generations_are_numbered_in_order() -> None:
    fleet = Fleet()
    assert [fleet.new_generation(None, False, 0.0).generation for _ in range(3)] == [1, 2, 3]
