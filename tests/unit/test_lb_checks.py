"""Checks against real servers: good ones, and all the others."""

from __future__ import annotations

import asyncio
import socket
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest

from handoff.core.proxy_protocol import LOCAL_V2
from lb.control.checker import Checker
from lb.control.checks import MAXIMUM_BODY_BYTES, Result, check_backend
from lb.control.probes import Task
from lb.core.model import Check, SendProxy
from lb.core.standing import Outcome
from tests.unit.lb_harness import SECONDS, Handler, backend, closed_port, run

HTTP = Check(type="http", path="/health", timeout_seconds=20.0)


def answering(answer: bytes, asked: list[bytes] | None = None) -> Handler:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if asked is not None:
            asked.append(head)
        writer.write(answer)
        await writer.drain()

    return handle


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def endless_head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"x: " + b"y" * 1000 + b"\r\n")
        await writer.drain()


async def endless_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        writer.write(b"z" * 10_000)
        await writer.drain()


def changed(check: Check, **fields: Any) -> Check:
    return msgspec.structs.replace(check, **fields)


@pytest.mark.parametrize(
    ("handler", "check", "reason"),
    [
        (answering(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"), HTTP, ""),
        (answering(b"HTTP/1.0 204 No Content\r\n\r\n"), HTTP, ""),
        (answering(b"HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"), HTTP, ""),
        (answering(b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n"), HTTP, "status 503"),
        (answering(b"HTTP/1.1 200 OK\r\n\r\n"), changed(HTTP, status=(204, 204)), "status 200"),
        (answering(b"HTTP/1.1 200 OK\r\n\r\nall is well"), changed(HTTP, body="is well"), ""),
        (
            answering(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nall\r\n5\r\n well\r\n0\r\n\r\n"),
            changed(HTTP, body="all well"),
            "",
        ),
        (answering(b"HTTP/1.1 200 OK\r\n\r\nbad"), changed(HTTP, body="well"), "body: 'well' is not in it"),
        (endless_body, changed(HTTP, body="well"), f"not in its first {MAXIMUM_BODY_BYTES} bytes"),
        (endless_head, HTTP, "no HTTP: "),
        (answering(b"SSH-2.0-OpenSSH\r\n\r\n"), HTTP, "no HTTP: "),
        (answering(b"HTTP/1.1 200"), HTTP, "closed without an answer"),
        (answering(b""), HTTP, "closed without an answer"),
        (reset, HTTP, "connection reset by peer"),
        (silent, changed(HTTP, timeout_seconds=0.1), "no answer within 0.1 s"),
        (silent, Check(timeout_seconds=20.0), ""),
    ],
)
def test_what_passes_and_what_does_not_and_why(handler: Handler, check: Check, reason: str) -> None:
    async def test() -> None:
        async with backend(handler) as port:
            result = await check_backend(check, f"127.0.0.1:{port}", "off")
        if reason:
            assert result.outcome is Outcome.FAILED
            assert reason in result.reason
        else:
            assert result.outcome is Outcome.PASSED, result.reason
            assert result.reason.startswith("passed in ")

    run(test)


def test_nobody_listens(tmp_path: Path) -> None:
    async def test() -> None:
        for check in (Check(), HTTP):
            refused = await check_backend(check, f"127.0.0.1:{closed_port()}", "off")
            assert (refused.outcome, refused.reason) == (Outcome.FAILED, "connection refused")
            absent = await check_backend(check, f"unix:{tmp_path}/none.sock", "off")
            assert (absent.outcome, absent.reason) == (Outcome.FAILED, "no such file or directory")

    run(test)


def test_a_unix_socket_whose_queue_is_full_fails(tmp_path: Path) -> None:
    async def test() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "full.sock"))
            listener.listen(0)
            address = f"unix:{tmp_path}/full.sock"
            assert (await check_backend(Check(), address, "off")).outcome is Outcome.PASSED
            result = await check_backend(Check(), address, "off")
            assert (result.outcome, result.reason) == (Outcome.FAILED, "resource temporarily unavailable")

    run(test)


def test_another_port_and_a_unix_socket_are_asked_as_told(tmp_path: Path) -> None:
    async def test() -> None:
        asked: list[bytes] = []
        handler = answering(b"HTTP/1.1 200 OK\r\n\r\n", asked)
        async with backend(handler) as port:
            check = changed(HTTP, port=port, method="HEAD", host="shop.example")
            assert (await check_backend(check, "127.0.0.1:1", "off")).outcome is Outcome.PASSED
            assert (await check_backend(HTTP, f"127.0.0.1:{port}", "off")).outcome is Outcome.PASSED

        async with backend(handler, path=tmp_path / "s.sock"):
            result = await check_backend(changed(HTTP, port=1), f"unix:{tmp_path}/s.sock", "off")
        assert result.outcome is Outcome.PASSED
        assert asked[0].startswith(b"HEAD /health HTTP/1.1\r\nHost: shop.example\r\n")
        assert asked[1].startswith(f"GET /health HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n".encode())
        assert b"\r\nHost: localhost\r\n" in asked[2]

    run(test)


@pytest.mark.parametrize(("send_proxy", "header"), [("v1", b"PROXY UNKNOWN\r\n"), ("v2", LOCAL_V2), ("off", b"")])
@pytest.mark.parametrize("check", [Check(timeout_seconds=20.0), HTTP], ids=["tcp", "http"])
def test_a_backend_that_wants_a_proxy_header_gets_a_local_one(
    send_proxy: SendProxy, header: bytes, check: Check
) -> None:
    async def test() -> None:
        got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if check.type == "tcp":
                got.set_result(await reader.read())
                return
            got.set_result(await reader.readuntil(b"/health"))
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            await reader.read()

        async with backend(handle) as port:
            result = await check_backend(check, f"127.0.0.1:{port}", send_proxy)
            assert result.outcome is Outcome.PASSED
            assert await got == header + (b"" if check.type == "tcp" else b"GET /health")

    run(test)


class Seen:
    """What a checker tells."""

    def __init__(self) -> None:
        self.results: list[tuple[str, Result]] = []
        self.changing: set[str] = set()
        self.changed = asyncio.Event()

    def on_result(self, identity: str, result: Result) -> None:
        self.results.append((identity, result))
        self.changed.set()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(SECONDS):
            while len(self.results) < count:
                self.changed.clear()
                await self.changed.wait()


async def ask(task: Task, identities: frozenset[str]) -> dict[str, Result]:
    result = await check_backend(task.check, task.address, task.send_proxy)
    return dict.fromkeys(identities, result)


def checker_of(tasks: asyncio.TaskGroup, seen: Seen) -> Checker[Task, Result]:
    return Checker(tasks, ask, seen.on_result, seen.changing.__contains__)


def test_all_unknown_are_checked_at_once() -> None:
    async def test() -> None:
        together, all_there = 0, asyncio.Event()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal together
            together += 1
            if together == 12:
                all_there.set()
            await all_there.wait()
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")

        seen = Seen()
        seen.changing = {f"b{number}" for number in range(12)}
        async with backend(handle) as port, asyncio.TaskGroup() as tasks:
            checker = checker_of(tasks, seen)
            check = changed(HTTP, interval_seconds=1000.0)
            checker.check_only(
                {
                    one: Task(check=check, address=f"127.0.0.1:{port}", typed=one, send_proxy="off")
                    for one in seen.changing
                }
            )
            await seen.until(12)
            checker.check_only({})
        assert {identity for identity, _ in seen.results} == seen.changing

    run(test)


def test_who_is_reported_is_checked_before_its_time_and_who_is_not_wanted_no_more() -> None:
    async def test() -> None:
        seen = Seen()
        async with backend() as port, asyncio.TaskGroup() as tasks:
            checker = checker_of(tasks, seen)
            check = Check(interval_seconds=100_000.0, fast_interval_seconds=0.01)
            checker.check_only({"known": Task(check=check, address=f"127.0.0.1:{port}")})
            await asyncio.sleep(0)
            checker.hurry("known")
            await seen.until(1)
            checker.hurry("known")
            await seen.until(2)
            checker.hurry("never heard of")
            checker.check_only({})
            checker.hurry("known")
        assert [identity for identity, _ in seen.results] == ["known", "known"]

    run(test)


def test_while_the_state_is_changing_checks_come_faster() -> None:
    async def test() -> None:
        seen = Seen()
        seen.changing = {"new"}
        async with backend() as port, asyncio.TaskGroup() as tasks:
            checker = checker_of(tasks, seen)
            check = Check(interval_seconds=100_000.0, fast_interval_seconds=0.01)
            checker.check_only({"new": Task(check=check, address=f"127.0.0.1:{port}")})
            await seen.until(3)
            checker.check_only({})
        assert len(seen.results) >= 3

    run(test)


def test_who_wants_the_same_shares_one_round_of_asking_and_who_comes_later_is_asked_at_once() -> None:
    async def test() -> None:
        rounds: list[frozenset[str]] = []
        release = asyncio.Event()

        async def slow(task: Task, identities: frozenset[str]) -> dict[str, Result]:
            rounds.append(identities)
            if len(rounds) == 1:
                await release.wait()
            return dict.fromkeys(identities, Result(Outcome.PASSED, "", 0.0))

        seen = Seen()
        seen.changing = {"shop", "api", "late"}
        task = Task(check=Check(interval_seconds=100_000.0, fast_interval_seconds=100_000.0), address="10.0.0.1:80")
        async with asyncio.TaskGroup() as tasks:
            checker = Checker(tasks, slow, seen.on_result, seen.changing.__contains__)
            checker.check_only({"shop": task, "api": task})
            while not rounds:  # noqa: ASYNC110  turns of the loop
                await asyncio.sleep(0)
            checker.check_only({"shop": task, "late": task})
            release.set()
            await seen.until(3)
            checker.check_only({})
        assert rounds == [frozenset({"shop", "api"}), frozenset({"shop", "late"})]
        # What was asked before somebody came says nothing of it, and who has left is not told.
        assert seen.results[0][0] == "shop"
        assert sorted(identity for identity, _ in seen.results[1:]) == ["late", "shop"]

    run(test)
