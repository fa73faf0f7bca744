"""The real deployer against played hosts and balancers: it dies, stands still, loses questions and answers, some of
which arrive late; commands fail, versions are bad, hosts die meanwhile. Drawn by Hypothesis."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handoff.errors import HandoffError
from lb.core.admin import Answer, Drain, Prepare, Request, Status, Switch
from lb.core.rollout.model import Deploy, Host
from lb.core.rollout.progress import Run, Verdict
from lb.rollout.fleet import Fleet
from lb.rollout.journal import Journal
from lb.rollout.report import Lines
from lb.rollout.session import Session
from lb.rollout.stores.base import Fenced, StoreError
from lb.rollout.transport import Done, Unreachable
from tests.sim.memory_store import MemoryStore
from tests.sim.rollout_world import PlayedBalancer, PlayedHost, World

SECONDS = 60.0
LEASE_SECONDS = 1000.0
MAXIMUM_DEPLOYERS = 20
LATE_MOMENTS = 5
COMMANDS = {
    "stage": "stage {version} {host}",
    "activate": "activate {version} {host}",
    "reload": "reload {version} {host}",
}
FAULTS = ("die", "lose the question", "lose the answer", "deliver late", "stand still")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lb.rollout.transport.REPEAT_SECONDS", (0.0,))
    monkeypatch.setattr("lb.rollout.runner.STORE_RETRY_SECONDS", 0.0)
    monkeypatch.setattr("lb.rollout.session.STORE_RETRY_SECONDS", 0.0)


class Killed(BaseException):
    """Nothing handles it."""


class Life:
    """Of one deployer: what befalls it at which of its questions. After its death it asks none any more."""

    def __init__(self, world: Faulty, faults: Mapping[int, str]) -> None:
        self._world, self._faults = world, faults
        self._moments = itertools.count(1)
        self.is_over = False
        self.stands_still, self.goes_on = asyncio.Event(), asyncio.Event()

    def fault(self) -> str | None:
        if self.is_over:
            raise Killed
        self._world.tick()
        found = self._faults.get(next(self._moments))
        if found == "die":
            self.is_over = True
            raise Killed
        return found

    def write(self, when: str) -> None:
        """To the store, whose questions come from threads: there it cannot stand still."""
        if when == "release":
            if self.is_over:
                raise Killed
            return
        fault = self.fault()
        if (fault, when) in (("lose the question", "before"), ("lose the answer", "behind")):
            raise StoreError("store: connection lost")

    async def pause(self) -> None:
        self.stands_still.set()
        await self.goes_on.wait()


class Faulty(World):
    """With versions of hosts, and with what must hold at each moment."""

    def __init__(self, deploy: Deploy, bad: set[str], failing: set[str]) -> None:
        super().__init__(deploy)
        self.balancers = {name: FaultyBalancer(self, name) for name in deploy.balancers}
        self.version = {one.name: "v1" for one in deploy.hosts}
        self.bad, self.failing = bad, failing
        """Hosts on which v2 is unhealthy; commands that fail."""
        self.late: list[tuple[int, Callable[[], None]]] = []
        """What is still on its way, and for how long."""
        self.trouble: set[str] = set()
        """Hosts that died by themselves."""

    def tick(self) -> None:
        late, self.late = self.late, []
        self.late = [(left - 1, one) for left, one in late if left > 0]
        for _, one in (item for item in late if item[0] <= 0):
            one()

    def settle(self) -> None:
        """Everything arrives."""
        while self.late:
            self.tick()

    def down(self) -> set[str]:
        out = {host.name for host in self.deploy.hosts for one in self.balancers.values() if host.server in one.drained}
        return {one.name for one in self.deploy.hosts if one.server} & (self.sick | out)

    def may_change(self, host: Host) -> None:
        """A host that serves is touched within the budget only; one of a pool only without connections."""
        if host.server is None:
            return
        if self.deploy.strategy == "rolling":
            if host.name not in self.down():
                assert len(self.down() | {host.name}) <= self.deploy.max_unavailable, (host.name, self.down())
        else:
            shares = [one.percents[host.pool or ""] for one in self.balancers.values()]
            assert not any(shares), f"{host.name} gets connections"

    def run(self, host: Host, operation: str, command: str) -> Done:
        self.log.append(command)
        kind, version, _ = command.split()
        is_good = command not in self.failing
        if kind in ("activate", "reload", "discard", "retire"):
            self.may_change(host)
        if kind == "activate" and is_good:
            self.version[host.name] = version
        if kind == "reload":
            is_sick = not is_good or (self.version[host.name] == "v2" and host.name in self.bad)
            (self.sick.add if is_sick else self.sick.discard)(host.name)
            is_good = not is_sick or (is_good and host.server is not None)  # without a check the reload says so
        self.kept[operation] = Done(0 if is_good else 1, "")
        return self.kept[operation]

    def reached_by(self, life: Life) -> Fleet:
        return Fleet(
            self.deploy,
            lambda name: View(self.balancers[name], life),
            lambda host: FaultyHost(self, host, life),
        )


class FaultyHost(PlayedHost):
    def __init__(self, world: Faulty, host: Host, life: Life) -> None:
        super().__init__(world, host)
        self.world, self.host, self.life = world, host, life

    async def execute(
        self, service: str, token: int, operation: str, command: str, timeout: float, *, retry_lost: bool = False
    ) -> Done:
        fault = self.life.fault()
        if fault == "lose the question":
            raise Unreachable(f"host {self.name}: connection lost")
        if fault == "stand still":
            await self.life.pause()
        if fault == "deliver late":
            self.world.late.append((LATE_MOMENTS, lambda: self._late(token, operation, command)))
            raise Unreachable(f"host {self.name}: no answer in time")
        done = self._do(token, operation, command)
        if fault == "lose the answer":
            raise Unreachable(f"host {self.name}: connection lost")
        return done

    def _do(self, token: int, operation: str, command: str) -> Done:
        if token < self.world.tokens.get(self.name, 0):
            raise Fenced(f"shop is fenced: token {token}")
        self.world.tokens[self.name] = token
        return self.world.kept.get(operation) or self.world.run(self.host, operation, command)

    def _late(self, token: int, operation: str, command: str) -> None:
        with contextlib.suppress(Fenced):
            self._do(token, operation, command)


class FaultyBalancer(PlayedBalancer):
    """As the real one: it sends nobody where a check has not passed."""

    def answer(self, request: Request) -> Answer:
        world = self._world
        assert isinstance(world, Faulty)
        if request.token < world.tokens.get(self.name, 0):
            return Answer(exit_code=7, message="is fenced")
        world.tokens[self.name] = request.token
        match request:
            case Drain():
                world.may_change(next(one for one in world.deploy.hosts if one.server == request.server))
            case Prepare() | Switch() if any(
                one.pool == request.pool and one.name in world.sick for one in world.deploy.hosts
            ):
                return Answer(exit_code=9, message=f"{request.pool} is not healthy; nothing changed")
        return self._answer(request)


class View(PlayedBalancer):
    """What one deployer has of a balancer."""

    def __init__(self, seen: FaultyBalancer, life: Life) -> None:
        super().__init__(seen._world, seen.name)
        self.seen, self.life = seen, life

    async def status(self) -> Status:
        if self.life.fault() in ("lose the question", "lose the answer", "deliver late"):
            raise Unreachable(f"balancer {self.name}: connection lost")
        return await self.seen.status()

    async def ask(self, request: Request, timeout: float) -> Answer:
        fault = self.life.fault()
        if fault == "lose the question":
            raise Unreachable(f"balancer {self.name}: connection lost")
        if fault == "stand still":
            await self.life.pause()
        if fault == "deliver late" and isinstance(request, Switch):
            assert isinstance(self._world, Faulty)
            self._world.late.append((LATE_MOMENTS, lambda: self.seen.answer(request) and None))
            raise Unreachable(f"balancer {self.name}: no answer in time")
        answer = self.seen.answer(request)
        if fault == "lose the answer":
            raise Unreachable(f"balancer {self.name}: connection lost")
        return answer


class Silent(Lines):
    def says(self, line: str) -> None:
        pass

    begins = ended = output = lambda *_: None  # type: ignore[assignment]


class Story:
    """One rollout, and as many deployers as it takes."""

    def __init__(self, world: Faulty, lives: Sequence[Mapping[int, str]], troubles: Sequence[set[str]]) -> None:
        self.world, self.lives, self.troubles = world, lives, troubles
        self.store = MemoryStore()
        self.zombies: list[tuple[Life, asyncio.Future[Verdict]]] = []

    async def end(self) -> Run:
        for number in range(MAXIMUM_DEPLOYERS):
            is_faulty = number < len(self.lives)
            if not is_faulty:
                self._mend()
            life = Life(self.world, self.lives[number] if is_faulty else {})
            await self._live(life, "bob" if number > len(self.lives) + 1 else None)
            run = self._run()
            if run is not None and run.verdict not in (None, Verdict.PARTIAL):
                await self._wake()
                self.world.settle()
                return run
            if is_faulty:
                self.world.sick |= self.troubles[number]
        raise AssertionError("no end")

    def _mend(self) -> None:
        """Nothing goes wrong any more but what is wrong with the version."""
        self.world.failing = set()
        for trouble in self.troubles:
            self.world.sick -= trouble

    async def _live(self, life: Life, aborted_by: str | None) -> None:
        working = asyncio.ensure_future(self._deploy(life, aborted_by))
        standing = asyncio.ensure_future(life.stands_still.wait())
        await asyncio.wait([working, standing], return_when=asyncio.FIRST_COMPLETED)
        self.store.now += 10 * LEASE_SECONDS
        if not working.done():
            self.zombies.append((life, working))
            return
        standing.cancel()
        if not isinstance(working.exception(), Killed | HandoffError | None):
            working.result()

    async def _deploy(self, life: Life, aborted_by: str | None) -> Verdict:
        self.store.on_write = life.write
        session = Session(self.world.deploy, self.store, self.world.reached_by(life), Silent())
        async with session.locked() as lease:
            if self._run() is None:
                return await session.work(lease, await session.begin("v2"), is_new=True)
            return await session.work(lease, await session.resumable(()), is_new=False, aborted_by=aborted_by)

    async def _wake(self) -> None:
        """Those that stood still go on, and come to nothing."""
        self.store.on_write = lambda when: None
        for life, working in self.zombies:
            life.goes_on.set()
            await asyncio.wait([working])
            assert isinstance(working.exception(), Fenced | HandoffError | Killed), working

    def _run(self) -> Run | None:
        journal = Journal(self.store, "shop")
        name = journal.latest()
        return None if name is None else journal.run(name)


def fleets(strategy: str, count: int) -> tuple[Host, ...]:
    if strategy == "rolling":
        names = ("a", "b", "c", "jobs")[-count:]
        return tuple(Host(name=one, ssh=one, server=None if one == "jobs" else f"shop/{one}") for one in names)
    places = [(pool, f"{pool}{number}") for pool in ("blue", "green") for number in range(count - 1)]
    return tuple(Host(name=name, ssh=name, server=f"shop/{pool}/{name}") for pool, name in places)


@st.composite
def stories(draw: st.DrawFn) -> tuple[Deploy, set[str], set[str], list[dict[int, str]], list[set[str]]]:
    strategy = draw(st.sampled_from(["rolling", "blue-green", "canary"]))
    hosts = fleets(strategy, draw(st.integers(2, 4) if strategy == "rolling" else st.integers(2, 3)))
    deploy = Deploy(
        service="shop",
        strategy=strategy,  # type: ignore[arg-type]
        hosts=hosts,
        balancers=("lb1", "lb2")[: draw(st.integers(1, 2))],
        drain=strategy == "rolling" and draw(st.booleans()),
        max_unavailable=draw(st.integers(1, 2)),
        batch=draw(st.sampled_from(["1", "2", "50%"])),
        on_failure=draw(st.sampled_from(["rollback", "rollback", "stop"])),  # type: ignore[arg-type]
        bake_seconds=0.0,
        keep_seconds=0.0,
        check_timeout_seconds=0.0,
        lock_seconds=LEASE_SECONDS,
        once="once {version} {host}",
        discard=draw(st.sampled_from([None, "discard {version} {host}"])),
        retire=draw(st.sampled_from([None, "retire {version} {host}"])),
        current="current {version} {host}",
        **COMMANDS,
    )
    names = [one.name for one in hosts]
    commands = [f"{kind} v2 {name}" for kind in ("stage", "once", "activate", "reload") for name in names]
    bad = draw(st.sets(st.sampled_from(names), max_size=1))
    failing = draw(st.sets(st.sampled_from(commands), max_size=1))
    lives = draw(st.lists(st.dictionaries(st.integers(1, 50), st.sampled_from(FAULTS), max_size=3), max_size=4))
    rolls = [name for name in names if name != "jobs"] if strategy == "rolling" else []
    trouble = st.sets(st.sampled_from(rolls), max_size=1) if rolls else st.just(set())
    return deploy, bad, failing, lives, draw(st.lists(trouble, min_size=len(lives), max_size=len(lives)))


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(stories())
def test_whatever_befalls_deployers_a_run_ends_in_one_verdict_and_all_is_as_it_says(
    story: tuple[Deploy, set[str], set[str], list[dict[int, str]], list[set[str]]],
) -> None:
    deploy, bad, failing, lives, troubles = story

    async def play() -> None:
        async with asyncio.timeout(SECONDS):
            world = Faulty(deploy, bad, failing)
            run = await Story(world, lives, troubles).end()
            assert not any(one.drained for one in world.balancers.values())
            pool = "green" if run.verdict is Verdict.COMMITTED else "blue"
            serving = {one.name for one in deploy.hosts if one.pool in (None, pool)}
            assert world.sick & serving <= set().union(*troubles), "but for those that died by themselves"
            once = [line for line in world.log if line.startswith("once")]
            assert len(once) <= run.attempt
            new = run.verdict is Verdict.COMMITTED
            if deploy.strategy == "rolling":
                assert set(world.version.values()) == {"v2" if new else "v1"}
            else:
                wanted = {"blue": 0, "green": 100} if new else {"blue": 100, "green": 0}
                assert all(one.percents == wanted for one in world.balancers.values())
                assert not new or {world.version[one.name] for one in deploy.hosts if one.pool == "green"} == {"v2"}

    asyncio.run(play())
