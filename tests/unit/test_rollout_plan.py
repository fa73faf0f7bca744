"""Rollouts as decisions: random fleets, failures and crashes of the deployer, in a world that is simulated."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lb.core.rollout.budget import over_budget
from lb.core.rollout.model import Deploy, Host
from lb.core.rollout.plan import (
    ON_HOSTS,
    VERSIONED,
    CannotPlan,
    Kind,
    Seen,
    Step,
    filled,
    pooled,
    rolling,
)
from lb.core.rollout.progress import (
    Do,
    End,
    Record,
    Run,
    State,
    TurnBack,
    Verdict,
    can_turn_back,
    tried_again,
    turned_back,
    unsettled,
    what_next,
)

BALANCERS = ("lb1", "lb2")
COMMANDS = {"stage": "stage {version}", "activate": "activate {version}", "reload": "reload {host}"}


def rolling_of(count: int, **fields: object) -> Deploy:
    hosts = tuple(Host(name=f"h{number}", server=f"shop/h{number}") for number in range(count))
    return Deploy(service="shop", hosts=hosts, balancers=BALANCERS, **COMMANDS, **fields)  # type: ignore[arg-type]


def pools_of(count: int, **fields: object) -> Deploy:
    hosts = tuple(
        Host(name=f"{pool}{number}", server=f"shop/{pool}/h{number}")
        for pool in ("blue", "green")
        for number in range(count)
    )
    return Deploy(service="shop", hosts=hosts, balancers=BALANCERS, **COMMANDS, **fields)  # type: ignore[arg-type]


class Crash(Exception):
    """The deployer is killed."""


class World:
    """Hosts and balancers. What fails, and where the deployer dies, is drawn beforehand."""

    def __init__(self, deploy: Deploy, down: Iterable[str], failing: set[str], crashes: set[int]) -> None:
        self.deploy = deploy
        self.failing, self.crashes = failing, crashes
        self.version = {one.name: "v1" for one in deploy.hosts}
        self.unhealthy = set(down)
        self.drained: set[tuple[str, str]] = set()
        self.active = dict.fromkeys(BALANCERS, "blue")
        self.kept: dict[str, bool] = {}
        """Outcomes on hosts, by the operation's id."""
        self.log: list[str] = []
        self._moments = 0

    @property
    def down(self) -> set[str]:
        return self.unhealthy | {host for host, _ in self.drained}

    def moment(self) -> None:
        """Between two things that a deployer does."""
        self._moments += 1
        if self._moments in self.crashes:
            raise Crash

    def perform(self, step: Step, attempt: int) -> bool:
        if step.kind not in ON_HOSTS:
            return self._observe(step) and f"{step.id}/{attempt}" not in self.failing
        operation = f"{step.id}/{attempt}"
        if operation not in self.kept:
            self.log.append(operation)
            self.kept[operation] = self._command(step, operation not in self.failing)
        return self.kept[operation]

    def _command(self, step: Step, is_good: bool) -> bool:
        if step.kind in VERSIONED:
            self._may_change(step.host)
        if step.kind is Kind.ACTIVATE and is_good:
            self.version[step.host] = step.version
        if step.kind is Kind.RELOAD:
            bad = not is_good or f"{self.version[step.host]} on {step.host} is bad" in self.failing
            (self.unhealthy.add if bad else self.unhealthy.discard)(step.host)
        return is_good

    def _may_change(self, host: str) -> None:
        """A host that serves is touched only within the budget."""
        if self.deploy.strategy == "rolling" and host not in self.down:
            assert len(self.down | {host}) <= self.deploy.max_unavailable, f"{host} beside {self.down}"
        if self.deploy.strategy != "rolling":
            assert self.deploy.host(host).pool not in self.active.values(), f"{host} gets connections"

    def _observe(self, step: Step) -> bool:
        match step.kind:
            case Kind.BUDGET:
                return over_budget(self.deploy, step.hosts, self.down) is None
            case Kind.DRAIN:
                self._may_change(step.host)
                self.drained.add((step.host, step.balancer))
            case Kind.READY:
                self.drained.discard((step.host, step.balancer))
                return step.host not in self.unhealthy
            case Kind.HEALTHY:
                return step.host not in self.unhealthy
            case Kind.PREPARE:
                return self._is_healthy(step.pool)
            case Kind.SWITCH:
                if step.pool != "blue":
                    assert self._is_healthy(step.pool), "connections to a pool that did not pass"
                self.active[step.balancer] = step.pool
            case Kind.BAKE:
                return not set(step.hosts) & self.unhealthy
        return True

    def _is_healthy(self, pool: str) -> bool:
        return not any(one.name in self.unhealthy for one in self.deploy.hosts if one.pool == pool)


class Deployer:
    """Begins, is killed, and goes on from the journal, until there is a verdict."""

    def __init__(self, world: World, run: Run, abort_after: int | None = None) -> None:
        self.world, self.run = world, run
        self.records: dict[str, Record] = {}
        self._abort_after = abort_after

    def finish(self) -> End:
        for _ in range(1000):
            try:
                return self._work()
            except Crash:
                pass
        raise AssertionError("no end")

    def _work(self) -> End:
        for _ in range(1000):
            if self._is_aborted():
                continue
            match what_next(self.run, self.records):
                case End() as end:
                    return end
                case TurnBack(reason):
                    self.run = turned_back(self.run, self.records, reason)
                    self.world.moment()
                case Do(_, steps):
                    self._do(steps)
        raise AssertionError("no end")

    def _is_aborted(self) -> bool:
        if self._abort_after is None or len(self.records) < self._abort_after or self.run.back is not None:
            return False
        if not can_turn_back(self.run, self.records):
            return False
        open_steps = unsettled(self.run, self.records)
        if open_steps is not None:
            self._do(open_steps.steps)
        else:
            self.run = turned_back(self.run, self.records, "aborted", is_aborted=True)
        return True

    def _do(self, steps: tuple[Step, ...]) -> None:
        for step in steps:
            self.records[step.id] = Record(step=step.id, state=State.BEGUN, attempt=self.run.attempt, at=0.0)
        for step in steps:
            self.world.moment()
            is_good = self.world.perform(step, self.run.attempt)
            self.world.moment()
            state = State.DONE if is_good else State.FAILED
            self.records[step.id] = Record(
                step=step.id, state=state, attempt=self.run.attempt, at=0.0, note=f"{step.id} failed"
            )


def begun(deploy: Deploy, seen: Seen) -> Run:
    make = rolling if deploy.strategy == "rolling" else pooled
    return Run(
        id="r1",
        version="v2",
        deploy=deploy,
        plan=make(deploy, "v2", BALANCERS, seen),
        seen=seen,
        who="ann",
        began_at=0.0,
    )


def seen(deploy: Deploy, down: Iterable[str] = (), known: bool = True) -> Seen:
    previous = {one.name: "v1" for one in deploy.hosts} if known else {}
    return Seen(previous=previous, down=tuple(down), active="blue")


def step_ids(run: Run) -> list[str]:
    return [step.id for group in run.plan for step in group.steps]


crashes = st.sets(st.integers(1, 60), max_size=5)


@given(st.data())
def test_whatever_fails_and_whenever_the_deployer_dies_a_rolling_run_keeps_its_budget_and_ends(
    data: st.DataObject,
) -> None:
    deploy = rolling_of(
        data.draw(st.integers(1, 6), "hosts"),
        drain=data.draw(st.booleans(), "drain"),
        batch=data.draw(st.sampled_from(["1", "2", "50%"]), "batch"),
        max_unavailable=data.draw(st.integers(1, 3), "budget"),
    )
    names = [one.name for one in deploy.hosts]
    down = data.draw(st.sets(st.sampled_from(names), max_size=2), "down")
    run = begun(deploy, seen(deploy, down))
    bad = [f"v2 on {name} is bad" for name in names]
    failures = [f"{one}/1" for one in step_ids(run) if "ready" not in one]
    failing = data.draw(st.sets(st.sampled_from([*failures, *bad]), max_size=2), "failing")
    world = World(deploy, down, failing, data.draw(crashes, "crashes"))
    deployer = Deployer(world, run, data.draw(st.none() | st.integers(0, 30), "abort"))
    end = deployer.finish()
    assert len(world.log) == len(set(world.log)), "nothing is done twice"
    match end.verdict:
        case Verdict.COMMITTED:
            assert set(world.version.values()) == {"v2"}
            assert not world.down
        case Verdict.ROLLED_BACK | Verdict.ABORTED:
            assert set(world.version.values()) == {"v1"}
            assert not world.drained
            assert world.unhealthy <= down
        case Verdict.PARTIAL:
            assert down, "without trouble from before the way back is free"


@given(st.data())
def test_whatever_fails_connections_go_to_a_pool_that_passed_and_the_run_ends(data: st.DataObject) -> None:
    deploy = pools_of(
        data.draw(st.integers(1, 3), "hosts"),
        strategy=data.draw(st.sampled_from(["blue-green", "canary"]), "strategy"),
        discard=data.draw(st.sampled_from([None, "discard {version}"]), "discard"),
        retire=data.draw(st.sampled_from([None, "retire"]), "retire"),
    )
    run = begun(deploy, seen(deploy))
    bad = [f"v2 on {one.name} is bad" for one in deploy.hosts]
    failing = data.draw(st.sets(st.sampled_from([*(f"{one}/1" for one in step_ids(run)), *bad]), max_size=2), "failing")
    world = World(deploy, (), failing, data.draw(crashes, "crashes"))
    end = Deployer(world, run, data.draw(st.none() | st.integers(0, 30), "abort")).finish()
    wanted = "green" if end.verdict is Verdict.COMMITTED else "blue"
    assert end.verdict is not Verdict.PARTIAL
    assert set(world.active.values()) == {wanted}
    if wanted == "green":
        assert {world.version[one.name] for one in deploy.hosts if one.pool == "green"} == {"v2"}


def finish(deploy: Deploy, *failing: str, known: bool = True, down: Iterable[str] = ()) -> tuple[World, Deployer, End]:
    world = World(deploy, down, set(failing), set())
    deployer = Deployer(world, begun(deploy, seen(deploy, down, known)))
    return world, deployer, deployer.finish()


def test_only_the_hosts_that_were_touched_go_back() -> None:
    world, _, end = finish(rolling_of(4), "b3.reload.h2/1")
    assert end == End(Verdict.ROLLED_BACK, "b3.reload.h2 failed")
    assert [one for one in world.log if "h3" in one] == []
    assert [one for one in world.log if one.startswith("undo")] == [
        "undo1.activate.h2/1",
        "undo1.reload.h2/1",
        "undo2.activate.h0/1",
        "undo2.reload.h0/1",
        "undo3.activate.h1/1",
        "undo3.reload.h1/1",
    ]


def test_by_the_policy_stop_everything_stays_as_it_is() -> None:
    world, _, end = finish(rolling_of(3, on_failure="stop"), "b2.reload.h1/1")
    assert end == End(Verdict.PARTIAL, "stopped: b2.reload.h1 failed; hosts with v2: h0")
    assert world.version == {"h0": "v2", "h1": "v2", "h2": "v1"}


def test_hosts_that_were_down_come_first_and_are_no_part_of_a_batch_with_others() -> None:
    deploy = rolling_of(4, batch="2", max_unavailable=2)
    plan = rolling(deploy, "v2", BALANCERS, seen(deploy, ["h3"]))
    staged = [[step.host for step in group.steps] for group in plan if group.steps[0].kind is Kind.STAGE]
    assert staged == [["h3"], ["h0", "h1"], ["h2"]]


def test_once_runs_on_one_host_before_the_first_activation() -> None:
    deploy = rolling_of(2, once="migrate {version}")
    ids = step_ids(begun(deploy, seen(deploy)))
    assert [one for one in ids if "once" in one] == ["b1.once.h0"]
    assert ids.index("b1.stage.h0") < ids.index("b1.once.h0") < ids.index("b1.activate.h0")


def test_a_host_whose_previous_version_nobody_knows_stays_and_is_told() -> None:
    world, _, end = finish(rolling_of(2), "b2.stage.h1/1", known=False)
    assert end == End(
        Verdict.PARTIAL, "b2.stage.h1 failed; and on the way back: h0: keeps v2: no previous version is known"
    )
    assert world.version == {"h0": "v2", "h1": "v1"}


def test_what_failed_on_the_way_back_is_tried_again_by_a_resume() -> None:
    world, deployer, end = finish(rolling_of(2), "b2.reload.h1/1", "undo1.activate.h1/1")
    assert end.verdict is Verdict.PARTIAL
    assert world.version == {"h0": "v2", "h1": "v2"}, "with one host down no other one is taken out"
    deployer.run = tried_again(deployer.run)
    assert deployer.finish().verdict is Verdict.ROLLED_BACK
    assert world.version == {"h0": "v1", "h1": "v1"}
    assert not world.down


def test_a_balancer_that_is_dead_does_not_block_the_way_back() -> None:
    deploy = pools_of(1)
    deploy = msgspec.structs.replace(deploy, strategy="blue-green")
    world, deployer, end = finish(deploy, "switch100.2/1", "undo.switch.2/1")
    assert end.verdict is Verdict.PARTIAL
    assert world.active["lb1"] == "blue"
    deployer.run = tried_again(msgspec.structs.replace(deployer.run, without={"lb2": "ann"}))
    assert deployer.finish().verdict is Verdict.ROLLED_BACK


def test_a_canary_goes_up_in_steps() -> None:
    deploy = pools_of(1, strategy="canary", steps=(5, 25))
    ids = step_ids(begun(deploy, seen(deploy)))
    assert [one for one in ids if one.startswith(("switch", "bake"))] == [
        *("switch5.1", "switch5.2", "bake5", "switch25.1", "switch25.2", "bake25"),
        *("switch100.1", "switch100.2", "bake100"),
    ]


def test_without_two_pools_there_is_no_switch() -> None:
    deploy = rolling_of(2, strategy="blue-green")
    with pytest.raises(CannotPlan, match="pool blue is active, and the hosts are in ; expected two pools"):
        pooled(deploy, "v2", BALANCERS, seen(deploy))
    with pytest.raises(CannotPlan, match="the active pool is not known"):
        pooled(pools_of(1), "v2", (), Seen())


def test_a_host_without_a_server_takes_part_without_a_balancer() -> None:
    deploy = msgspec.structs.replace(rolling_of(1, drain=True), hosts=(Host(name="jobs"),))
    assert step_ids(begun(deploy, seen(deploy))) == ["b1.stage.jobs", "b1.activate.jobs", "b1.reload.jobs", "b1.bake"]


def test_values_are_quoted_and_unknown_names_refused() -> None:
    written = "ln -s {version} ${HOME} {{x}} | awk '{ print $1 }' {version!r} {}"
    assert filled(written, {"version": "v1; rm -rf /"}) == written.replace("{version} ", "'v1; rm -rf /' ")
    for template in ("{nobody}", "${version}", "{{version}}"):
        with pytest.raises(ValueError, match=r"is not known; known: {version}"):
            filled(template, {"version": "v1"})


def test_a_thousand_hosts_are_planned() -> None:
    deploy = rolling_of(1000, batch="5%", max_unavailable=50, drain=True)
    assert len(begun(deploy, seen(deploy)).plan) == 20 * 7
