"""The admin API: what its commands do, and who may ask."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from handoff.errors import HandoffError
from lb.config import parse_config
from lb.control import controller as controller_module
from lb.control.admin import Door, may
from lb.control.stored import MEMORY_NAME, initial_table, read_overrides
from lb.core.admin import SOCKET_NAME
from lb.core.table import Endpoint, Table
from lb.page import CURRENT
from tests.unit.lb_harness import Running, backend, closed_port, controller, endpoint, endpoints, relay, run
from tests.unit.test_lb_control import config


async def ask(
    where: Path | int, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, dict[str, Any]]:
    """Status, and the JSON that was answered; text as {"text": …}."""
    if isinstance(where, Path):
        reader, writer = await asyncio.open_unix_connection(str(where))
    else:
        reader, writer = await asyncio.open_connection("127.0.0.1", where)
    data = b"" if body is None else json.dumps(body).encode()
    sent = {"host": "localhost", "connection": "close", "content-length": str(len(data)), **headers}
    head = "".join(f"{key}: {value}\r\n" for key, value in sent.items())
    writer.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + data)
    answer = await reader.read()
    writer.close()
    head_bytes, _, text = answer.partition(b"\r\n\r\n")
    status = int(head_bytes.split()[1])
    return status, json.loads(text) if b"json" in head_bytes else {"text": text.decode()}


async def command(running: Running, name: str, /, **fields: Any) -> tuple[int, dict[str, Any]]:
    return await ask(running.directory / SOCKET_NAME, "POST", f"/v1/{name}", fields)


async def status_of(running: Running) -> dict[str, Any]:
    status, answer = await ask(running.directory / SOCKET_NAME, "GET", "/v1/status")
    assert status == 200
    return answer


@contextlib.asynccontextmanager
async def listener() -> AsyncIterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        made.setblocking(False)
        yield made


def is_up(table: Table) -> bool:
    return all(one.is_eligible for one in endpoints(table).values())


def test_a_switch_is_answered_when_every_relay_worker_has_it_and_rollback_is_the_next_revision(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            backend() as blue,
            backend() as green,
            controller(config(blue, green=(green,)), tmp_path) as running,
            relay(running.directory) as one,
            relay(running.directory, slot=1) as slow,
        ):
            await slow.table(is_up)
            slow.says_taken = False
            switching = asyncio.ensure_future(command(running, "switch", service="shop", pool="green", revision=1))
            await slow.table(lambda table: table.routes["shop"].shares == {"green": 100})
            await one.table(lambda table: table.routes["shop"].shares == {"green": 100})
            assert (await status_of(running))["services"]["shop"]["revision"] == 2
            assert not switching.done()
            slow.take()
            slow.says_taken = True
            status, answer = await switching
            assert (status, answer["exit_code"], answer["revision"]) == (200, 0, 2)

            status, answer = await command(running, "switch", service="shop", pool="blue", revision=1)
            assert (status, answer["exit_code"]) == (409, 9)
            assert "revision 2 by now, not 1" in answer["message"]

            status, answer = await command(running, "rollback", service="shop")
            assert (status, answer["revision"]) == (200, 3)
            assert one.tables[-1].routes["shop"].shares == {"blue": 100}

    run(test)


def test_a_switch_waits_for_a_relay_worker_that_has_lost_its_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller_module, "RECONNECT_SECONDS", 0.0)

    async def test() -> None:
        async with (
            backend() as blue,
            backend() as green,
            controller(config(blue, green=(green,)), tmp_path) as running,
            relay(running.directory) as one,
            relay(running.directory, slot=1) as other,
        ):
            for each in (one, other):
                await each.table(is_up)
            other.writer.close()
            await other.until(lambda: other.is_closed)
            switching = asyncio.ensure_future(command(running, "switch", service="shop", pool="green"))
            await one.table(lambda table: table.routes["shop"].shares == {"green": 100})
            assert (await status_of(running))["services"]["shop"]["revision"] == 2
            assert not switching.done()
            await other.connect()
            assert (await switching)[0] == 200
            assert other.tables[-1].routes["shop"].shares == {"green": 100}

    run(test)


def test_a_switch_to_a_pool_that_is_not_healthy_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            backend() as blue,
            controller(config(blue, green=(closed_port(),)), tmp_path) as running,
            relay(running.directory) as one,
        ):
            await one.table(lambda table: not endpoint(table, "green/g1").is_awaited)
            status, answer = await command(running, "switch", service="shop", pool="green")
            assert (status, answer["exit_code"]) == (409, 9)
            assert "g1 is down" in answer["message"]
            assert one.tables[-1].routes["shop"].shares == {"blue": 100}
            status, answer = await command(running, "rollback", service="shop")
            assert (status, answer["message"]) == (409, "shop: there is no previous revision; nothing changed")

    run(test)


def test_for_a_way_back_a_pool_of_which_one_is_up_is_good_enough(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            backend() as blue,
            backend() as green,
            controller(config(blue, green=(green, closed_port())), tmp_path) as running,
            relay(running.directory) as one,
        ):
            await one.table(lambda table: not any(each.is_awaited for each in endpoints(table).values()))
            for name in ("prepare", "switch"):
                status, answer = await command(running, name, service="shop", pool="green")
                assert (status, answer["message"]) == (409, "shop/green is not healthy (g2 is down); nothing changed")
                status, answer = await command(running, name, service="shop", pool="green", is_partial_enough=True)
                assert (status, answer["exit_code"]) == (200, 0)
            status, answer = await command(running, "switch", service="shop", pool="blue")
            assert status == 200
            await command(running, "weight", server="shop/g1", weight=0)
            status, answer = await command(running, "switch", service="shop", pool="green", is_partial_enough=True)
            assert (status, answer["exit_code"]) == (409, 9), "nobody there would get a connection"

    run(test)


def test_a_switch_waits_for_the_pool_to_be_healthy(tmp_path: Path) -> None:
    async def test() -> None:
        port = closed_port()
        check = 'interval = "50ms"\nrise = 1'
        async with (
            backend() as blue,
            controller(config(blue, green=(port,), check=check), tmp_path) as running,
            relay(running.directory) as one,
        ):
            await one.table(lambda table: not endpoint(table, "green/g1").is_awaited)
            asked = command(running, "switch", service="shop", pool="green", wait_seconds=30, percent=25)
            switching = asyncio.ensure_future(asked)
            async with backend(port=port):
                status, answer = await switching
            assert (status, answer["exit_code"]) == (200, 0)
            assert one.tables[-1].routes["shop"].shares == {"green": 25, "blue": 75}

    run(test)


def test_of_two_switches_that_wait_for_a_pool_at_one_revision_one_is_refused(tmp_path: Path) -> None:
    async def test() -> None:
        port = closed_port()
        check = 'interval = "50ms"\nrise = 1'
        async with (
            backend() as blue,
            controller(config(blue, green=(port,), check=check), tmp_path) as running,
            relay(running.directory) as one,
        ):
            await one.table(lambda table: not endpoint(table, "green/g1").is_awaited)
            asked = [
                command(running, "switch", service="shop", pool="green", wait_seconds=30, revision=1, percent=percent)
                for percent in (25, 50)
            ]
            switching = asyncio.gather(*asked)
            async with backend(port=port):
                answers = await switching
            assert sorted(answer["exit_code"] for _, answer in answers) == [0, 9]
            assert (await status_of(running))["services"]["shop"]["revision"] == 2

    run(test)


def test_a_drain_waits_for_connections_closes_what_is_left_and_holds_over_a_restart(tmp_path: Path) -> None:
    async def test() -> None:
        async with backend() as blue, backend() as other:
            text = config(blue, other)
            async with controller(text, tmp_path) as running, relay(running.directory) as one:
                identity = endpoint(await one.table(is_up), "blue/b1").identity
                cells = one.page.cells(one.page.column(identity))
                cells[CURRENT] = 2
                fields = {"server": "shop/b1", "deadline_seconds": 1000, "who": "ann", "why": "kernel"}
                status, answer = await command(running, "drain", **fields, wait_seconds=0.1)
                assert (status, answer["exit_code"]) == (504, 4)
                assert "2 connections are left" in answer["message"]
                drained = endpoint(one.tables[-1], "blue/b1")
                assert not drained.is_eligible
                assert drained.closing is not None

                waiting = asyncio.ensure_future(command(running, "drain", **fields, wait_seconds=30))
                shown = (await status_of(running))["services"]["shop"]["pools"]["blue"]["backends"]["b1"]
                assert shown["administrative"] == "drain"
                assert shown["health"] == "up"
                assert shown["connections"] == 2
                assert shown["override"] == "drain by ann: kernel"
                cells[CURRENT] = 0
                status, answer = await waiting
                assert (status, answer["message"]) == (200, "shop/blue/b1 drains; no connection is left")
                # The deadline counts from the first one.
                assert endpoint(one.tables[-1], "blue/b1") == drained
                cells.release()
            async with controller(text, tmp_path) as running, relay(running.directory) as one:
                await one.until(lambda: bool(one.tables))
                assert endpoint(one.tables[-1], "blue/b1") == drained
                status, _ = await command(running, "ready", server="shop/b1", wait_seconds=30)
                assert status == 200
                assert endpoint(one.tables[-1], "blue/b1").is_eligible

    run(test)


def test_maint_weight_and_drain_are_three_things(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            backend() as blue,
            controller(config(blue, blue, blue), tmp_path) as running,
            relay(running.directory) as one,
        ):
            await one.table(is_up)
            await command(running, "weight", server="shop/blue/b1", weight=0)
            await command(running, "drain", server="shop/blue/b2")
            await command(running, "maint", server="shop/blue/b3")

            def told(of: Endpoint) -> tuple[bool, float, bool]:
                return of.is_eligible, of.weight, of.closing is not None

            table = one.tables[-1]
            assert told(endpoint(table, "blue/b1")) == (True, 0.0, False)
            assert told(endpoint(table, "blue/b2")) == (False, 1.0, False)
            assert told(endpoint(table, "blue/b3")) == (False, 1.0, True)
            await command(running, "ready", server="shop/blue/b3")
            status, answer = await command(running, "ready", server="shop/blue/b3", wait_seconds=30)
            assert (status, answer["exit_code"]) == (200, 0)
            assert endpoint(one.tables[-1], "blue/b3").is_eligible
            await command(running, "drain", server="shop/blue/b3", until_seconds=0.05)
            await one.table(lambda table: endpoint(table, "blue/b3").is_eligible)

    run(test)


def test_what_is_removed_and_added_again_is_another_one_and_is_checked_first(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            backend() as blue,
            backend() as new,
            controller(config(blue), tmp_path) as running,
            relay(running.directory) as one,
        ):
            await one.table(is_up)
            fields = {"pool": "shop/blue", "name": "n1"}
            status, _ = await command(running, "add", **fields, address=f"127.0.0.1:{new}", wait_seconds=30)
            assert status == 200
            added = endpoint(one.tables[-1], "blue/n1")
            assert added.is_eligible
            cells = one.page.cells(one.page.column(added.identity))
            cells[CURRENT] = 1
            status, _ = await command(running, "remove", **fields)
            assert status == 200
            leaving = endpoint(one.tables[-1], "blue/n1")
            assert (leaving.identity, leaving.is_eligible) == (added.identity, False)
            seen = len(one.tables)
            status, _ = await command(running, "add", **fields, address=f"127.0.0.1:{new}", wait_seconds=30)
            identities = {each.identity for each in one.tables[-1].routes["shop"].pools["blue"] if each.name == "n1"}
            assert identities == {added.identity, added.identity.replace("#1", "#2")}
            awaited = [each for table in one.tables[seen:] for each in table.routes["shop"].pools["blue"]]
            assert any(each.is_awaited and each.identity.endswith("#2") for each in awaited)
            cells[CURRENT] = 0
            cells.release()
            await one.table(lambda table: added.identity not in {each.identity for each in endpoints(table).values()})
            assert len(one.tables[-1].routes["shop"].pools["blue"]) == 2

    run(test)


def test_apply_touches_nothing_else_and_says_what_needs_a_reload(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            backend() as blue,
            backend() as new,
            controller(config(blue, green=(blue,)), tmp_path) as running,
            relay(running.directory) as one,
        ):
            before = endpoint(await one.table(is_up), "blue/b1")
            await command(running, "weight", server="shop/g1", weight=7, who="ann")
            wanted = config(blue, new, green=(new,)).replace("127.0.0.1:1", "127.0.0.1:2")
            status, answer = await command(running, "apply", text=wanted, shown="lb.toml")
            assert status == 200
            notes = "\n".join(answer["notes"])
            assert "needs a reload: listen of shop" in notes
            assert f"shop/green/g1: weight by ann dropped, the file says 127.0.0.1:{new} weight 1 by now" in notes
            assert endpoint(one.tables[-1], "blue/b1") == before
            await one.table(lambda table: endpoint(table, "blue/b2").is_eligible)
            revision = one.tables[-1].revision
            status, answer = await command(running, "apply", text="[balancer]\nnam = 1", shown="lb.toml")
            assert (status, answer["exit_code"]) == (400, 2)
            assert "line 2" in answer["message"]
            assert one.tables[-1].revision == revision
        # What was applied holds over a restart of the controller alone.
        async with controller(config(blue, green=(blue,)), tmp_path) as again, relay(again.directory) as one:
            await one.until(lambda: bool(one.tables))
            assert "blue/b2" in endpoints(one.tables[-1])

    run(test)


def test_what_is_not_there_is_named_with_the_nearest_that_is(tmp_path: Path) -> None:
    async def test() -> None:
        async with backend() as blue, controller(config(blue, green=(blue,)), tmp_path) as running:
            for name, fields, said in [
                ("drain", {"server": "shpo/b1"}, "there is no service shpo; did you mean shop?"),
                ("drain", {"server": "shop/b11"}, "shop has no backend b11; did you mean b1?"),
                ("switch", {"service": "shop", "pool": "gren"}, "shop has no pool gren; did you mean green?"),
                ("remove", {"pool": "shop/blue", "name": "x"}, "shop/blue has no backend x; there are: b1"),
            ]:
                status, answer = await command(running, name, **fields)
                assert (status, answer["exit_code"], answer["message"]) == (404, 5, said)
            for name, fields, said in [
                ("drain", {"server": "shop"}, "SERVICE/SERVER"),
                ("drain", {"sever": "shop/b1"}, "unknown field `sever`"),
                ("weight", {"server": "shop/b1", "weight": 1000}, "from 0 to 256"),
                ("add", {"pool": "shop/blue", "name": "x", "address": "nowhere"}, "no port"),
                ("switch", {"service": "shop", "pool": "green", "percent": 0}, "from 1 to 100"),
            ]:
                status, answer = await command(running, name, **fields)
                assert (status, answer["exit_code"]) == (400, 2), answer
                assert said in answer["message"]
            status, answer = await command(running, "explode")
            assert status == 404
            assert "drain, ready, maint" in answer["message"]

    run(test)


def test_a_backend_that_is_the_balancer_itself_is_not_added(tmp_path: Path) -> None:
    async def test() -> None:
        async with backend() as blue, controller(config(blue), tmp_path) as running:
            status, answer = await command(running, "add", pool="shop/blue", name="x", address="127.0.0.1:1")
            assert (status, answer["exit_code"]) == (400, 2)
            assert "listens on itself" in answer["message"]

    run(test)


def test_where_the_relay_workers_really_listen_is_no_backend_either(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            backend() as blue,
            controller(config(blue), tmp_path) as running,
            relay(running.directory, generation=7, bound=("127.0.0.1:9",)),
            relay(running.directory, bound=("127.0.0.1:7", "unix:/run/own.sock")) as one,
        ):
            await one.table(is_up)
            for address in ("127.0.0.1:7", "unix:/run/../run/own.sock"):
                status, answer = await command(running, "add", pool="shop/blue", name="x", address=address)
                assert (status, answer["exit_code"]) == (400, 2)
                assert answer["message"] == f"{address} is an address that this balancer listens on itself"
            status, answer = await command(running, "apply", text=config(blue, 7), shown="lb.toml")
            assert (status, answer["exit_code"]) == (400, 2)
            assert answer["message"].startswith("lb.toml: line 9: 127.0.0.1:7 is an address that this balancer")
            status, _ = await command(running, "add", pool="shop/blue", name="x", address="127.0.0.1:9")
            assert status == 200, "of another generation"

    run(test)


def test_who_adds_before_a_relay_worker_has_told_where_it_listens_waits_for_that(tmp_path: Path) -> None:
    async def test() -> None:
        text = config().replace('"127.0.0.1:1"', '"fd://3"')
        async with controller(text, tmp_path) as running:
            adding = asyncio.ensure_future(command(running, "add", pool="shop/blue", name="x", address="127.0.0.1:7"))
            await status_of(running)
            async with relay(running.directory, bound=("127.0.0.1:7",)):
                status, answer = await adding
            assert (status, answer["exit_code"]) == (400, 2)

    run(test)


def test_changes_hold_without_a_disk_and_say_that_they_are_not_durable(tmp_path: Path) -> None:
    async def test() -> None:
        (tmp_path / "state").write_text("a file where a directory should be")
        async with (
            backend() as blue,
            controller(config(blue), tmp_path) as running,
            relay(running.directory) as one,
        ):
            await one.table(is_up)
            status, answer = await command(running, "drain", server="shop/b1")
            assert status == 200
            assert answer["notes"][0].startswith(f"not durable: {tmp_path}/state/overrides.json: ")
            assert not endpoint(one.tables[-1], "blue/b1").is_eligible
            assert not (await status_of(running))["is_durable"]
            (tmp_path / "state").unlink()
            status, answer = await command(running, "weight", server="shop/b1", weight=3)
            assert answer["notes"] == []
            assert (await status_of(running))["is_durable"]

    run(test)


def test_a_change_that_is_not_durable_holds_over_the_death_of_the_controller_and_for_new_relay_workers(
    tmp_path: Path,
) -> None:
    async def test() -> None:
        (tmp_path / "state").write_text("a file where a directory should be")
        text = config(closed_port(), green=(closed_port(),)).partition("[service.check]")[0]
        memory = tmp_path / "run" / MEMORY_NAME
        async with controller(text, tmp_path) as running:
            assert (await command(running, "switch", service="shop", pool="green"))[0] == 200
            with_it = initial_table(parse_config(text, "lb.toml"), 2, tmp_path / "run", tmp_path / "state")
            assert with_it.routes["shop"].shares == {"green": 100}  # of the next generation
            left = memory.read_bytes()
        memory.write_bytes(left)  # what SIGKILL would have left
        async with controller(text, tmp_path) as successor:
            answer = await status_of(successor)
            assert (answer["services"]["shop"]["revision"], answer["is_durable"]) == (2, False)
            (tmp_path / "state").unlink()
            assert (await command(successor, "weight", server="shop/blue/b1", weight=3))[1]["notes"] == []
        saved = read_overrides(tmp_path / "state")
        assert saved.services["shop"].revision == 2
        assert saved.weights.keys() == {"shop/blue/b1"}
        memory.write_bytes(left)  # of before: what is on the disk is later
        with_both = initial_table(parse_config(text, "lb.toml"), 2, tmp_path / "run", tmp_path / "state")
        assert endpoint(with_both, "blue/b1").weight == 3

    run(test)


def test_over_tcp_everybody_here_may_read_and_only_who_has_the_token_may_change(tmp_path: Path) -> None:
    async def test() -> None:
        token_file = tmp_path / "token"
        token_file.write_text("secret\n")
        token_file.chmod(0o600)
        async with backend() as blue, listener() as admin:
            port = admin.getsockname()[1]
            named = f'name = "edge"\nadmin = "127.0.0.1:{port}"\nadmin_token_file = "{token_file}"'
            text = config(blue).replace('name = "edge"', named, 1)
            async with controller(text, tmp_path, admin=admin) as running, relay(running.directory) as one:
                await one.table(is_up)
                for path in ("/v1/status", "/livez", "/readyz", "/metrics"):
                    assert (await ask(port, "GET", path))[0] == 200
                body = {"server": "shop/b1"}
                assert (await ask(port, "POST", "/v1/drain", body))[0] == 401
                assert (await ask(port, "POST", "/v1/drain", body, authorization="Bearer wrong"))[0] == 401
                assert (await ask(port, "GET", "/v1/status", host="evil.example"))[0] == 403
                assert (await ask(port, "GET", "/v1/status", origin="http://evil.example"))[0] == 403
                assert (await ask(port, "POST", "/v1/drain", body, authorization="Bearer secret"))[0] == 200
                assert not endpoint(one.tables[-1], "blue/b1").is_eligible
                _, metrics = await ask(port, "GET", "/metrics")
                labels = '{backend="b1",pool="blue",service="shop"}'
                assert f"handoff_lb_backend_eligible{labels} 0.0" in metrics["text"]
                assert f"handoff_lb_backend_connections_total{labels} 0.0" in metrics["text"]

    run(test)


def test_without_a_token_file_nothing_is_changed_over_tcp(tmp_path: Path) -> None:
    async def test() -> None:
        async with backend() as blue, listener() as admin:
            text = config(blue).replace('name = "edge"', 'name = "edge"\nadmin = "127.0.0.1:1234"', 1)
            async with controller(text, tmp_path, admin=admin):
                port = admin.getsockname()[1]
                status, answer = await ask(port, "POST", "/v1/drain", {"server": "shop/b1"})
                assert status == 403
                assert "admin_token_file" in answer["message"]

    run(test)


def test_an_address_that_others_reach_needs_a_token_file(tmp_path: Path) -> None:
    async def test() -> None:
        with socket.create_server(("0.0.0.0", 0)) as admin:
            text = config(2).replace('name = "edge"', 'name = "edge"\nadmin = "0.0.0.0:1234"', 1)
            with pytest.raises(HandoffError, match="admin_token_file"):
                async with controller(text, tmp_path, admin=admin):
                    pytest.fail("it started")

    run(test)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "edge.example:8404"}, 401),
        ({"host": "10.0.0.1:8404"}, 401),
        ({"host": "10.0.0.9:8404"}, 403),
        ({"host": "evil.example", "authorization": "Bearer secret"}, None),
        ({"host": "[::1]:8404", "authorization": "bearer secret"}, None),
        ({"host": "", "authorization": "Basic secret"}, 403),
        ({"host": "10.0.0.1", "origin": "null", "authorization": "Bearer secret"}, 403),
    ],
)
def test_beyond_loopback_reads_need_the_token_too(headers: dict[str, str], status: int | None) -> None:
    host = "edge.example" if headers["host"].startswith("edge") else "10.0.0.1"
    door = Door(is_private=False, is_loopback=False, host=host, token="secret")
    pairs = [(key.encode(), value.encode()) for key, value in headers.items()]
    refusal = may(door, "GET", "/v1/status", pairs)
    assert (None if refusal is None else refusal.status) == status


def test_a_request_that_is_too_long_is_refused(tmp_path: Path) -> None:
    async def test() -> None:
        async with backend() as blue, controller(config(blue), tmp_path) as running:
            status, _ = await command(running, "apply", text="#" * (5 * 1024 * 1024), shown="lb.toml")
            assert status == 413

    run(test)
