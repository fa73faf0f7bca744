"""The runner: a real store, and hosts and balancers that are played."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from handoff.errors import HandoffError, UsageError
from lb.core.desired import Desired
from lb.core.rollout.model import Deploy, Host
from lb.core.rollout.progress import Run, Verdict
from lb.rollout.journal import Journal
from lb.rollout.journal import Request as Wish
from lb.rollout.report import Lines
from lb.rollout.runner import Paused
from lb.rollout.session import Session, opened
from lb.rollout.stores.base import Fenced, Locked, StoreError
from lb.rollout.stores.sqlite import SQLiteStore, since_boot
from tests.sim.rollout_world import World

SECONDS = 30.0


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lb.rollout.transport.REPEAT_SECONDS", (0.0, 0.0))
    monkeypatch.setattr("lb.rollout.runner.STORE_RETRY_SECONDS", 0.01)
    monkeypatch.setattr("lb.rollout.actions.POLL_SECONDS", 0.01)


def rolling(**fields: object) -> Deploy:
    hosts = tuple(Host(name=name, ssh=name, server=f"shop/{name}") for name in ("a", "b", "c"))
    commands = {"stage": "stage {version} {host}", "activate": "activate {version} {host}", "reload": "reload {host}"}
    given = {"service": "shop", "hosts": hosts, "balancers": ("lb1", "lb2"), "bake_seconds": 0.0, **commands, **fields}
    return Deploy(check_timeout_seconds=0.2, **given)  # type: ignore[arg-type]


def pools(**fields: object) -> Deploy:
    hosts = tuple(Host(name=pool, ssh=pool, server=f"shop/{pool}/{pool}") for pool in ("blue", "green"))
    return rolling(strategy="blue-green", hosts=hosts, **fields)


class Bench:
    """One service, its store, and deployers one after the other."""

    def __init__(self, path: Path, deploy: Deploy) -> None:
        self.path, self.deploy = path, deploy
        self.world = World(deploy)
        self.ahead_seconds = 0.0
        """Of the clock of leases."""

    @contextlib.contextmanager
    def session(self) -> Iterator[Session]:
        store = SQLiteStore(self.path / "store.db", clock=lambda: since_boot() + self.ahead_seconds)
        try:
            yield Session(self.deploy, store, self.world.fleet(), Lines())
        finally:
            store.close()

    async def deploy_version(self, version: str = "v2") -> Verdict:
        with self.session() as session:
            async with session.locked() as lease:
                return await session.work(lease, await session.begin(version), is_new=True)

    async def resume(self, *without: str) -> Verdict:
        with self.session() as session:
            async with session.locked() as lease:
                return await session.work(lease, await session.resumable(without), is_new=False)

    async def rollback(self) -> Verdict:
        with self.session() as session:
            async with session.locked() as lease:
                return await session.work(lease, await session.begin_rollback(), is_new=True)

    def run(self) -> Run:
        with self.session() as session:
            name = session.journal.latest()
            assert name is not None
            return session.journal.run(name)

    def versions(self) -> dict[str, str]:
        with self.session() as session:
            return session.journal.versions()


def play(path: Path, deploy: Deploy, scenario: Callable[[Bench], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(SECONDS):
            await scenario(Bench(path, deploy))

    asyncio.run(run())


def test_a_rolling_run_drains_changes_and_takes_in_one_host_after_the_other(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        assert await bench.deploy_version() is Verdict.COMMITTED
        each = ["lb1 drain", "lb2 drain", "stage v2 {}", "activate v2 {}", "reload {}", "lb1 ready", "lb2 ready"]
        assert bench.world.log == [line.format(host) for host in "abc" for line in each]
        assert bench.versions() == dict.fromkeys("abc", "v2")
        run = bench.run()
        assert (run.verdict, run.version, run.kind) == (Verdict.COMMITTED, "v2", "deploy")

    play(tmp_path, rolling(drain=True), scenario)


def test_a_failure_leads_the_touched_hosts_back_to_the_version_that_they_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario(bench: Bench) -> None:
        bench.world.failing = {"activate v2 b"}
        assert await bench.deploy_version() is Verdict.ROLLED_BACK
        assert bench.world.log[-4:] == ["activate v1 b", "reload b", "activate v1 a", "reload a"]
        assert not any(" c" in line for line in bench.world.log)
        assert bench.versions() == {"a": "v1", "b": "v1"}
        assert bench.run().reason == f"b: activate exited with status 1 (operation {bench.run().id}.b2.activate.b)"

    play(tmp_path, rolling(current="cat version"), scenario)
    printed = capsys.readouterr().out
    assert "  b | output of activate v2 b" in printed
    assert "shop: deploy of v2: rolled back: b: activate exited with status 1" in printed


def test_what_a_command_printed_is_in_no_journal(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        bench.world.failing = {"stage v2 a"}
        assert await bench.deploy_version() is Verdict.ROLLED_BACK

    play(tmp_path, rolling(), scenario)
    with contextlib.closing(sqlite3.connect(tmp_path / "store.db")) as database:
        values = [bytes(value) for (value,) in database.execute("select value from entries")]
    assert values
    assert not any(b"output of" in value for value in values)


def test_an_unhealthy_new_version_goes_back(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        bench.world.sick_after_reload = {"a"}
        assert await bench.deploy_version() is Verdict.PARTIAL, "the old one is as sick"
        assert "a on lb1: shop/a is down" in bench.run().note
        bench.world.sick = set()  # somebody has mended it
        assert await bench.resume() is Verdict.ROLLED_BACK

    play(tmp_path, rolling(current="cat version"), scenario)


def test_blue_green_switches_all_balancers_and_one_rollback_switches_back(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        assert await bench.deploy_version() is Verdict.COMMITTED
        prepared = ["lb1 prepare", "lb2 prepare"]
        assert bench.world.log[:3] == ["stage v2 green", "activate v2 green", "reload green"]
        assert sorted(bench.world.log[3:5]) == prepared
        assert [one.percents["green"] for one in bench.world.balancers.values()] == [100, 100]
        assert await bench.rollback() is Verdict.COMMITTED
        assert [one.percents["blue"] for one in bench.world.balancers.values()] == [100, 100]
        assert bench.run().kind == "rollback"

    play(tmp_path, pools(), scenario)


def test_a_balancer_that_is_cut_off_in_a_switch_is_led_back_when_it_is_there_again(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        bench.world.cut_off_at_switch = {"lb2"}
        assert await bench.deploy_version() is Verdict.PARTIAL, "its way back does not answer"
        assert bench.world.balancers["lb1"].percents["blue"] == 100
        assert bench.world.balancers["lb2"].percents["green"] == 100
        assert "discard green" not in bench.world.log, "it still gets connections from there"
        bench.world.cut_off_at_switch, bench.world.unreachable = set(), set()
        assert await bench.resume() is Verdict.ROLLED_BACK
        assert bench.world.balancers["lb2"].percents["blue"] == 100
        assert bench.world.log[-1] == "discard green"

    play(tmp_path, pools(discard="discard {host}"), scenario)


def test_a_switch_whose_answer_is_lost_was_done_once(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        bench.world.answers_lost = {"lb2"}
        assert await bench.deploy_version() is Verdict.COMMITTED
        assert [one.percents["green"] for one in bench.world.balancers.values()] == [100, 100]
        assert bench.world.log.count("lb2 switch") == 1

    play(tmp_path, pools(), scenario)


def test_a_switch_that_an_operator_made_meanwhile_stays(tmp_path: Path) -> None:
    """By compare and swap it is refused; and what was refused is not led back."""

    async def scenario(bench: Bench) -> None:
        operated = bench.world.balancers["lb1"]
        bench.world.after["lb2 prepare"] = lambda: operated.switch("red", 100)
        assert await bench.deploy_version() is Verdict.ROLLED_BACK
        assert "shop is at revision 2 by now" in bench.run().reason
        assert (operated.percents["red"], operated.revision) == (100, 2)
        assert bench.world.balancers["lb2"].percents["blue"] == 100

    play(tmp_path, pools(), scenario)


def test_what_was_on_its_way_when_the_run_turned_back_is_refused_when_it_arrives(tmp_path: Path) -> None:
    """The question for a switch is lost for us, and comes when the switch was led back, as it seems."""

    async def scenario(bench: Bench) -> None:
        late = bench.world.balancers["lb2"]
        late.is_slow_to_switch = True
        assert await bench.deploy_version() is Verdict.ROLLED_BACK
        assert late.slow
        assert {late._answer(one).exit_code for one in late.slow} == {7}
        assert late.percents["blue"] == 100

    play(tmp_path, pools(), scenario)


def test_a_switch_that_was_thought_lost_and_comes_before_the_second_question_counts(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        late = bench.world.balancers["lb2"]
        late.is_slow_to_switch = True

        def arrive() -> None:
            late.is_slow_to_switch = False
            late._answer(late.slow.pop())

        bench.world.before["lb2 switch"] = lambda: arrive() if late.slow else None
        assert await bench.deploy_version() is Verdict.COMMITTED
        assert (late.percents["green"], late.revision) == (100, 2)

    play(tmp_path, pools(), scenario)


def test_a_balancer_that_says_it_has_switched_and_has_not_is_not_believed(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        bench.world.liars = {"lb2"}
        assert await bench.deploy_version() is Verdict.ROLLED_BACK
        assert bench.run().reason == "lb2: says that it has switched to green, and shows that it has not"

    play(tmp_path, pools(), scenario)


def test_a_balancer_that_is_switched_by_somebody_in_the_bake_ends_it(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        looks = itertools.count()

        def look(name: str) -> None:
            if name == "lb1" and "lb1 switch" in bench.world.log and next(looks) == 2:
                bench.world.balancers["lb1"].switch("blue", 100)

        bench.world.on_look = look
        assert await bench.deploy_version() is Verdict.ROLLED_BACK
        assert bench.run().reason == "lb1: new connections are not divided any more as this rollout has it"

    play(tmp_path, pools(bake_seconds=5.0), scenario)


def test_a_dead_balancer_is_left_out_by_name_and_that_is_journalled(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        bench.world.failing = {"reload b"}
        bench.world.sick_after_reload = {"b"}
        assert await bench.deploy_version() is Verdict.PARTIAL
        bench.world.unreachable = {"lb2"}
        bench.world.failing, bench.world.sick_after_reload = set(), set()
        assert await bench.resume() is Verdict.PARTIAL
        assert await bench.resume("lb2") is Verdict.ROLLED_BACK
        assert list(bench.run().without) == ["lb2"]

    play(tmp_path, rolling(current="cat version"), scenario)


class Killed(BaseException):
    """Nothing handles it."""


async def was_killed(bench: Bench, at: int) -> bool:
    """A deployer that dies at a write to the journal: before it, or, at even numbers, right behind it."""
    writes = itertools.count(2)
    with bench.session() as session:
        store = session.store
        real = store.txn

        def txn(*arguments: object, **named: object) -> int | None:
            number = next(writes)
            if number == at:
                raise Killed
            found = real(*arguments, **named)  # type: ignore[arg-type]
            if number + 1 == at and at % 2 == 0:
                raise Killed
            return found

        store.txn = txn  # type: ignore[method-assign, assignment]
        lease = store.lock("deploy/shop", "dead", 1000.0)
        try:
            await session.work(lease, await session.begin("v2"), is_new=True)
        except Killed:
            bench.ahead_seconds += 2000  # its lease ends
            return True
        store.release(lease)
    return False


@pytest.mark.parametrize(
    "deploy", [rolling(drain=True, hosts=rolling().hosts[:2]), pools()], ids=["rolling", "blue-green"]
)
def test_a_deployer_that_is_killed_at_any_write_is_followed_by_one_that_ends_well(
    tmp_path: Path, deploy: Deploy
) -> None:
    lived = False

    async def scenario(bench: Bench) -> None:
        nonlocal lived
        lived = not await was_killed(bench, at)
        if not lived:
            with bench.session() as session:
                has_begun = session.journal.latest() is not None
            if not has_begun:
                assert await bench.deploy_version() is Verdict.COMMITTED
            elif bench.run().verdict is None:  # it may have died right behind the last one
                assert await bench.resume() is Verdict.COMMITTED
        commands = [line for line in bench.world.log if not line.startswith("lb")]
        assert len(commands) == len(set(commands)), "nothing is done twice"
        assert set(bench.versions().values()) == {"v2"}
        assert bench.run().verdict is Verdict.COMMITTED

    for at in range(2, 200):
        play(tmp_path / str(at), deploy, scenario)
        if lived:
            break
    assert lived
    assert at > 15, "many places to die"


def test_whoever_does_not_hold_the_lock_is_told_who_does(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        bench.world.held = "stage"
        first = asyncio.ensure_future(bench.deploy_version())
        await bench.world.has_come.wait()
        with pytest.raises(Locked, match=r"lock deploy/shop: is held by .* \(pid \d+\) since "):
            await bench.deploy_version("v3")
        bench.world.gate.set()
        assert await first is Verdict.COMMITTED
        with bench.session() as session:
            assert session.store.holder("deploy/shop") is None

    play(tmp_path, rolling(), scenario)


@pytest.mark.parametrize("wants", ["pause", "abort"])
def test_somebody_else_has_a_run_paused_or_aborted_at_a_safe_point(
    tmp_path: Path, wants: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lb.rollout.runner.REQUEST_SECONDS", 0.01)

    async def scenario(bench: Bench) -> None:
        heard, loop, real = asyncio.Event(), asyncio.get_running_loop(), Journal.request

        def request(journal: Journal, run: str) -> Wish | None:
            found = real(journal, run)
            if found is not None:
                loop.call_soon_threadsafe(heard.set)
            return found

        monkeypatch.setattr(Journal, "request", request)
        bench.world.held = "activate v2 b"
        first = asyncio.ensure_future(bench.deploy_version())
        await bench.world.has_come.wait()
        with bench.session() as session:
            session.journal.ask(Wish(run=bench.run().id, wants=wants, who="bob"))
        await heard.wait()
        bench.world.held = None
        bench.world.gate.set()
        if wants == "abort":
            assert await first is Verdict.ABORTED
            assert bench.run().reason == "aborted by bob"
            assert bench.world.log[-1] == "reload a"
            return
        with pytest.raises(Paused, match="is paused: by bob; go on with handoff deploy resume"):
            await first
        with pytest.raises(HandoffError, match="is not finished; handoff deploy resume, or abort"):
            await bench.deploy_version("v3")
        assert await bench.resume() is Verdict.COMMITTED
        assert len(bench.world.log) == len(set(bench.world.log)), "nothing twice"

    play(tmp_path, rolling(current="cat version"), scenario)


def test_a_deployer_that_has_lost_its_lock_stops_and_changes_nothing_any_more(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        bench.world.held = "stage v2 b"
        first = asyncio.ensure_future(bench.deploy_version())
        await bench.world.has_come.wait()
        bench.ahead_seconds += 2000  # as if it had been stopped for so long
        bench.world.held = None
        other = await bench.resume()
        bench.world.gate.set()
        with pytest.raises(Fenced, match="our lease has ended"):
            await first
        assert other is Verdict.COMMITTED

    play(tmp_path, rolling(), scenario)


def test_without_its_store_a_run_stops_with_a_clear_word(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        bench.world.held = "stage v2 b"
        with bench.session() as session:

            async def work() -> Verdict:
                async with session.locked() as lease:
                    return await session.work(lease, await session.begin("v2"), is_new=True)

            first = asyncio.ensure_future(work())
            await bench.world.has_come.wait()

            def gone(*_: object, **__: object) -> int:
                raise StoreError("store lb1: connection refused")

            session.store.txn = gone  # type: ignore[method-assign, assignment]
            bench.world.gate.set()
            with pytest.raises(StoreError, match="store lb1: connection refused"):
                await first

    play(tmp_path, rolling(lock_seconds=0.5), scenario)


def test_a_store_that_does_not_answer_for_a_moment_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether its answer was lost, or its question."""

    async def scenario(bench: Bench) -> None:
        writes = itertools.count()
        with bench.session() as session:
            real = session.store.txn

            def often_lost(*arguments: object, **named: object) -> int | None:
                number = next(writes)
                if number % 5 == 1:
                    raise StoreError("store lb1: connection refused")
                found = real(*arguments, **named)  # type: ignore[arg-type]
                if number % 5 == 3:
                    raise StoreError("store lb1: connection lost")
                return found

            async with session.locked() as lease:
                run = await session.begin("v2")
                session.store.txn = often_lost  # type: ignore[method-assign, assignment]
                assert await session.work(lease, run, is_new=True) is Verdict.COMMITTED
        assert len(bench.world.log) == len(set(bench.world.log)), "nothing twice"
        assert next(writes) > 40

    play(tmp_path, rolling(), scenario)
    assert "store lb1: connection lost; asked again for 60 s" in capsys.readouterr().out


def test_the_time_of_a_run_is_told_in_its_history(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        began = time.time()
        await bench.deploy_version()
        run = bench.run()
        assert run.ended_at is not None
        assert began <= run.began_at <= run.ended_at <= time.time()

    play(tmp_path, rolling(), scenario)


def test_the_newest_is_the_newest_whatever_the_clock_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(bench: Bench) -> None:
        assert await bench.deploy_version("v2") is Verdict.COMMITTED
        now = time.time()
        monkeypatch.setattr("lb.rollout.session.time.time", lambda: now - 86400)
        assert await bench.deploy_version("v3") is Verdict.COMMITTED
        with bench.session() as session:
            assert [one.version for one in session.journal.runs()] == ["v3", "v2"]
        assert await bench.rollback() is Verdict.COMMITTED
        assert set(bench.versions().values()) == {"v2"}

    play(tmp_path, rolling(current="cat version"), scenario)


def test_a_dead_balancer_is_left_out_from_the_start_and_that_is_journalled(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        bench.world.unreachable = {"lb2"}
        with bench.session() as session:
            async with session.locked() as lease:
                with pytest.raises(UsageError, match="--without-balancer lb3: there are lb1, lb2"):
                    await session.begin("v2", ["lb3"])
                run = await session.begin("v2", ["lb2"])
                assert await session.work(lease, run, is_new=True) is Verdict.COMMITTED
        assert list(bench.run().without) == ["lb2"]
        assert bench.run().deploy.balancers == ("lb1", "lb2")
        assert not any(line.startswith("lb2") for line in bench.world.log)

    play(tmp_path, rolling(drain=True), scenario)


def test_what_stopped_by_policy_goes_on_or_back_when_somebody_says_so(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        bench.world.failing = {"activate v2 b"}
        assert await bench.deploy_version() is Verdict.PARTIAL
        assert await bench.resume() is Verdict.PARTIAL, "it fails again"
        bench.world.failing = set()
        assert await bench.resume() is Verdict.COMMITTED
        assert bench.world.log.count("stage v2 b") == 1
        assert bench.world.log.count("activate v2 b") == 3
        bench.world.failing = {"activate v3 b"}
        assert await bench.deploy_version("v3") is Verdict.PARTIAL
        with bench.session() as session:
            async with session.locked() as lease:
                found = await session.resumable(())
                assert await session.work(lease, found, is_new=False, aborted_by="bob") is Verdict.ABORTED
        assert bench.versions() == dict.fromkeys("abc", "v2")

    play(tmp_path, rolling(on_failure="stop", current="cat version"), scenario)


def test_who_goes_on_with_a_run_asks_anew_who_may_be_out_of_service(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        async def killed() -> None:
            bench.world.held = "activate v2 b"
            first = asyncio.ensure_future(bench.deploy_version())
            await bench.world.has_come.wait()
            first.cancel()
            await asyncio.wait([first])

        await killed()
        bench.world.held = None
        bench.world.sick = {"c"}  # meanwhile
        assert await bench.resume() is Verdict.PARTIAL
        assert "budget: c out of service; max_unavailable is 1" in bench.run().note
        assert "reload b" not in bench.world.log
        bench.world.sick = set()
        assert await bench.resume() is Verdict.ROLLED_BACK
        assert bench.versions() == {"a": "v1", "b": "v1"}

    play(tmp_path, rolling(current="cat version"), scenario)


def test_where_connections_are_to_go_is_told_to_balancers_that_look_there(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        def told() -> Desired:
            with bench.session() as session:
                entry = session.store.get("desired/shop")
                assert entry is not None
                return msgspec.json.decode(entry.value, type=Desired)

        bench.world.liars = {"lb2"}
        tokens: list[int] = []
        bench.world.after["lb1 switch"] = lambda: tokens.append(told().token) if told().pool == "green" else None
        assert await bench.deploy_version() is Verdict.ROLLED_BACK
        assert (told().pool, told().percent, told().who) == ("blue", 100, f"rollout {bench.run().id}")
        assert told().token > tokens[0] > 0
        bench.world.liars = set()
        assert await bench.deploy_version("v3") is Verdict.COMMITTED
        assert told().pool == "green"

    play(tmp_path, pools(), scenario)


def test_a_host_that_an_operator_has_put_out_gets_the_version_and_stays_out(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        balancer = bench.world.balancers["lb1"]
        balancer.held = {"shop/b": "maint by ann: new memory"}
        assert await bench.deploy_version() is Verdict.COMMITTED
        assert bench.run().seen.held == {"b": ("lb1",)}
        assert [line for line in bench.world.log if line.endswith(" b")] == ["stage v2 b", "activate v2 b", "reload b"]
        assert [bench.world.log.count(f"{name} {kind}") for name in ("lb1", "lb2") for kind in ("drain", "ready")] == [
            *(2, 2),
            *(3, 3),
        ]

    play(tmp_path, rolling(drain=True, max_unavailable=2), scenario)


def test_a_clock_that_is_set_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a day there and back, each time that somebody looks."""
    real, looks = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: real() + (86400 if next(looks) % 2 else -86400))

    async def scenario(bench: Bench) -> None:
        assert await bench.deploy_version() is Verdict.COMMITTED
        assert bench.world.log[-1] == "retire blue"
        assert await bench.deploy_version("v3") is Verdict.COMMITTED

    play(tmp_path, pools(retire="retire {pool}", keep_seconds=0.2, lock_seconds=5.0), scenario)


def test_the_first_balancer_that_is_not_left_out_keeps_the_journal(capsys: pytest.CaptureFixture[str]) -> None:
    async def keeper(*without: str) -> str:
        deploy = rolling(
            balancers=("unix:/nowhere/1", "unix:/nowhere/2"), hosts=(Host(name="a", handoff="/nowhere/3"),)
        )
        async with opened(deploy, Lines(), without) as session:
            with pytest.raises(StoreError) as caught:
                await session.latest()
            return caught.value.message

    assert "store balancer unix:/nowhere/1: " in asyncio.run(keeper())
    assert "store balancer unix:/nowhere/2: " in asyncio.run(keeper("unix:/nowhere/1"))
    assert "store host a: " in asyncio.run(keeper("unix:/nowhere/1", "unix:/nowhere/2"))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "without unix:/nowhere/1, which keeps the journal: balancer unix:/nowhere/2 keeps one for now"


def test_the_old_pool_is_not_retired_where_somebody_has_switched_back_to_it(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        balancer = bench.world.balancers["lb2"]
        looks = itertools.count()

        def look(name: str) -> None:
            if name == "lb2" and "lb2 switch" in bench.world.log and next(looks) == 1:  # the first is the switch's own
                balancer.switch("blue", 100)

        bench.world.on_look = look
        assert await bench.deploy_version() is Verdict.COMMITTED
        assert bench.run().note == "blue gets connections from lb2: it is kept"
        assert "retire blue" not in bench.world.log

    play(tmp_path, pools(retire="retire {pool}", keep_seconds=0.0), scenario)
