"""What the supervisor does, as claims. The world checks the invariants after every event of every scenario."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest

from handoff.core.generation import GenerationState, Timings
from handoff.core.respawn import BREAKER_CRASHES, BREAKER_DELAY_SECONDS, STABLE_SECONDS
from handoff.core.supervisor import CLOSED_SECONDS, SQUEEZE_SECONDS
from handoff.core.vocabulary import (
    Action,
    Committed,
    Drain,
    Event,
    Exit,
    FailedSaid,
    Forget,
    HelloSaid,
    LeavingSaid,
    LogWarning,
    Open,
    OpenedSaid,
    Prepare,
    Prepared,
    PrepareFailed,
    ProgressSaid,
    ReadySaid,
    ReloadRequested,
    ScaleRequested,
    SendSignal,
    Signal,
    Spawn,
    StopRequested,
    Tick,
    Verdict,
    WorkerBroke,
    WorkerExited,
)
from handoff.core.worker import WorkerState
from handoff.errors import ExitCode
from tests.sim.world import Process, World

A = TypeVar("A", bound=Action)

BOOT_SECONDS = 30.0
DRAIN_SECONDS = 20.0
STOP_SECONDS = 10.0


def numbers(workers: int = 2, surge: int | None = None, max_generations: int = 3) -> Timings:
    return Timings(workers, surge, BOOT_SECONDS, 1.0, DRAIN_SECONDS, STOP_SECONDS, max_generations)


def of(actions: list[Action], kind: type[A]) -> list[A]:
    return [action for action in actions if isinstance(action, kind)]


def states(world: World, generation: int) -> list[str]:
    return [worker.state.value for worker in world.supervisor.fleet.workers_of(generation)]


def members(world: World, generation: int) -> list[Process]:
    return [process for process in world.processes.values() if process.generation == generation]


def begun(timings: Timings | None = None) -> World:
    """A world whose first generation boots: spawned, and nothing said yet."""
    world = World()
    world.handle(ReloadRequested())
    world.prepared(world.preparing[0], timings or numbers())
    return world


def go_live(world: World, timings: Timings | None = None, closes: bool = True) -> World:
    """Everybody obeys until the starting generation's commit and its verdict; drains go on. Not `closes`: the old
    workers have not heard of it yet."""
    started = world.live
    timings = timings or numbers()
    while world.preparing:
        world.prepared(world.preparing[0], timings)
    starting = world.supervisor.fleet.starting()
    assert starting is not None
    for _ in range(3):
        for process in members(world, starting.generation):
            for _ in range(3):
                process.step()
            while process.outbox:
                world.deliver(process)
        if world.live == starting.generation:
            break
        world.advance(1.0)
    assert world.live == starting.generation != started
    for process in list(world.processes.values()):
        if closes and process.drain_deadline is not None and not process.has_closed:
            go_on(world, process)
    return world


def live(timings: Timings | None = None) -> World:
    return go_live(begun(timings), timings)


def go_on(world: World, process: Process) -> None:
    """The process does the next thing and the master hears of it."""
    assert process.step()
    while process.outbox:
        world.deliver(process)


def crash(world: World, process: Process, how: str = "exited 1") -> list[Action]:
    process.end(how)
    process.is_hung = True
    while len(process.outbox) > 1:
        world.deliver(process)
    return world.handle(process.outbox.popleft())


def spawned(actions: list[Action]) -> list[tuple[int, int]]:
    return [(action.generation, action.slot) for action in of(actions, Spawn)]


def end(world: World, process: Process) -> None:
    """It does all that it has left to do, and the master hears of it."""
    while process.step():
        pass
    while process.outbox:
        world.deliver(process)


def finish_drains(world: World) -> None:
    for process in list(world.processes.values()):
        if process.is_told_to_leave:
            end(world, process)


# --- the first boot -------------------------------------------------------------------------------------------------


def test_a_first_boot_prepares_spawns_opens_and_commits() -> None:
    world = live()
    kinds = [
        type(action) for action in world.actions if isinstance(action, Prepare | Spawn | Open | Committed | Verdict)
    ]
    assert kinds == [Prepare, Spawn, Spawn, Open, Open, Committed, Verdict]
    assert of(world.actions, Prepare) == [Prepare(1, None, None)]
    assert of(world.actions, Committed) == [Committed(1, None)]
    assert states(world, 1) == ["accepting", "accepting"]


def test_nobody_accepts_before_the_probation_is_over() -> None:
    world = begun()
    world.run(numbers())
    assert states(world, 1) == ["ready", "ready"]
    world.advance(0.9)
    assert not of(world.actions, Open)
    world.advance(0.1)
    assert len(of(world.actions, Open)) == 2


def test_a_generation_is_live_only_when_every_worker_confirmed() -> None:
    world = begun()
    world.run(numbers())
    world.advance(1.0)
    first, second = members(world, 1)
    go_on(world, first)
    assert world.live is None
    go_on(world, second)
    assert world.live == 1


def test_a_first_boot_that_fails_ends_the_master_with_its_reason() -> None:
    world = begun()
    first, _ = members(world, 1)
    world.handle(FailedSaid(first.worker, "ModuleNotFoundError: app", "Traceback …"))
    crash(world, first)
    assert world.exit is None, "the other worker still lives"
    world.settle(numbers())
    assert world.exit == Exit(ExitCode.FAILED, "ModuleNotFoundError: app")
    assert of(world.actions, Verdict)[-1].traceback == "Traceback …"


@pytest.mark.parametrize(("is_ending", "signals"), [(True, []), (False, [Signal.TERM])])
def test_a_worker_that_failed_and_does_not_end_by_itself_is_told_to(is_ending: bool, signals: list[Signal]) -> None:
    world = begun()
    first, _ = members(world, 1)
    world.handle(FailedSaid(first.worker, "it hangs", is_ending=is_ending))
    sent = [one.signal for one in of(world.actions, SendSignal) if one.worker == first.worker]
    assert sent == signals


def test_a_first_preparation_that_fails_ends_the_master_with_its_exit_code() -> None:
    world = World()
    world.handle(ReloadRequested())
    world.preparing.clear()
    world.handle(PrepareFailed(1, "workers: 0: must be at least 1", ExitCode.USAGE))
    assert world.exit == Exit(ExitCode.USAGE, "workers: 0: must be at least 1")


def test_a_reload_during_the_first_boot_follows_its_commit() -> None:
    world = begun()
    request = world.reload("v2")
    assert not world.preparing
    go_live(world)
    assert [prepare.label for prepare in world.preparing] == ["v2"]
    go_live(world)
    assert world.answers[request].exit_code is ExitCode.DONE
    assert world.live == 2


@pytest.mark.parametrize("is_asked_before", [True, False])
def test_a_reload_during_a_first_boot_that_fails_is_answered_and_starts_nothing(is_asked_before: bool) -> None:
    world = begun()
    request = world.reload() if is_asked_before else 0
    crash(world, members(world, 1)[0])
    request = request or world.reload()
    assert not world.preparing
    world.settle(numbers())
    assert world.exit is not None
    assert world.answers[request].exit_code is ExitCode.FAILED


# --- reload ---------------------------------------------------------------------------------------------------------


def test_a_reload_commits_and_then_drains_the_old_generation() -> None:
    world = live()
    request = world.reload("v2")
    go_live(world)
    assert world.answers[request].exit_code is ExitCode.DONE
    assert world.answers[request].generation == 2
    assert states(world, 1) == ["draining", "draining"]
    assert states(world, 2) == ["accepting", "accepting"]
    assert of(world.actions, Committed)[-1] == Committed(2, 1)
    finish_drains(world)
    assert of(world.actions, Forget) == [Forget(1)]


def test_the_old_generation_is_not_touched_before_the_commit() -> None:
    world = live()
    world.reload()
    world.prepared(world.preparing[0], numbers())
    world.run(numbers())
    world.advance(1.0)
    go_on(world, members(world, 2)[0])
    assert states(world, 1) == ["accepting", "accepting"]
    assert not of(world.actions, Drain)


def test_the_number_of_workers_may_change_in_a_reload() -> None:
    world = live()
    world.reload()
    go_live(world, numbers(workers=3))
    assert states(world, 2) == ["accepting"] * 3


def test_reloads_during_a_reload_are_one_and_the_latest_label_wins() -> None:
    world = live()
    first = world.reload("v2")
    later = [world.reload("v3"), world.reload("v4")]
    go_live(world)
    assert set(world.answers) == {first}
    assert [prepare.label for prepare in world.preparing] == ["v4"]
    go_live(world)
    assert [world.answers[request].generation for request in later] == [3, 3]
    assert not world.preparing


def test_a_signal_names_no_version_and_keeps_the_label_that_was_asked_for() -> None:
    world = live()
    world.reload("v2")
    world.reload("v3")
    world.handle(ReloadRequested())
    go_live(world)
    assert [prepare.label for prepare in world.preparing] == ["v3"]


def test_a_pending_reload_follows_a_rolled_back_one() -> None:
    world = live()
    first, second = world.reload("bad"), world.reload("good")
    world.prepare_failed(world.preparing[0])
    assert world.answers[first].exit_code is ExitCode.ROLLED_BACK
    go_live(world)
    assert world.answers[second].exit_code is ExitCode.DONE


def reloaded(world: World) -> tuple[int, Verdict | None]:
    """A reload up to its commit; the old workers have not heard of it yet."""
    request = world.reload()
    go_live(world, closes=False)
    return request, world.answers.get(request)


def test_the_verdict_of_a_commit_waits_until_the_old_workers_accept_nobody() -> None:
    world = live()
    request, verdict = reloaded(world)
    assert verdict is None
    first, second = members(world, 1)
    go_on(world, first)
    assert request not in world.answers
    assert world.supervisor.last_verdict is not None
    assert world.supervisor.last_verdict.generation == 1
    go_on(world, second)
    assert world.answers[request].message == "generation 2 is live"
    assert states(world, 1) == ["draining", "draining"]


def test_an_old_worker_that_ends_has_accepted_for_the_last_time() -> None:
    world = live(numbers(workers=1))
    request, verdict = reloaded(world)
    assert verdict is None
    crash(world, members(world, 1)[0])
    assert world.answers[request].message == "generation 2 is live"


def test_a_verdict_waits_a_second_for_an_old_worker_that_is_stuck_and_then_names_it() -> None:
    world = live()
    request, _ = reloaded(world)
    first, second = members(world, 1)
    go_on(world, second)
    world.advance(CLOSED_SECONDS / 2)
    assert request not in world.answers
    world.advance(CLOSED_SECONDS / 2)
    assert world.answers[request].exit_code is ExitCode.DONE
    said = f"generation 2 is live; it is not known yet that the old accept nobody any more: worker {first.worker}"
    assert world.answers[request].message == said


def test_a_worker_that_drains_for_long_keeps_no_later_verdict_waiting() -> None:
    world = live()
    reloaded(world)
    for process in members(world, 1):
        go_on(world, process)
    request, verdict = reloaded(world)
    assert verdict is None
    for process in members(world, 2):
        go_on(world, process)
    assert world.answers[request].message == "generation 3 is live"
    assert states(world, 1) == ["draining", "draining"]


def test_the_last_verdict_is_that_of_the_newest_generation() -> None:
    world = live()
    first, _ = reloaded(world)
    second = world.reload()
    world.prepare_failed(world.preparing[0])
    for process in members(world, 1):
        go_on(world, process)
    assert [world.answers[one].exit_code for one in (first, second)] == [ExitCode.DONE, ExitCode.ROLLED_BACK]
    assert world.supervisor.last_verdict is world.answers[second]


def test_a_stop_does_not_wait_for_the_verdict_of_a_commit() -> None:
    world = live()
    request, _ = reloaded(world)
    world.stop()
    assert world.answers[request].message == "generation 2 is live"


def test_the_next_commit_does_not_wait_for_the_verdict_of_the_one_before() -> None:
    world = live()
    first, _ = reloaded(world)
    second, _ = reloaded(world)
    assert [world.answers[first].generation, world.answers.get(second)] == [2, None]


# --- rolling back a failed boot -------------------------------------------------------------------------------------


def rolled_back(world: World, request: int) -> Verdict:
    """The verdict, once everything that belongs to the failed generation ended; the old one was never touched."""
    finish_drains(world)
    assert states(world, 1) == ["accepting", "accepting"]
    assert list(world.supervisor.fleet.generations) == [1]
    assert world.answers[request].exit_code is ExitCode.ROLLED_BACK
    assert world.supervisor.live == 1
    return world.answers[request]


def test_a_failed_preparation_rolls_back_and_spawns_nothing() -> None:
    world = live()
    request = world.reload()
    world.prepare_failed(world.preparing[0])
    assert rolled_back(world, request).message == "rolled back: port taken; generation 1 stays live"
    assert spawned(world.actions) == [(1, 0), (1, 1)]


def booting_reload(world: World) -> tuple[int, list[Process]]:
    request = world.reload()
    world.prepared(world.preparing[0], numbers())
    return request, members(world, 2)


def test_an_exit_before_hello_rolls_back_and_asks_for_the_interpreter() -> None:
    world = live()
    request, (first, _) = booting_reload(world)
    crash(world, first, "exited 1")
    assert "before it said hello; is handoff installed" in rolled_back(world, request).message


def test_an_exit_while_booting_rolls_back_and_names_the_step() -> None:
    world = live()
    request, (first, _) = booting_reload(world)
    go_on(world, first)
    world.handle(ProgressSaid(first.worker, "warming up /health"))
    crash(world, first, "was killed by SIGSEGV")
    assert "was killed by SIGSEGV while it was warming up /health" in rolled_back(world, request).message


def test_an_exit_on_probation_rolls_back() -> None:
    world = live()
    request, (first, _) = booting_reload(world)
    world.run(numbers())
    assert world.supervisor.fleet.generations[2].state is GenerationState.PROBATION
    crash(world, first)
    assert "after it was ready, on probation" in rolled_back(world, request).message
    assert not [action for action in of(world.actions, Open) if action.worker > 2]


@pytest.mark.parametrize("event", [FailedSaid, WorkerBroke])
def test_a_worker_that_fails_on_probation_and_is_slow_to_end_keeps_the_others_closed(
    event: type[FailedSaid | WorkerBroke],
) -> None:
    world = live()
    request, (first, _) = booting_reload(world)
    world.run(numbers())
    world.advance(0.9)
    world.handle(event(first.worker, "lost its database"))
    world.advance(0.2)
    assert states(world, 2)[1] == "ready"
    assert not [action for action in of(world.actions, Open) if action.worker > 2]
    crash(world, first)
    assert "lost its database" in rolled_back(world, request).message


def test_an_exit_while_opening_drains_those_that_accept_already() -> None:
    world = live()
    request, (first, second) = booting_reload(world)
    world.run(numbers())
    world.advance(1.0)
    go_on(world, first)
    actions = crash(world, second)
    assert of(actions, Drain) == [Drain(first.worker, DRAIN_SECONDS)]
    assert world.answers[request].exit_code is ExitCode.ROLLED_BACK, "a verdict does not wait for drains"
    rolled_back(world, request)


def test_a_worker_that_leaves_before_the_commit_rolls_back() -> None:
    world = live()
    request, (first, second) = booting_reload(world)
    world.run(numbers())
    world.advance(1.0)
    go_on(world, first)
    world.handle(LeavingSaid(first.worker, "TERM"))
    assert states(world, 2) == ["draining", "draining"]
    assert "left before the commit: TERM" in rolled_back(world, request).message
    assert second.worker not in world.processes


def test_a_worker_that_never_confirms_that_it_accepts_rolls_back() -> None:
    world = live()
    request, (first, second) = booting_reload(world)
    world.run(numbers())
    world.advance(1.0)
    second.is_hung = True
    go_on(world, first)
    world.advance(5.0)
    assert SendSignal(second.worker, Signal.DUMP) in world.actions
    world.advance(2.0)
    while second.outbox:
        world.deliver(second)
    assert "did not begin to accept" in rolled_back(world, request).message


@pytest.mark.parametrize("has_said_hello", [False, True])
def test_a_boot_timeout_dumps_the_stacks_and_then_kills(has_said_hello: bool) -> None:
    world = live()
    request, (first, second) = booting_reload(world)
    if has_said_hello:
        go_on(world, second)
    while second.said < 2:
        go_on(world, second)
    if has_said_hello:
        go_on(world, first)
    first.is_hung = True
    world.advance(BOOT_SECONDS - 0.1)
    assert not of(world.actions, SendSignal)
    world.advance(0.1)
    assert of(world.actions, SendSignal) == [SendSignal(first.worker, Signal.DUMP)]
    world.advance(2.0)
    assert of(world.actions, SendSignal)[-1] == SendSignal(first.worker, Signal.KILL)
    assert request not in world.answers
    world.handle(first.outbox.popleft())
    step = "loading the application" if has_said_hello else "starting the interpreter"
    assert f"was not ready after 30.0 s; it was {step}" in rolled_back(world, request).message


def test_the_post_mortem_of_a_dumped_worker_reaches_the_verdict() -> None:
    world = live()
    request, (first, _) = booting_reload(world)
    world.advance(BOOT_SECONDS)
    world.handle(WorkerExited(first.worker, "was killed by SIGABRT", "File app.py, line 3"))
    assert rolled_back(world, request).traceback == "File app.py, line 3"


def test_what_a_failing_worker_says_is_the_reason_of_the_verdict() -> None:
    world = live()
    request, (first, _) = booting_reload(world)
    go_on(world, first)
    world.handle(FailedSaid(first.worker, "SyntaxError: app.py:3", "Traceback …"))
    world.handle(FailedSaid(first.worker, "interrupted", ""))
    crash(world, first)
    verdict = rolled_back(world, request)
    assert verdict.message == "rolled back: SyntaxError: app.py:3; generation 1 stays live"
    assert verdict.traceback == "Traceback …"


# --- rollback asked for ---------------------------------------------------------------------------------------------


def test_a_rollback_with_none_previous_is_refused() -> None:
    world = live()
    request = world.reload(is_rollback=True)
    assert world.answers[request].exit_code is ExitCode.REFUSED
    assert not world.preparing


def test_a_rollback_during_the_first_boot_is_refused() -> None:
    world = begun()
    request = world.reload(is_rollback=True)
    assert world.answers[request].exit_code is ExitCode.REFUSED
    assert states(world, 1) == ["starting", "starting"]


def test_a_rollback_takes_the_previous_pins_and_again_toggles() -> None:
    world = live()
    world.reload("v2")
    go_live(world)
    finish_drains(world)
    sources = []
    for _ in range(3):
        world.reload(is_rollback=True)
        sources.append(world.preparing[0].source)
        go_live(world)
        finish_drains(world)
    assert sources == [1, 2, 3]


def test_a_rolled_back_reload_does_not_change_where_a_rollback_goes() -> None:
    world = live()
    world.reload()
    go_live(world)
    world.reload()
    world.prepare_failed(world.preparing[0])
    world.reload(is_rollback=True)
    assert world.preparing[0].source == 1


@pytest.mark.parametrize("is_prepared", [False, True])
def test_a_rollback_during_a_reload_aborts_it(is_prepared: bool) -> None:
    world = live()
    reload, pending = world.reload(), world.reload()
    if is_prepared:
        world.prepared(world.preparing[0], numbers())
    rollback = world.reload(is_rollback=True)
    assert world.answers[rollback].exit_code is ExitCode.DONE
    assert world.answers[pending].exit_code is ExitCode.REFUSED
    finish_drains(world)
    assert world.answers[reload].exit_code is ExitCode.ABORTED
    assert states(world, 1) == ["accepting", "accepting"]
    if not is_prepared:
        world.prepared(world.preparing[0], numbers())
    assert list(world.supervisor.fleet.generations) == [1]


def test_a_rollback_during_a_rollback_joins_it() -> None:
    world = live()
    world.reload()
    go_live(world)
    both = [world.reload(is_rollback=True), world.reload(is_rollback=True)]
    assert [prepare.source for prepare in world.preparing] == [1]
    go_live(world)
    assert [world.answers[request].generation for request in both] == [3, 3]


# --- stop -----------------------------------------------------------------------------------------------------------


def test_a_stop_drains_and_exits_once_when_nothing_is_left() -> None:
    world = live()
    request = world.stop()
    first, second = members(world, 1)
    assert of(world.actions, Drain) == [Drain(first.worker, STOP_SECONDS), Drain(second.worker, STOP_SECONDS)]
    end(world, first)
    assert world.exit is None
    assert request not in world.answers
    end(world, second)
    assert world.exit == Exit(ExitCode.DONE, "stopped")
    assert world.answers[request].exit_code is ExitCode.DONE
    world.supervisor.handle(Tick(), world.now + 100.0)
    assert len(of(world.actions, Exit)) == 1


def at_preparing(world: World) -> None:
    world.reload()


def at_booting(world: World) -> None:
    booting_reload(world)


def at_probation(world: World) -> None:
    booting_reload(world)
    world.run(numbers())


def at_opening(world: World) -> None:
    at_probation(world)
    world.advance(1.0)
    go_on(world, members(world, 2)[0])


def at_draining(world: World) -> None:
    world.reload()
    go_live(world)


def at_aborting(world: World) -> None:
    at_opening(world)
    crash(world, members(world, 2)[1])


PHASES: list[Callable[[World], None]] = [at_preparing, at_booting, at_probation, at_opening, at_draining, at_aborting]


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.__name__)
@pytest.mark.parametrize("is_now", [False, True])
def test_a_stop_wins_at_once_in_every_phase_of_a_reload(phase: Callable[[World], None], is_now: bool) -> None:
    world = live()
    phase(world)
    pending = world.reload()
    world.stop(is_now)
    assert not [worker for worker in world.supervisor.fleet.workers.values() if worker.fills_slot]
    refused = world.reload(), world.scale(3)
    world.settle(numbers())
    assert world.exit == Exit(ExitCode.DONE, "stopped")
    assert world.answers[pending].exit_code in (ExitCode.ABORTED, ExitCode.DONE)
    assert [world.answers[request].exit_code for request in refused] == [ExitCode.ABORTED, ExitCode.REFUSED]


@pytest.mark.parametrize("phase", PHASES[:4], ids=lambda phase: phase.__name__)
def test_a_stop_during_the_first_boot_ends_as_stopped(phase: Callable[[World], None]) -> None:
    world = World()
    world.handle(ReloadRequested())
    if phase is not at_preparing:
        world.prepared(world.preparing[0], numbers())
    if phase in (at_probation, at_opening):
        world.run(numbers())
    if phase is at_opening:
        world.advance(1.0)
        go_on(world, members(world, 1)[0])
    world.stop()
    if world.exit is None:
        world.settle(numbers())
    assert world.exit == Exit(ExitCode.DONE, "stopped")


def test_a_preparation_that_ends_after_a_stop_changes_nothing() -> None:
    world = World()
    world.handle(ReloadRequested())
    world.stop()
    assert world.exit is not None
    assert world.supervisor.handle(Prepared(1, numbers(), ""), 1.0) == []
    assert world.supervisor.handle(PrepareFailed(1, "port taken"), 1.0) == []


def test_a_second_stop_is_at_once_and_both_are_answered() -> None:
    world = live()
    for process in members(world, 1):
        process.is_hung = True
    requests = [world.stop()]
    world.advance(3.0)
    requests.append(world.stop())
    assert [action.seconds for action in of(world.actions, Drain)[-2:]] == [0.0, 0.0]
    world.advance(1.0)
    assert [action.signal for action in of(world.actions, SendSignal)] == [Signal.TERM, Signal.TERM]
    world.advance(2.0)
    assert [action.signal for action in of(world.actions, SendSignal)[2:]] == [Signal.KILL, Signal.KILL]
    world.run(numbers())
    assert world.exit is not None
    assert [world.answers[request].exit_code for request in requests] == [ExitCode.DONE, ExitCode.DONE]


def test_a_request_after_the_exit_is_answered_too() -> None:
    world = live()
    world.stop()
    world.settle(numbers())
    supervisor = world.supervisor
    late: list[Event] = [StopRequested(90), ReloadRequested(91), ScaleRequested(92, 3)]
    answers = [of(supervisor.handle(event, world.now), Verdict) for event in late]
    assert [verdict.requests for (verdict,) in answers] == [(90,), (91,), (92,)]


def test_a_reload_after_a_first_boot_that_failed_is_answered() -> None:
    world = World()
    world.handle(ReloadRequested())
    world.prepare_failed(world.preparing[0])
    assert world.exit is not None
    (verdict,) = of(world.supervisor.handle(ReloadRequested(91), world.now), Verdict)
    assert (verdict.requests, verdict.exit_code) == ((91,), ExitCode.ABORTED)


def test_the_verdict_of_a_reload_that_a_stop_aborted_does_not_say_that_something_stays_live() -> None:
    world = live()
    request = world.reload()
    world.stop()
    assert world.answers[request].message == "aborted: the service is stopping"


# --- scale ----------------------------------------------------------------------------------------------------------


def test_a_scale_up_is_answered_when_all_accept() -> None:
    world = live()
    request = world.scale(4)
    assert spawned(world.actions)[2:] == [(1, 2), (1, 3)]
    assert request not in world.answers
    world.run(numbers())
    assert world.answers[request].message == "4 workers accept"
    assert states(world, 1) == ["accepting"] * 4


def test_a_scale_down_drains_the_highest_slots() -> None:
    world = live(numbers(workers=3))
    request = world.scale(1)
    assert [worker.state.value for worker in world.supervisor.fleet.workers.values()] == [
        "accepting",
        "draining",
        "draining",
    ]
    assert world.answers[request].exit_code is ExitCode.DONE


@pytest.mark.parametrize("workers", [0, -1, 257])
def test_a_scale_beyond_the_limits_is_refused(workers: int) -> None:
    world = live()
    request = world.scale(workers)
    assert world.answers[request].exit_code is ExitCode.REFUSED
    assert f"{workers} workers: must be between 1 and 256" in world.answers[request].message
    assert states(world, 1) == ["accepting", "accepting"]


def test_one_less_than_one_worker_is_refused() -> None:
    world = live(numbers(workers=1))
    assert world.answers[world.scale(change=-1)].exit_code is ExitCode.REFUSED


def test_a_scale_before_anything_is_live_is_refused() -> None:
    world = begun()
    assert world.answers[world.scale(3)].exit_code is ExitCode.REFUSED


def test_a_later_scale_supersedes_the_one_that_waits() -> None:
    world = live()
    first, second = world.scale(4), world.scale(3)
    assert world.answers[first].exit_code is ExitCode.REFUSED
    world.run(numbers())
    assert world.answers[second].message == "3 workers accept"


def test_a_scale_holds_over_reloads_until_the_configured_number_changes() -> None:
    world = live()
    world.scale(3)
    world.run(numbers())
    world.reload()
    go_live(world)
    assert states(world, 2) == ["accepting"] * 3
    world.reload()
    go_live(world, numbers(workers=1))
    assert states(world, 3) == ["accepting"]
    assert any("the scale to 3 is dropped" in warning.message for warning in of(world.actions, LogWarning))
    world.reload()
    go_live(world)
    assert states(world, 4) == ["accepting"] * 2


def test_a_reload_that_is_rolled_back_does_not_drop_the_scale() -> None:
    world = live()
    world.scale(3)
    world.run(numbers())
    world.reload()
    world.prepared(world.preparing[0], numbers(workers=1))
    crash(world, members(world, 2)[0])
    world.reload()
    go_live(world)
    assert states(world, 3) == ["accepting"] * 3


def test_a_scale_during_a_reload_holds_for_what_the_reload_commits() -> None:
    world = live()
    booting_reload(world)
    request = world.scale(3)
    go_live(world)
    world.run(numbers())
    assert states(world, 2) == ["accepting"] * 3
    assert world.answers[request].message == "3 workers accept"


def test_a_scale_during_a_reload_that_changes_the_number_is_refused_at_the_commit() -> None:
    world = live()
    world.reload()
    world.prepared(world.preparing[0], numbers(workers=1))
    request = world.scale(3)
    go_live(world, numbers(workers=1))
    assert world.answers[request].exit_code is ExitCode.REFUSED
    assert "the configuration now says 1" in world.answers[request].message


def test_a_scale_whose_new_worker_fails_is_answered_and_goes_on_trying() -> None:
    world = live()
    request = world.scale(3)
    actions = crash(world, members(world, 1)[2])
    assert world.answers[request].exit_code is ExitCode.FAILED
    assert spawned(actions) == [(1, 2)]


def test_a_scale_down_never_sends_away_the_last_that_accepts() -> None:
    world = live()
    first, second = members(world, 1)
    crash(world, first)
    world.scale(1)
    assert world.processes[second.worker].is_serving
    world.run(numbers())
    assert states(world, 1) == ["accepting"], "the wanted slot accepts, so the other one went"
    assert second.worker not in world.processes


# --- surge ----------------------------------------------------------------------------------------------------------


def surged(world: World, timings: Timings) -> list[tuple[int, int]]:
    """Replace worker by worker; returns (accepting old, accepting new) after each round."""
    rounds = []
    for _ in range(20):
        old, new = states(world, 1).count("accepting"), states(world, 2).count("accepting")
        rounds.append((old, new))
        if old == 0:
            return rounds
        finish_drains(world)
        for process in members(world, 2):
            while process.step():
                while process.outbox:
                    world.deliver(process)
    raise AssertionError("the surge does not end")


def test_a_surge_replaces_worker_by_worker_within_its_memory() -> None:
    timings = numbers(workers=4, surge=1)
    world = live(numbers(workers=4))
    request = world.reload()
    go_live(world, timings)
    assert "with 1 of 4 workers; the others follow" in world.answers[request].message
    assert surged(world, timings) == [(3, 1), (2, 2), (1, 3), (0, 4)]


def test_a_surge_of_two_replaces_two_at_a_time() -> None:
    timings = numbers(workers=4, surge=2)
    world = live(numbers(workers=4))
    world.reload()
    go_live(world, timings)
    assert surged(world, timings) == [(2, 2), (0, 4)]


def test_a_surge_waits_for_the_room_that_a_drain_holds() -> None:
    timings = numbers(workers=4, surge=1)
    world = live(numbers(workers=4))
    world.reload()
    go_live(world, timings)
    assert len(world.processes) == 5
    assert states(world, 2) == ["accepting"]
    finish_drains(world)
    assert states(world, 2) == ["accepting", "starting"]


def test_a_surge_that_fails_before_its_commit_rolls_back() -> None:
    world = live()
    request = world.reload()
    world.prepared(world.preparing[0], numbers(surge=1))
    (first,) = members(world, 2)
    crash(world, first)
    rolled_back(world, request)


def test_a_crash_after_a_surge_commits_is_retried_while_the_old_ones_serve() -> None:
    timings = numbers(workers=4, surge=1)
    world = live(numbers(workers=4))
    world.reload()
    go_live(world, timings)
    finish_drains(world)
    for _ in range(BREAKER_CRASHES + 2):
        world.advance(BREAKER_DELAY_SECONDS)
        for process in members(world, 2):
            if not process.is_serving:
                crash(world, process)
    assert states(world, 1).count("accepting") == 3
    assert world.supervisor.fleet.generations[2].state is GenerationState.LIVE
    world.settle(timings)
    assert states(world, 2) == ["accepting"] * 4


def test_in_a_surge_an_old_worker_that_does_not_accept_goes_first() -> None:
    world = live(numbers(workers=4))
    crash(world, members(world, 1)[0])
    replacement = members(world, 1)[-1]
    world.reload()
    go_live(world, numbers(workers=4, surge=1))
    assert replacement.signal_deadline is not None
    assert states(world, 1).count("accepting") == 3


def test_a_reload_in_the_middle_of_a_surge_goes_first_and_keeps_the_bound() -> None:
    timings = numbers(workers=4, surge=1)
    world = live(numbers(workers=4))
    world.reload()
    go_live(world, timings)
    world.reload()
    world.prepared(world.preparing[0], timings)
    assert not members(world, 3), "five workers live: no room before the drain ends"
    finish_drains(world)
    assert states(world, 3) == ["starting"]
    assert states(world, 2) == ["accepting"], "what will be replaced does not grow"
    go_live(world, timings)
    world.settle(timings)
    assert list(world.supervisor.fleet.generations) == [3]
    assert states(world, 3) == ["accepting"] * 4


# --- crashes --------------------------------------------------------------------------------------------------------


def test_a_crashed_worker_is_replaced_at_once_in_its_slot_and_generation() -> None:
    world = live()
    first, second = members(world, 1)
    actions = crash(world, first, "was killed by SIGSEGV")
    assert spawned(actions) == [(1, 0)]
    assert "slot 0: worker 1 (slot 0) was killed by SIGSEGV; crash 1 in a row" in of(actions, LogWarning)[0].message
    assert world.processes[second.worker].is_serving


def crash_again(world: World) -> float:
    """The worker of slot 0 crashes; returns how long until it is replaced."""
    process = next(process for process in world.processes.values() if process.slot == 0)
    before = world.now
    if spawned(crash(world, process)):
        return 0.0
    while not any(process.slot == 0 for process in world.processes.values()):
        deadline = world.supervisor.next_deadline()
        assert deadline is not None
        world.advance(deadline - world.now)
    return round(world.now - before, 3)


def test_a_crash_loop_backs_off_and_trips_a_breaker_that_says_so_once() -> None:
    world = live()
    world.advance(STABLE_SECONDS)
    waits = [crash_again(world) for _ in range(BREAKER_CRASHES + 2)]
    assert waits == [0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 30.0, 30.0, 30.0]
    said = [warning for warning in of(world.actions, LogWarning) if "crash loop" in warning.message]
    assert len(said) == 1


def test_a_worker_that_says_why_it_failed_is_backed_off_too() -> None:
    world = live()
    replaced_at_once = []
    for _ in range(3):
        process = next(process for process in world.processes.values() if process.slot == 0)
        actions = world.handle(FailedSaid(process.worker, "ImportError: gone"))
        assert not spawned(actions), "its slot is free only when it ended and its crash was counted"
        replaced_at_once.append(bool(spawned(crash(world, process))))
        world.advance(0.5)
    assert replaced_at_once == [True, False, False]
    assert world.supervisor.fleet.generations[1].respawns[0].crashes == 3


def test_a_worker_that_accepted_long_enough_ends_the_row_of_crashes() -> None:
    world = live()
    for _ in range(3):
        crash_again(world)
    world.run(numbers())
    world.advance(STABLE_SECONDS)
    assert not world.supervisor.fleet.generations[1].respawns
    assert crash_again(world) == 0.0


def test_a_replacement_that_hangs_in_its_boot_is_killed_and_counted() -> None:
    world = live()
    crash_again(world)
    replacement = next(process for process in world.processes.values() if process.slot == 0)
    replacement.is_hung = True
    world.advance(BOOT_SECONDS)
    assert SendSignal(replacement.worker, Signal.DUMP) in world.actions
    assert len([process for process in world.processes.values() if process.slot == 0]) == 1
    world.advance(2.0)
    world.handle(replacement.outbox.popleft())
    assert world.supervisor.fleet.generations[1].respawns[0].crashes == 2


def test_a_crash_of_a_draining_worker_is_not_replaced() -> None:
    world = live()
    world.reload()
    go_live(world)
    assert not spawned(crash(world, members(world, 1)[0]))


@pytest.mark.parametrize("said", [HelloSaid, ReadySaid, OpenedSaid])
def test_a_worker_that_speaks_out_of_order_is_killed_and_nobody_else_is_touched(
    said: type[HelloSaid | ReadySaid | OpenedSaid],
) -> None:
    world = live()
    first, second = members(world, 1)
    actions = world.handle(said(first.worker))
    assert of(actions, SendSignal) == [SendSignal(first.worker, Signal.KILL)]
    assert "ACCEPTING" in of(actions, LogWarning)[0].message
    assert world.processes[second.worker].is_serving
    assert spawned(world.handle(first.outbox.popleft())) == [(1, 0)]


def test_a_worker_whose_channel_broke_is_killed_and_replaced() -> None:
    world = live()
    first, _ = members(world, 1)
    actions = world.handle(WorkerBroke(first.worker, "garbage"))
    assert of(actions, SendSignal) == [SendSignal(first.worker, Signal.KILL)]
    assert spawned(world.handle(first.outbox.popleft())) == [(1, 0)]


def test_a_draining_worker_that_breaks_counts_no_crash_for_its_slot() -> None:
    world = live()
    first, _ = members(world, 1)
    world.handle(LeavingSaid(first.worker, "TERM"))
    world.handle(WorkerBroke(first.worker, "garbage"))
    world.handle(first.outbox.popleft())
    assert not world.supervisor.fleet.generations[1].respawns


def test_a_worker_that_leaves_by_itself_is_replaced_at_once_and_counts_no_crash() -> None:
    world = live()
    first, _ = members(world, 1)
    actions = world.handle(LeavingSaid(first.worker, "TERM"))
    assert of(actions, Drain) == [Drain(first.worker, DRAIN_SECONDS)]
    assert spawned(actions) == [(1, 0)]
    assert not spawned(crash(world, first, "exited 0"))
    assert not world.supervisor.fleet.generations[1].respawns


def test_a_replacement_that_leaves_before_it_accepts_is_replaced() -> None:
    world = live()
    crash_again(world)
    replacement = next(process for process in world.processes.values() if process.slot == 0)
    actions = world.handle(LeavingSaid(replacement.worker, "TERM"))
    assert of(actions, SendSignal) == [SendSignal(replacement.worker, Signal.TERM)]
    crash(world, replacement, "exited 0")
    world.settle(numbers())
    assert states(world, 1) == ["accepting", "accepting"]


# --- drains and generations -----------------------------------------------------------------------------------------


def test_a_drain_that_does_not_end_gets_term_and_then_kill() -> None:
    world = live(numbers(workers=1))
    world.reload()
    go_live(world, numbers(workers=1))
    (old,) = members(world, 1)
    old.is_hung = True
    assert old.drain_deadline is not None
    drained_at = old.drain_deadline - DRAIN_SECONDS - 2.0
    world.advance(old.drain_deadline - world.now - 0.1)
    assert not of(world.actions, SendSignal)
    world.advance(0.11)
    assert of(world.actions, SendSignal) == [SendSignal(old.worker, Signal.TERM)]
    world.advance(2.0)
    assert of(world.actions, SendSignal)[-1] == SendSignal(old.worker, Signal.KILL)
    assert world.now == pytest.approx(drained_at + DRAIN_SECONDS + 4.0, abs=0.1)


def test_the_oldest_drain_is_squeezed_when_there_are_too_many_generations() -> None:
    world = live()
    for _ in range(2):
        world.reload()
        go_live(world)
    assert states(world, 1) == states(world, 2) == ["draining", "draining"]
    before = len(world.actions)
    world.reload()
    go_live(world)
    squeezed = [action for action in of(world.actions[before:], Drain) if action.seconds == SQUEEZE_SECONDS]
    assert [action.worker for action in squeezed] == [1, 2]
    text = "generation 1 is ended early: more than 3 generations; reloads come faster than drains end"
    assert of(world.actions, LogWarning) == [LogWarning(text)]


def test_a_generation_that_begins_to_drain_beyond_the_cap_is_squeezed_without_another_reload() -> None:
    """In a surge a generation retires worker by worker: it may not have drained when the next reload was prepared."""
    world = live()
    world.reload()
    go_live(world, numbers(surge=1, max_generations=2))
    assert states(world, 1) == ["draining", "accepting"]
    world.reload()
    go_live(world, numbers(max_generations=2))
    assert states(world, 2) == ["draining"]
    assert [action.worker for action in of(world.actions, Drain) if action.seconds == SQUEEZE_SECONDS] == [1, 2]


def test_a_generation_that_is_squeezed_as_it_begins_to_drain_has_time_to_hand_its_connections_over() -> None:
    world = live()
    world.reload()
    go_live(world, numbers(max_generations=1))
    assert states(world, 1) == ["draining", "draining"]
    assert SQUEEZE_SECONDS >= 1.0
    drains = of(world.actions, Drain)
    assert [action.seconds for action in drains] == [DRAIN_SECONDS] * 2 + [SQUEEZE_SECONDS] * 2


def test_a_late_confirmation_does_not_stop_a_drain() -> None:
    world = live()
    booting_reload(world)
    world.run(numbers())
    world.advance(1.0)
    first, second = members(world, 2)
    first.step()
    crash(world, second)
    assert states(world, 2) == ["draining"]
    deadline = world.supervisor.next_deadline()
    world.deliver(first)
    assert states(world, 2) == ["draining"]
    assert world.supervisor.next_deadline() == deadline


@pytest.mark.parametrize(
    "event",
    [
        HelloSaid(99),
        ReadySaid(99),
        OpenedSaid(99),
        ProgressSaid(99, "x"),
        LeavingSaid(99, "x"),
        FailedSaid(99, "x"),
        WorkerBroke(99, "x"),
        WorkerExited(99, "x"),
    ],
    ids=lambda event: type(event).__name__,
)
def test_events_of_workers_that_are_gone_are_ignored(event: Event) -> None:
    world = live()
    assert world.supervisor.handle(event, world.now) == []


def test_an_unknown_generation_cannot_be_stopped_and_the_answer_names_those_there_are() -> None:
    world = live()
    verdict = world.answers[world.stop_generation(7)]
    assert (verdict.exit_code, verdict.message) == (ExitCode.REFUSED, "stop: no generation 7; there are: 1")


def test_the_live_generation_cannot_be_stopped_alone() -> None:
    world = live()
    verdict = world.answers[world.stop_generation(1)]
    assert verdict.exit_code is ExitCode.REFUSED
    assert states(world, 1) == ["accepting", "accepting"]


def test_stopping_a_starting_generation_aborts_its_reload() -> None:
    world = live()
    reload, _ = booting_reload(world)
    request = world.stop_generation(2)
    assert world.answers[request].exit_code is ExitCode.DONE
    finish_drains(world)
    assert world.answers[reload].exit_code is ExitCode.ABORTED
    assert world.answers[reload].message == "aborted: stopped by the operator; generation 1 stays live"


def test_stopping_a_draining_generation_ends_its_drain_now() -> None:
    world = live()
    world.reload()
    go_live(world)
    before = len(world.actions)
    world.stop_generation(1)
    assert [action.seconds for action in of(world.actions[before:], Drain)] == [0.0, 0.0]
    assert states(world, 2) == ["accepting", "accepting"]


# --- deadlines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.__name__)
def test_every_worker_that_is_not_at_rest_has_a_deadline(phase: Callable[[World], None]) -> None:
    """READY waits for its siblings or the probation, KILLED for the exit; all others but ACCEPTING have a deadline."""
    world = live()
    phase(world)
    for worker in world.supervisor.fleet.workers.values():
        if worker.state not in (WorkerState.READY, WorkerState.ACCEPTING, WorkerState.KILLED):
            assert worker.deadline is not None, worker
            assert worker.deadline > world.now


def test_a_service_at_rest_has_nothing_due() -> None:
    world = live()
    world.advance(STABLE_SECONDS)
    assert world.supervisor.next_deadline() is None


def test_a_slot_that_waits_for_room_is_no_busy_loop() -> None:
    timings = numbers(workers=4, surge=1)
    world = live(numbers(workers=4))
    world.reload()
    go_live(world, timings)
    deadline = world.supervisor.next_deadline()
    assert deadline is not None
    assert deadline > world.now
