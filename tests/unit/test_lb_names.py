"""Backends that are called by a name: what is looked up, what is kept, and what never waits."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Sequence

import pytest

from lb.control import names as names_module
from lb.control.names import Names
from lb.control.resolver import MAXIMUM_THREADS, Resolver, look_up
from lb.core.model import Family
from lb.core.naming import MAXIMUM_ADDRESSES, Answer, addresses_of, is_called_by_name
from tests.unit.lb_harness import SECONDS, run

TYPED = "db.example:5432"


class Script(Resolver):
    """Answers in turn, the last one again and again; without any thread."""

    def __init__(self, *answers: Sequence[str] | Exception) -> None:
        super().__init__()
        self.answers = list(answers)
        self.asked: list[str] = []

    def ask(self, host: str) -> asyncio.Future[list[str]]:
        self.asked.append(host)
        future: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(list(answer))
        return future


class Seen:
    """What stood there each time that something was told."""

    def __init__(self) -> None:
        self.names: Names | None = None
        self.answers: list[Answer] = []
        self.changed = asyncio.Event()

    def on_answer(self) -> None:
        assert self.names is not None
        self.answers.append(self.names.answers[TYPED])
        self.changed.set()

    async def until(self, is_done: Callable[[], bool]) -> None:
        async with asyncio.timeout(SECONDS):
            while not is_done():
                self.changed.clear()
                await self.changed.wait()


def names_of(tasks: asyncio.TaskGroup, resolver: Resolver, seen: Seen, own: Sequence[str] = ()) -> Names:
    seen.names = Names(tasks, resolver, seen.on_answer, own.__contains__)
    return seen.names


def test_all_addresses_are_told_and_the_last_good_answer_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def test() -> None:
        failure = socket.gaierror(-3, "Temporary failure in name resolution")
        script = Script(["10.0.0.2", "10.0.0.1"], ["10.0.0.1", "10.0.0.2"], failure, failure, ["10.0.0.2"])
        seen = Seen()
        async with asyncio.TaskGroup() as tasks:
            names = names_of(tasks, script, seen)
            names.ask_only([TYPED, "10.0.0.9:80", "unix:/run/db.sock"], 0.001, "ipv4")
            await seen.until(lambda: len(seen.answers) == 2)
            names.ask_only([], 0.001, "ipv4")
            assert names.answers == {}
        assert [one.addresses for one in seen.answers] == [("10.0.0.1:5432", "10.0.0.2:5432"), ("10.0.0.2:5432",)]
        assert all(one.at is not None and not one.error for one in seen.answers)
        assert set(script.asked) == {"db.example"}
        assert caplog.text.count("its name is not known (temporary failure in name resolution); still 10.0.0.1:") == 1
        assert f"{TYPED}: its name is known again" in caplog.text
        assert f"{TYPED}: is 10.0.0.2:5432, was 10.0.0.1:5432, 10.0.0.2:5432" in caplog.text

    run(test)


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (socket.gaierror(-2, "Name or service not known"), "name or service not known"),
        (UnicodeError("label too long"), "label too long"),
        ([], "it has no address"),
        (["10.0.0.1"], "10.0.0.1:5432 is an address of this balancer"),
    ],
)
def test_a_name_that_is_not_known_yet_is_told_once_and_asked_for_again(
    failure: Sequence[str] | Exception, told: str
) -> None:
    async def test() -> None:
        script, seen = Script(failure, failure, ["10.0.0.1", "10.0.0.2"]), Seen()
        async with asyncio.TaskGroup() as tasks:
            names = names_of(tasks, script, seen, own=["10.0.0.1:5432"])
            names.ask_only([TYPED], 0.001, "ipv4")
            await seen.until(lambda: len(seen.answers) == 2)
            names.ask_only([], 0.001, "ipv4")
        assert seen.answers[0] == Answer(error=told)
        assert seen.answers[1].addresses == ("10.0.0.2:5432",)

    run(test)


def test_an_answer_that_was_remembered_counts_until_there_is_another_one() -> None:
    async def test() -> None:
        seen, remembered = Seen(), Answer(addresses=("10.0.0.1:5432",), at=1.0)
        script = Script(OSError("no server"), OSError("no server"), ["10.0.0.1"], ["10.0.0.3"])
        async with asyncio.TaskGroup() as tasks:
            names = names_of(tasks, script, seen)
            names.answers[TYPED] = remembered
            names.ask_only([TYPED], 0.001, "ipv4")
            await seen.until(lambda: bool(seen.answers))
            names.ask_only([], 0.001, "ipv4")
        assert [one.addresses for one in seen.answers] == [("10.0.0.3:5432",)], "failures told nobody anything"

    run(test)


def test_another_family_is_asked_for_at_once() -> None:
    async def test() -> None:
        seen, script = Seen(), Script(["10.0.0.1", "fd00::1"])
        async with asyncio.TaskGroup() as tasks:
            names = names_of(tasks, script, seen)
            names.ask_only([TYPED], 100_000.0, "ipv4")
            await seen.until(lambda: len(seen.answers) == 1)
            names.ask_only([TYPED], 100_000.0, "both")
            await seen.until(lambda: len(seen.answers) == 2)
            names.ask_only([], 100_000.0, "both")
        assert [one.addresses for one in seen.answers] == [
            ("10.0.0.1:5432",),
            ("10.0.0.1:5432", "[fd00::1]:5432"),
        ]

    run(test)


def test_a_server_that_does_not_answer_is_said_and_waited_for_and_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(names_module, "LOOKUP_SECONDS", 0.01)
    release = threading.Event()
    asked: list[str] = []

    def hanging(host: str) -> list[str]:
        asked.append(host)
        if host == "db.example":
            release.wait(SECONDS)
            return ["10.0.0.7"]
        return ["10.0.0.8"]

    async def test() -> None:
        seen, resolver = Seen(), Resolver(hanging)
        async with asyncio.TaskGroup() as tasks:
            names = names_of(tasks, resolver, seen)
            names.ask_only([TYPED], 0.001, "ipv4")
            await seen.until(lambda: bool(seen.answers))
            assert seen.answers == [Answer(error="no answer within 0.01 s")]
            assert await resolver.ask("other.example") == ["10.0.0.8"]
            assert asked.count("db.example") == 1, "one question at a time"
            release.set()
            await seen.until(lambda: len(seen.answers) == 2)
            names.ask_only([], 0.001, "ipv4")
        assert seen.answers[1].addresses == ("10.0.0.7:5432",)
        resolver.close()

    run(test)


def test_threads_are_bounded_and_a_question_that_nobody_waits_for_any_more_hurts_nobody() -> None:
    hanging = threading.Semaphore(0)

    def slow(host: str) -> list[str]:
        assert hanging.acquire(timeout=SECONDS)
        raise OSError("no server")

    async def test() -> None:
        resolver = Resolver(slow)
        asked = [resolver.ask(f"host{number}") for number in range(3 * MAXIMUM_THREADS)]
        assert len(resolver._threads) == MAXIMUM_THREADS
        asked[0].cancel()
        for _ in asked:
            hanging.release()
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert {type(one) for one in found} == {asyncio.CancelledError, OSError}
        resolver.close()
        for thread in resolver._threads:
            await asyncio.to_thread(thread.join, SECONDS)
        assert not any(thread.is_alive() for thread in resolver._threads)

    run(test)


def test_localhost_as_this_machine_knows_it() -> None:
    assert set(look_up("localhost")) <= {"127.0.0.1", "::1"}

    async def test() -> None:
        resolver, seen = Resolver(), Seen()
        async with asyncio.TaskGroup() as tasks:
            names = Names(tasks, resolver, seen.changed.set, lambda address: False)
            names.ask_only(["localhost:80"], 100_000.0, "ipv4")
            await seen.until(lambda: "localhost:80" in names.answers)
            assert names.answers["localhost:80"].addresses in (("127.0.0.1:80",), ("[::1]:80",))
            names.ask_only([], 1.0, "ipv4")
        resolver.close()

    run(test)


@pytest.mark.parametrize(
    ("hosts", "family", "expected"),
    [
        (["10.0.0.2", "10.0.0.1", "10.0.0.2"], "ipv4", ("10.0.0.1:80", "10.0.0.2:80")),
        (["fd00::1", "10.0.0.1"], "ipv4", ("10.0.0.1:80",)),
        (["fd00::1", "10.0.0.1"], "ipv6", ("[fd00::1]:80",)),
        (["fd00::1", "10.0.0.1"], "both", ("10.0.0.1:80", "[fd00::1]:80")),
        (["fd00::1"], "ipv4", ("[fd00::1]:80",)),
        (["fe80::1%eth0", "what"], "both", ("[fe80::1%eth0]:80",)),
        ([], "both", ()),
    ],
)
def test_which_addresses_count(hosts: list[str], family: Family, expected: tuple[str, ...]) -> None:
    assert addresses_of(hosts, 80, family) == expected
    assert addresses_of(reversed(hosts), 80, family) == expected


def test_a_name_has_so_many_addresses_and_no_more() -> None:
    assert len(addresses_of([f"10.0.{number}.1" for number in range(200)], 80, "both")) == MAXIMUM_ADDRESSES


@pytest.mark.parametrize(
    ("address", "expected"),
    [("localhost:80", True), ("127.0.0.1:80", False), ("[::1]:80", False), ("unix:/x", False)],
)
def test_what_is_a_name(address: str, expected: bool) -> None:
    assert is_called_by_name(address) is expected
