"""Companions, driven without processes: one of a name at a time, whatever happens in which order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from handoff.core.companions import Companions
from handoff.core.generation import CompanionTimings
from handoff.core.respawn import BREAKER_CRASHES, delay_seconds
from handoff.core.vocabulary import (
    Action,
    CompanionsWanted,
    Drain,
    FailedSaid,
    HelloSaid,
    LogWarning,
    Open,
    OpenedSaid,
    ReadySaid,
    SendSignal,
    Signal,
    Spawn,
    StopRequested,
    Tick,
    WorkerBroke,
    WorkerExited,
)
from handoff.core.worker import WorkerState

TIMINGS = CompanionTimings(boot_timeout_seconds=30.0, stop_timeout_seconds=10.0)


def wanted(generation: int, *names: str) -> CompanionsWanted:
    return CompanionsWanted(generation, dict.fromkeys(names, TIMINGS))


def spawns(actions: list[Action]) -> list[Spawn]:
    return [action for action in actions if isinstance(action, Spawn)]


def run_up(core: Companions, worker: int, now: float) -> None:
    core.handle(HelloSaid(worker), now)
    assert Open(worker) in core.handle(ReadySaid(worker), now)
    core.handle(OpenedSaid(worker), now)


def test_the_new_one_is_spawned_when_the_old_one_has_exited() -> None:
    core = Companions()
    (first,) = spawns(core.handle(wanted(1, "a"), 0.0))
    run_up(core, first.worker, 1.0)
    actions = core.handle(wanted(2, "a"), 2.0)
    assert Drain(first.worker, 10.0) in actions
    assert spawns(actions) == []
    (second,) = spawns(core.handle(WorkerExited(first.worker, "exited"), 3.0))
    assert (second.generation, second.companion) == (2, "a")


def test_one_that_does_not_end_is_told_to_and_killed() -> None:
    core = Companions()
    (spawn,) = spawns(core.handle(wanted(1, "a"), 0.0))
    run_up(core, spawn.worker, 1.0)
    core.handle(wanted(2), 2.0)
    said: list[Action] = []
    while (deadline := core.next_deadline()) is not None:
        said += core.handle(Tick(), deadline)
    signals = [action.signal for action in said if isinstance(action, SendSignal)]
    assert signals == [Signal.TERM, Signal.KILL]


def test_crashes_are_followed_by_longer_and_longer_waits_and_a_stable_life_ends_the_row() -> None:
    core, now = Companions(), 0.0
    (spawn,) = spawns(core.handle(wanted(1, "a"), now))
    for crashes in range(1, BREAKER_CRASHES + 1):
        actions = core.handle(WorkerExited(spawn.worker, "was killed by SIGKILL"), now)
        assert core.crashes("a") == crashes
        if delay := delay_seconds(crashes):
            assert spawns(actions) == []
            assert core.missing() == ["a"]
            assert core.next_deadline() == now + delay
            now += delay
            actions = core.handle(Tick(), now)
        (spawn,) = spawns(actions)
    run_up(core, spawn.worker, now)
    deadline = core.next_deadline()
    assert deadline is not None
    core.handle(Tick(), deadline)
    assert core.crashes("a") == 0


def test_new_code_gets_chances_of_its_own() -> None:
    core, now = Companions(), 0.0
    (spawn,) = spawns(core.handle(wanted(1, "a"), now))
    for _ in range(3):
        actions = core.handle(WorkerExited(spawn.worker, "exited"), now)
        now = core.next_deadline() or now
        (spawn,) = spawns(actions) or spawns(core.handle(Tick(), now))
    core.handle(WorkerExited(spawn.worker, "exited"), now)
    assert len(spawns(core.handle(wanted(2, "a"), now))) == 1


def test_a_boot_that_takes_too_long_is_a_crash() -> None:
    core = Companions()
    (spawn,) = spawns(core.handle(wanted(1, "a"), 0.0))
    assert SendSignal(spawn.worker, Signal.DUMP) in core.handle(Tick(), 30.0)
    actions = core.handle(WorkerExited(spawn.worker, "was killed by SIGABRT", "the stack"), 31.0)
    (warning,) = (action for action in actions if isinstance(action, LogWarning))
    assert warning.message == (
        "companion a: was not ready after 30.0 s; it was starting the interpreter; crash 1 in a row\nthe stack"
    )


EVENTS = st.lists(
    st.one_of(
        st.builds(lambda number, names: ("want", number, names), st.integers(1, 4), st.sets(st.sampled_from("ab"))),
        st.builds(lambda kind, worker: (kind, worker, None), st.sampled_from("hrofbx"), st.integers(1, 8)),
        st.just(("tick", 0, None)),
        st.builds(lambda is_now: ("stop", is_now, None), st.booleans()),
    ),
    max_size=60,
)


@given(EVENTS)
@settings(max_examples=300)
def test_never_two_of_a_name_and_after_a_stop_none(events: list[tuple[str, int, set[str] | None]]) -> None:
    core, now = Companions(), 0.0
    makers = {"h": HelloSaid, "r": ReadySaid, "o": OpenedSaid}
    for kind, number, names in events:
        now += 1.0
        match kind:
            case "want":
                core.handle(wanted(number, *sorted(names or ())), now)
            case "stop":
                core.handle(StopRequested(is_now=bool(number)), now)
            case "tick":
                core.handle(Tick(), max(now, core.next_deadline() or 0.0))
            case "f":
                core.handle(FailedSaid(number, "no"), now)
            case "b":
                core.handle(WorkerBroke(number, "garbage"), now)
            case "x":
                core.handle(WorkerExited(number, "exited"), now)
            case _:
                core.handle(makers[kind](number), now)
        alive = [worker.companion for worker in core.fleet.workers.values()]
        assert len(alive) == len(set(alive))
    core.handle(StopRequested(), now)
    for _ in range(100):
        if (deadline := core.next_deadline()) is None:
            break
        now = max(now, deadline)
        core.handle(Tick(), now)
    assert all(worker.state is WorkerState.KILLED for worker in core.fleet.workers.values())
    for worker in list(core.fleet.workers):
        assert spawns(core.handle(WorkerExited(worker, "exited"), now)) == []
    assert not core.fleet.workers
