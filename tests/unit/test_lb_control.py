"""The controller, with real sockets and backends, and relay workers that only talk."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from lb.config import parse_config
from lb.control.stored import initial_table, read_table
from lb.core.wire import HEADER, Failed, Taken
from lb.page import CURRENT
from tests.unit.lb_harness import backend, closed_port, controller, endpoint, relay, run


def config(*blue: int, green: tuple[int, ...] = (), more: str = "", check: str = 'interval = "200ms"') -> str:
    def listed(ports: tuple[int, ...], letter: str) -> str:
        return ", ".join(
            f'{{ name = "{letter}{number}", address = "127.0.0.1:{port}" }}' for number, port in enumerate(ports, 1)
        )

    return f"""
[balancer]
name = "edge"
[[service]]
name = "shop"
listen = "127.0.0.1:1"
{more}
[service.pool.blue]
backends = [{listed(blue, "b")}]
[service.pool.green]
backends = [{listed(green, "g")}]
[service.check]
{check}
"""


def test_backends_are_awaited_until_they_were_checked_and_then_eligible_or_not(tmp_path: Path) -> None:
    async def test() -> None:
        async with backend() as up:
            down = closed_port()
            async with controller(config(up, down), tmp_path) as running, relay(running.directory) as one:
                await one.until(lambda: bool(one.tables))
                table = await one.table(lambda table: not endpoint(table, "blue/b2").is_awaited)
                table = await one.table(lambda table: endpoint(table, "blue/b1").is_eligible)
                assert not endpoint(table, "blue/b2").is_eligible
                assert endpoint(table, "blue/b1").identity == f"shop/blue/b1@127.0.0.1:{up}#1"
                assert read_table(running.directory) == table

    run(test)


def test_a_killed_controller_costs_nothing_and_its_successor_knows_the_health(tmp_path: Path) -> None:
    async def test() -> None:
        async with backend() as up:
            text = config(up, closed_port(), check='interval = "100s"')
            async with controller(text, tmp_path) as running:
                async with relay(running.directory) as one:
                    table = await one.table(
                        lambda table: (
                            endpoint(table, "blue/b1").is_eligible and not endpoint(table, "blue/b2").is_awaited
                        )
                    )
                running.directory.joinpath("relays.sock").unlink()  # as after kill -9: the files are all there is
                found = initial_table(parse_config(text, "lb.toml"), 1, running.directory, tmp_path / "state")
                assert found == table
                async with controller(text, tmp_path) as again, relay(again.directory) as other:
                    await other.until(lambda: bool(other.tables))
                    assert other.tables[0].revision == table.revision + 1
                    assert other.tables[0].routes == table.routes
                async with controller(text, tmp_path, generation=2) as later, relay(later.directory) as other:
                    await other.until(lambda: bool(other.tables))
                    assert (other.tables[0].generation, other.tables[0].revision) == (2, 1)
                    assert other.tables[0].routes == table.routes

    run(test)


@pytest.mark.parametrize(
    "garbage", [HEADER.pack(3) + b"{}x", HEADER.pack(2**31), HEADER.pack(2) + b"[]"], ids=["json", "length", "type"]
)
def test_garbage_closes_that_relay_worker_only(tmp_path: Path, garbage: bytes) -> None:
    async def test() -> None:
        async with (
            backend() as up,
            controller(config(up), tmp_path) as running,
            relay(running.directory) as good,
            relay(running.directory, slot=1) as bad,
        ):
            await bad.until(lambda: bool(bad.tables))
            bad.writer.write(garbage)
            await bad.until(lambda: bad.is_closed)
            await good.table(lambda table: endpoint(table, "blue/b1").is_eligible)
            assert not good.is_closed

    run(test)


def test_failures_that_relay_workers_report_eject_for_a_while_and_a_passed_check_does_not_lift_it(
    tmp_path: Path,
) -> None:
    async def test() -> None:
        more = '[service.ejection]\nfailures = 2\nbase = "300ms"\n'
        async with backend() as one_port, backend() as other_port:
            text = config(one_port, other_port, more=more, check='interval = "50ms"')
            async with controller(text, tmp_path) as running, relay(running.directory) as one:
                table = await one.table(lambda table: endpoint(table, "blue/b1").is_eligible)
                identity = endpoint(table, "blue/b1").identity
                one.say(Failed(identity=identity, reason="connection refused"))
                one.say(Failed(identity=identity, reason="connection refused"))
                out = await one.table(lambda table: not endpoint(table, "blue/b1").is_eligible)
                assert not endpoint(out, "blue/b1").is_awaited
                back = await one.table(lambda table: endpoint(table, "blue/b1").is_eligible)
                assert endpoint(back, "blue/b1").identity == identity

    run(test)


DYING = """
import os, socket, sys
from pathlib import Path
from lb.core.wire import PAGE_NAME, SOCKET_NAME, Hello, frame
from lb.page import CURRENT, Page
directory = Path(sys.argv[1])
page = Page(directory / PAGE_NAME)
page.take_row()
page.cells(page.column(sys.argv[2]))[CURRENT] = 5
with socket.socket(socket.AF_UNIX) as link:
    link.connect(str(directory / SOCKET_NAME))
    link.sendall(frame(Hello(pid=os.getpid(), generation=1, slot=7, row=page.row)))
    assert link.recv(1)
    print("connected", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_relay_worker_had_counts_no_more(tmp_path: Path) -> None:
    async def test() -> None:
        async with backend() as up, controller(config(up), tmp_path) as running, relay(running.directory) as one:
            identity = endpoint(
                await one.table(lambda table: endpoint(table, "blue/b1").is_eligible), "blue/b1"
            ).identity
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", DYING, str(running.directory), identity),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            assert process.stdout is not None
            assert await process.stdout.readline() == b"connected\n"
            assert one.page.sums(identity)[CURRENT] == 5
            process.kill()
            async with asyncio.timeout(30):
                while one.page.sums(identity)[CURRENT]:  # noqa: ASYNC110  shared memory tells nobody
                    await asyncio.sleep(0)
            await process.communicate()

    run(test)


def test_numbers_go_on_from_those_that_relay_workers_have(tmp_path: Path) -> None:
    async def test() -> None:
        async with backend() as up, controller(config(up), tmp_path) as running, relay(running.directory) as one:
            await one.table(lambda table: endpoint(table, "blue/b1").is_eligible)
            one.say(Taken(generation=1, revision=100))
            table = await one.table(lambda table: table.revision > 100)
            assert read_table(running.directory) == table

    run(test)
