"""The controller with agents, shared checks, warm-ups and names: real sockets, and a resolver of the test's own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from lb.config import parse_config
from lb.control.resolver import Resolver
from lb.control.stored import initial_table
from lb.core.table import Table
from lb.page import CURRENT
from tests.unit.lb_harness import SECONDS, Handler, Running, backend, controller, endpoint, endpoints, relay, run


def lines(*more: str, name: str = "shop", listen: int = 1, backends: str = "", check: str = "") -> str:
    own = [f'[[service]]\nname = "{name}"\nlisten = "127.0.0.1:{listen}"', *([check] if check else [])]
    return "\n".join([*own, f"[service.pool.blue]\nbackends = [{backends}]", *more, ""])


class Agent:
    """Says what it is told to."""

    def __init__(self, words: str) -> None:
        self.words = words
        self.asked = 0
        self._changed = asyncio.Event()

    async def until(self, asked: int) -> None:
        async with asyncio.timeout(SECONDS):
            while self.asked < asked:
                self._changed.clear()
                await self._changed.wait()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked += 1
        self._changed.set()
        writer.write(self.words.encode() + b"\n")
        await writer.drain()


class Web:
    """Answers 200, or what it is told to for a path; counts who asked for what."""

    def __init__(self) -> None:
        self.statuses: dict[str, int] = {}
        self.asked: list[str] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
        self.asked.append(path)
        writer.write(b"HTTP/1.1 %d Told\r\ncontent-length: 0\r\n\r\n" % self.statuses.get(path, 200))
        await writer.drain()


async def ask(running: Running, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """Of the admin API; the status, and the JSON or the text that came."""
    reader, writer = await asyncio.open_unix_connection(str(running.directory / "admin.sock"))
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    _, _, content = answer.partition(b"\r\n\r\n")
    text = content.decode()
    return int(answer.split()[1]), json.loads(text) if text.startswith("{") else text


async def status_of(running: Running, name: str) -> dict[str, Any]:
    _, found = await ask(running, "/v1/status")
    backends: dict[str, Any] = found["services"]["shop"]["pools"]["blue"]["backends"]
    return dict(backends[name])


async def until(is_so: Callable[[], Awaitable[bool]]) -> None:
    """What nobody tells is looked at again and again."""
    async with asyncio.timeout(SECONDS):
        while not await is_so():  # noqa: ASYNC110
            await asyncio.sleep(0)


def test_an_agent_drains_weighs_and_takes_it_back_and_is_in_no_durable_file(tmp_path: Path) -> None:
    async def test() -> None:
        agent = Agent("drain 50% maxconn:7 # backup runs")
        async with backend() as up, backend(agent) as port:
            of_agent = f'[service.agent]\nport = {port}\ninterval = "20ms"'
            listed = f'{{ name = "b1", address = "127.0.0.1:{up}", weight = 4 }}'
            text = lines('[service.check]\ninterval = "20ms"', of_agent, backends=listed)
            async with controller(text, tmp_path) as running, relay(running.directory) as one:
                table = await one.table(lambda table: endpoint(table, "blue/b1").weight == 2.0)
                found = endpoint(table, "blue/b1")
                assert (found.is_eligible, found.maxconn, found.closing) == (False, 7, None)
                status = await status_of(running, "b1")
                assert (status["administrative"], status["agent"]) == ("drain", "drain 50% maxconn:7 (backup runs)")
                assert status["override"] == ""
                agent.words = "ready up 100%"
                table = await one.table(lambda table: endpoint(table, "blue/b1").is_eligible)
                assert endpoint(table, "blue/b1").weight == 4.0
                agent.words = "stopped"
                await one.table(lambda table: not endpoint(table, "blue/b1").is_eligible)
                assert (await status_of(running, "b1"))["health"] == "down"
            for file in (tmp_path / "state").glob("*"):
                assert "drain" not in file.read_text()

    run(test)


def test_what_an_agent_said_holds_while_it_is_silent_also_for_the_next_controller(tmp_path: Path) -> None:
    async def test() -> None:
        async with backend() as up:
            async with backend(Agent("drain")) as port:
                of_agent = f'[service.agent]\nport = {port}\ninterval = "20ms"'
                text = lines(of_agent, backends=f'{{ name = "b1", address = "127.0.0.1:{up}" }}')
                async with controller(text, tmp_path) as running, relay(running.directory) as one:
                    await one.table(lambda table: not endpoint(table, "blue/b1").is_eligible)
            async with controller(text, tmp_path, generation=2) as running, relay(running.directory, 2) as one:
                await one.until(lambda: bool(one.tables))
                assert not endpoint(one.tables[0], "blue/b1").is_eligible

                async def is_missed() -> bool:
                    return (await status_of(running, "b1"))["agent"] == "drain; no answer: connection refused"

                await until(is_missed)
                # `ready` by a person is ready, against the agent; and so said.
                answered, answer = await ask(running, "/v1/ready", {"server": "shop/b1", "who": "ann"})
                assert (answered, answer["exit_code"]) == (200, 0)
                await one.table(lambda table: endpoint(table, "blue/b1").is_eligible)
                assert (await status_of(running, "b1"))["override"] == "ready by ann"

    run(test)


def test_with_an_agent_for_a_check_nothing_goes_there_before_it_has_spoken(tmp_path: Path) -> None:
    async def test() -> None:
        agent = Agent("what is this")
        async with backend() as up, backend(agent) as port:
            check = f'[service.check]\ntype = "agent"\nport = {port}\ninterval = "20ms"'
            text = lines(check, backends=f'{{ name = "b1", address = "127.0.0.1:{up}" }}')
            async with controller(text, tmp_path) as running, relay(running.directory) as one:
                await one.until(lambda: bool(one.tables))

                async def is_garbage() -> bool:
                    return "is no word of an agent" in (await status_of(running, "b1"))["agent"]

                await until(is_garbage)
                assert endpoint(one.tables[-1], "blue/b1").is_awaited
                agent.words = "30%"
                await one.table(lambda table: endpoint(table, "blue/b1").is_eligible)

    run(test)


def test_maint_of_the_agent_ends_checks_but_not_the_asking(tmp_path: Path) -> None:
    async def test() -> None:
        agent, web = Agent("maint"), Web()
        async with backend(web) as up, backend(agent) as port:
            more = ['[service.check]\ntype = "http"\ninterval = "20ms"']
            more += [f'[service.agent]\nport = {port}\ninterval = "20ms"']
            text = lines(*more, backends=f'{{ name = "b1", address = "127.0.0.1:{up}" }}')
            async with controller(text, tmp_path) as running, relay(running.directory) as one:

                async def is_in_maintenance() -> bool:
                    return (await status_of(running, "b1"))["administrative"] == "maint"

                await until(is_in_maintenance)
                checked = len(web.asked)
                await agent.until(agent.asked + 5)
                assert len(web.asked) <= checked + 1
                agent.words = "ready"
                await one.table(lambda table: endpoint(table, "blue/b1").is_eligible)
                await ask(running, "/v1/maint", {"server": "shop/b1"})
                await ask(running, "/v1/ready", {"server": "shop/b1"})
                await agent.until(agent.asked + 1)
                await one.table(lambda table: endpoint(table, "blue/b1").is_eligible)

    run(test)


def test_a_shared_check_asks_a_backend_once_for_all_services(tmp_path: Path) -> None:
    async def test() -> None:
        web = Web()
        async with backend(web) as up:
            listed = f'{{ name = "b1", address = "127.0.0.1:{up}" }}'
            text = '[check.web]\ntype = "http"\ninterval = "1h"\ntimeout = "30s"\n'
            names = [f"service{number}" for number in range(5)]
            for number, name in enumerate(names):
                text += lines(name=name, listen=number + 1, backends=listed, check='check = "web"')
            async with controller(text, tmp_path) as running, relay(running.directory) as one:
                await one.table(lambda table: all(endpoint(table, "blue/b1", name).is_eligible for name in names))
                # The second round, as its state changes no more, is an hour away.
                assert web.asked == ["/"]

    run(test)


@pytest.mark.parametrize("how", ["asked once", "a failing one"])
def test_warm_up_requests_come_after_the_check_and_before_traffic(tmp_path: Path, how: str) -> None:
    async def test() -> None:
        web = Web()
        if how != "asked once":
            web.statuses["/cart"] = 500
        async with backend(web) as up:
            check = ['[service.check]\ntype = "http"\npath = "/health"\nwarm_up = ["/", "/cart"]']
            check += ['warm_up_timeout = "30s"\ninterval = "20ms"\ntimeout = "30s"\nfall = 1']
            text = lines(*check, backends=f'{{ name = "b1", address = "127.0.0.1:{up}" }}')
            async with controller(text, tmp_path) as running, relay(running.directory) as one:
                if how != "asked once":
                    await one.table(lambda table: not endpoint(table, "blue/b1").is_awaited)
                    status = await status_of(running, "b1")
                    assert (status["health"], status["last_check"]) == ("down", "warm-up /cart: status 500")
                    del web.statuses["/cart"]
                await one.table(lambda table: endpoint(table, "blue/b1").is_eligible)
                first = web.asked.copy()
                assert first[:3] == ["/health", "/", "/cart"]
                web.statuses["/health"] = 503
                await one.table(lambda table: not endpoint(table, "blue/b1").is_eligible)
                sick = web.asked[len(first) :]
                assert set(sick) == {"/health"}, "who is up is not warmed up again"
                del web.statuses["/health"]
                await one.table(lambda table: endpoint(table, "blue/b1").is_eligible)
                back = web.asked[len(first) + len(sick) :]
                assert back[:4] == ["/health", "/health", "/", "/cart"], "after the rise"

    run(test)


# --- names ----------------------------------------------------------------------------------------------------------


class Hosts(Resolver):
    """What each host stands for now; one that is not in it is not known."""

    def __init__(self, **known: list[str]) -> None:
        super().__init__()
        self.known = known
        self.asked = 0

    def ask(self, host: str) -> asyncio.Future[list[str]]:
        self.asked += 1
        future: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        if host in self.known:
            future.set_result(self.known[host])
        else:
            future.set_exception(OSError("not known"))
        return future


def named(port: int, *more: str, extra: str = "") -> str:
    interval = '[balancer]\nresolve_interval = "20ms"\n'
    return interval + lines(*more, backends=f'{{ name = "app", address = "app:{port}" }}{extra}')


def app(table: Table) -> dict[str, bool]:
    """Hosts that the name stands for, and whether they get connections."""
    found = endpoints(table)
    return {name.partition("@")[2].partition(":")[0]: one.is_eligible for name, one in found.items()}


async def serve_at(host: str, port: int, handler: Handler) -> asyncio.AbstractServer:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await handler(reader, writer)
        writer.close()

    return await asyncio.start_server(accept, host, port)


async def reading(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


CHECKED = '[service.check]\ninterval = "20ms"'


def test_each_address_is_a_backend_and_one_that_is_gone_drains_and_comes_back_as_a_new_one(tmp_path: Path) -> None:
    async def test() -> None:
        hosts = Hosts(app=["127.0.0.1", "127.0.0.2"])
        async with backend() as port:
            other = await serve_at("127.0.0.2", port, reading)
            async with (
                controller(named(port, CHECKED), tmp_path, resolver=hosts) as running,
                relay(running.directory) as one,
            ):
                table = await one.table(lambda table: app(table) == {"127.0.0.1": True, "127.0.0.2": True})
                first = endpoint(table, f"blue/app@127.0.0.2:{port}")
                assert first.identity == f"shop/blue/app@127.0.0.2:{port}#1"
                cells = one.page.cells(one.page.column(first.identity))
                cells[CURRENT] = 1  # somebody is connected there
                hosts.known["app"] = ["127.0.0.1"]
                table = await one.table(lambda table: app(table) == {"127.0.0.1": True, "127.0.0.2": False})
                assert endpoint(table, f"blue/app@127.0.0.2:{port}").closing is None
                cells[CURRENT] = 0
                await one.table(lambda table: app(table) == {"127.0.0.1": True})
                del hosts.known["app"]
                asked = hosts.asked

                async def has_asked() -> bool:
                    return hosts.asked >= asked + 3

                await until(has_asked)
                assert app(one.tables[-1]) == {"127.0.0.1": True}, "the last good answer is kept"
                _, status = await ask(running, "/v1/status")
                told = status["names"][f"app:{port}"]
                assert (told["addresses"], told["error"]) == ([f"127.0.0.1:{port}"], "not known")
                assert told["age_seconds"] >= 0.0
                hosts.known["app"] = ["127.0.0.2"]
                table = await one.table(lambda table: "127.0.0.2" in app(table))
                again = endpoint(table, f"blue/app@127.0.0.2:{port}")
                assert again.identity == f"shop/blue/app@127.0.0.2:{port}#2"
                assert (again.is_eligible, again.is_awaited) == (False, True)
                await one.table(lambda table: app(table).get("127.0.0.2", False))
            other.close()
            await other.wait_closed()

    run(test)


def test_a_drain_is_of_the_name_and_holds_for_addresses_to_come(tmp_path: Path) -> None:
    async def test() -> None:
        hosts = Hosts(app=["127.0.0.1"])
        async with (
            backend() as port,
            controller(named(port), tmp_path, resolver=hosts) as running,
            relay(running.directory) as one,
        ):
            await one.table(lambda table: app(table) == {"127.0.0.1": True})
            await ask(running, "/v1/drain", {"server": "shop/app"})
            hosts.known["app"] = ["127.0.0.1", "127.0.0.2"]
            await one.table(lambda table: app(table) == {"127.0.0.1": False, "127.0.0.2": False})
            await ask(running, "/v1/ready", {"server": "shop/app", "wait_seconds": SECONDS})
            await one.table(lambda table: app(table) == {"127.0.0.1": True, "127.0.0.2": True})

    run(test)


def test_the_last_good_answer_holds_for_the_next_generation_and_its_relay_workers(tmp_path: Path) -> None:
    async def test() -> None:
        async with backend() as port:
            text = named(port, CHECKED)
            async with (
                controller(text, tmp_path, resolver=Hosts(app=["127.0.0.1"])) as running,
                relay(running.directory) as one,
            ):
                await one.table(lambda table: app(table) == {"127.0.0.1": True})
            first = initial_table(parse_config(text, "lb.toml"), 2, running.directory, tmp_path / "state")
            assert app(first) == {"127.0.0.1": True}
            async with (
                controller(text, tmp_path, generation=2, resolver=Hosts()) as running,
                relay(running.directory, 2) as one,
            ):
                await one.until(lambda: bool(one.tables))
                assert app(one.tables[0]) == {"127.0.0.1": True}

    run(test)


def test_a_name_that_is_not_known_yet_holds_nobody_up(tmp_path: Path) -> None:
    async def test() -> None:
        hosts = Hosts()
        async with (
            backend() as port,
            controller(named(port), tmp_path, resolver=hosts) as running,
            relay(running.directory) as one,
        ):
            await one.table(lambda table: not endpoint(table, "blue/app").is_awaited)
            assert not endpoint(one.tables[-1], "blue/app").is_eligible
            status, text = await ask(running, "/readyz")
            assert (status, text) == (503, f"service shop: no address is known of app:{port}\n")
            assert (await status_of(running, "app"))["health"] == "unknown"
            hosts.known["app"] = ["127.0.0.1"]
            await one.table(lambda table: app(table) == {"127.0.0.1": True})
            assert (await ask(running, "/readyz"))[0] == 200

    run(test)


def test_a_service_that_has_others_is_ready_without_a_name(tmp_path: Path) -> None:
    async def test() -> None:
        async with backend() as port:
            text = named(port, extra=f', {{ name = "b2", address = "127.0.0.1:{port}" }}')
            async with controller(text, tmp_path, resolver=Hosts()) as running, relay(running.directory) as one:
                await one.table(lambda table: not endpoint(table, "blue/app").is_awaited)
                assert endpoint(one.tables[-1], "blue/b2").is_eligible
                assert (await ask(running, "/readyz"))[0] == 200

    run(test)
