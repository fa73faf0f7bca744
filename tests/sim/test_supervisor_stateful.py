"""The real supervisor in a simulated world, driven by Hypothesis. HYPOTHESIS_PROFILE=long searches for longer."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from handoff.core.fleet import DRAIN_GRACE_SECONDS, STOP_GRACE_SECONDS
from handoff.core.generation import Timings
from handoff.core.vocabulary import FailedSaid, LeavingSaid, ReloadRequested
from handoff.core.worker import WorkerState
from tests.sim.world import Process, World, lies

LONGEST_STOP_SECONDS = 6.0
ROUNDING_SECONDS = 1e-6
"""The clock is a float: 21.1 - 11.1 is a little more than 10."""

_PROFILES = {
    "default": {"max_examples": 120, "stateful_step_count": 50},
    "long": {"max_examples": 6000, "stateful_step_count": 120},
}
_PROFILE = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    **_PROFILES.get(os.environ.get("HYPOTHESIS_PROFILE", "default"), _PROFILES["default"]),  # type: ignore[arg-type]
)

pytestmark = pytest.mark.timeout(0)
"""The number of examples bounds it; shrinking a failure takes longer than a test may."""

timings_of_a_service = st.builds(
    Timings,
    workers=st.integers(1, 4),
    surge=st.sampled_from([None, 1, 2]),
    boot_timeout_seconds=st.just(3.0),
    probation_seconds=st.sampled_from([0.0, 1.0]),
    drain_timeout_seconds=st.sampled_from([0.5, 5.0, 40.0]),
    stop_timeout_seconds=st.sampled_from([0.0, LONGEST_STOP_SECONDS]),
    max_generations=st.integers(1, 3),
)
any_process = st.integers(0, 30)
seldom = st.sampled_from([False, False, False, False, False, True])


class SupervisedWorld(RuleBasedStateMachine):
    """Anything may happen at any time; the world checks after each event, and at the end everybody is answered."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.timings = Timings(2, None, 3.0, 1.0, 5.0, LONGEST_STOP_SECONDS, 3)
        self.world.handle(ReloadRequested())

    def _process(self, number: int) -> Process:
        processes = list(self.world.processes.values())
        return processes[number % len(processes)]

    # --- time and progress ------------------------------------------------------------------------------------------

    @precondition(lambda self: self.world.exit is None)
    @rule(seconds=st.sampled_from([0.0, 0.05, 0.3, 1.0, 2.0, 5.0, 11.0, 45.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.advance(seconds)

    @precondition(lambda self: self.world.exit is None)
    @rule()
    def everybody_goes_on(self) -> None:
        self.world.run(self.timings)

    @precondition(lambda self: self.world.exit is None)
    @rule()
    def everybody_goes_on_for_a_second(self) -> None:
        self.world.run(self.timings)
        self.world.advance(1.0)
        self.world.run(self.timings)

    @precondition(lambda self: self.world.exit is None)
    @rule(timings=timings_of_a_service, steps=st.integers(0, 4))
    def a_reload_gets_as_far_as(self, timings: Timings, steps: int) -> None:
        """0 booting, 1 hello, 2 ready, 3 told to open, 4 the first of them has opened."""
        world = self.world
        if world.supervisor.fleet.starting() is None:
            world.reload()
        if world.preparing:
            world.prepared(world.preparing[0], timings)
        for step in range(min(steps, 2)):
            self._starting_workers_go_on(step)
        if steps > 2:
            world.advance(1.0)
        if steps > 3:
            self._starting_workers_go_on(2, at_most=1)

    def _starting_workers_go_on(self, said: int, at_most: int = 100) -> None:
        world = self.world
        starting = world.supervisor.fleet.starting()
        number = starting.generation if starting is not None else 0
        members = [
            process for process in world.processes.values() if (process.generation, process.said) == (number, said)
        ]
        for process in members[:at_most]:
            process.step()
            while process.outbox and process.worker in world.processes:
                world.deliver(process)

    @precondition(lambda self: self.world.preparing)
    @rule(timings=timings_of_a_service, is_good=st.booleans())
    def preparing_ends(self, timings: Timings, is_good: bool) -> None:
        prepare = self.world.preparing[0]
        if is_good or self.world.live is None:
            self.world.prepared(prepare, timings)
        else:
            self.world.prepare_failed(prepare)

    @precondition(lambda self: self.world.preparing)
    @rule(is_first=seldom)
    def preparing_fails(self, is_first: bool) -> None:
        if is_first or self.world.live is not None:
            self.world.prepare_failed(self.world.preparing[0])

    @rule(timings=timings_of_a_service)
    def the_configuration_changes(self, timings: Timings) -> None:
        self.timings = timings

    # --- what one process does --------------------------------------------------------------------------------------

    @precondition(lambda self: self.world.processes)
    @rule(number=any_process)
    def a_process_goes_on(self, number: int) -> None:
        self._process(number).step()

    @precondition(lambda self: self.world.processes)
    @rule(number=any_process)
    def a_message_arrives(self, number: int) -> None:
        process = self._process(number)
        if process.outbox:
            self.world.deliver(process)

    @precondition(lambda self: self.world.processes)
    @rule(number=any_process, is_heard=st.booleans())
    def a_process_crashes(self, number: int, is_heard: bool) -> None:
        process = self._process(number)
        process.end("was killed by SIGSEGV")
        while is_heard and process.worker in self.world.processes and process.outbox:
            self.world.deliver(process)

    @precondition(lambda self: self.world.live is not None and self.world.processes)
    @rule()
    def all_processes_crash(self) -> None:
        for process in list(self.world.processes.values()):
            process.end("was killed by the kernel")

    @precondition(lambda self: self.world.processes)
    @rule(number=any_process)
    def a_process_hangs(self, number: int) -> None:
        self._process(number).is_hung = True

    @precondition(lambda self: self.world.processes)
    @rule(number=any_process, lie=st.integers(0, 5), is_heard=st.booleans())
    def a_process_says_anything(self, number: int, lie: int, is_heard: bool) -> None:
        process = self._process(number)
        if process.has_ended:
            return
        process.outbox.append(lies(process)[lie])
        while is_heard and process.worker in self.world.processes and process.outbox:
            self.world.deliver(process)

    @precondition(lambda self: self.world.processes)
    @rule(number=any_process, event=st.sampled_from([LeavingSaid, FailedSaid]))
    def a_process_leaves_or_fails(self, number: int, event: type[LeavingSaid | FailedSaid]) -> None:
        process = self._process(number)
        if not process.has_ended:
            process.outbox.append(event(process.worker, "of its own accord"))
        while process.worker in self.world.processes and process.outbox:
            self.world.deliver(process)

    @precondition(lambda self: self.world.exit is None)
    @rule(worker=st.integers(1, 400), lie=st.integers(0, 5))
    def a_process_that_is_gone_is_heard(self, worker: int, lie: int) -> None:
        if worker not in self.world.processes:
            self.world.handle(lies(Process(worker, 0, 0, 0.0, 0.0))[lie])

    # --- what operators ask -----------------------------------------------------------------------------------------

    @precondition(lambda self: self.world.exit is None)
    @rule(label=st.sampled_from([None, "v1", "v2"]))
    def reload(self, label: str | None) -> None:
        self.world.reload(label)

    @precondition(lambda self: self.world.exit is None)
    @rule()
    def rollback(self) -> None:
        self.world.reload(is_rollback=True)

    @precondition(lambda self: self.world.exit is None)
    @rule(workers=st.integers(0, 5))
    def scale(self, workers: int) -> None:
        self.world.scale(workers)

    @precondition(lambda self: self.world.exit is None)
    @rule(change=st.sampled_from([-1, 1]))
    def one_worker_more_or_less(self, change: int) -> None:
        self.world.scale(change=change)

    @precondition(lambda self: self.world.exit is None)
    @rule(generation=st.integers(1, 12), is_now=st.booleans(), is_first=seldom)
    def stop_a_generation(self, generation: int, is_now: bool, is_first: bool) -> None:
        if is_first or self.world.live is not None:
            self.world.stop_generation(generation, is_now)

    @precondition(lambda self: self.world.exit is None)
    @rule(is_now=st.booleans(), is_meant=seldom)
    def stop(self, is_now: bool, is_meant: bool) -> None:
        if is_meant or self.world.is_stop_asked:
            self.world.stop(is_now)

    # --- the end ----------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """The world is kind from now on: all come to rest, and all are answered. Then everything stops in time."""
        world = self.world
        world.settle(self.timings)
        assert world.asked == set(world.answers), "someone was never answered"
        if world.exit is None:
            self._check_rest()
            self._check_stop()
        assert world.exit is not None
        assert not world.supervisor.fleet.generations

    def _check_rest(self) -> None:
        fleet = self.world.supervisor.fleet
        assert not self.world.is_stop_asked, "it was to stop and rests"
        assert list(fleet.generations) == [self.world.live], "older generations rest"
        wanted = fleet.generations[self.world.live or 0].workers_wanted
        assert [worker.state for worker in fleet.workers.values()] == [WorkerState.ACCEPTING] * wanted
        assert sorted(worker.slot for worker in fleet.workers.values()) == list(range(wanted))

    def _check_stop(self) -> None:
        world = self.world
        for process in world.processes.values():
            process.is_hung = True
        begun_at = world.now
        world.stop()
        world.settle(self.timings)
        assert world.exit is not None, "a stop with hung workers never ends"
        longest_seconds = LONGEST_STOP_SECONDS + DRAIN_GRACE_SECONDS + STOP_GRACE_SECONDS
        assert world.now - begun_at <= longest_seconds + ROUNDING_SECONDS


TestSupervisedWorld = SupervisedWorld.TestCase
TestSupervisedWorld.settings = _PROFILE
