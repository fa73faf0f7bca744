"""Asking a balancer as a rollout does: fences, preparing, and every way to its admin API."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from handoff.errors import HandoffError, UsageError
from handoff.run_directory import RunDirectory
from lb.core.admin import SOCKET_NAME, Answer, Drain, Prepare, Ready, Switch, Verify
from lb.core.overrides import MAXIMUM_FENCES, Overrides, fenced
from lb.rollout.balancers import DirectBalancer, RemoteBalancer, client_for
from lb.rollout.transport import Unreachable, transport_for
from tests.unit.lb_harness import Running, backend, closed_port, controller, relay, run
from tests.unit.test_lb_commands import command, is_up
from tests.unit.test_lb_control import config

FENCE: dict[str, Any] = {"fence": "deploy/shop", "token": 5}


def socket_client(running: Running) -> DirectBalancer:
    found = client_for(f"unix:{running.directory / SOCKET_NAME}")
    assert isinstance(found, DirectBalancer)
    return found


def test_who_shows_a_lower_token_is_refused_also_after_a_restart_of_everything(tmp_path: Path) -> None:
    async def test() -> None:
        async with backend() as up:
            text = config(up)
            async with controller(text, tmp_path) as running, relay(running.directory) as one:
                await one.table(is_up)
                client = socket_client(running)
                assert (await client.ask(Drain(server="shop/b1", **FENCE), 20)).exit_code == 0
            async with controller(text, tmp_path) as running, relay(running.directory) as one:
                await one.until(lambda: bool(one.tables))
                client = socket_client(running)
                older = await client.ask(Ready(server="shop/b1", fence="deploy/shop", token=4), 20)
                assert (older.exit_code, older.message) == (
                    7,
                    "deploy/shop: token 4 is older than 5, which was seen; nothing changed",
                )
                backends = (await client.status()).services["shop"].pools["blue"].backends
                assert backends["b1"].administrative == "drain"
                assert (await client.ask(Ready(server="shop/b1", fence="deploy/blog", token=1), 20)).exit_code == 0
                status, answer = await command(running, "ready", server="shop/b1", fence="deploy/shop", token=4)
                assert (status, answer["exit_code"]) == (409, 7)
                status, answer = await command(running, "ready", server="shop/b1", fence="x" * 300, token=4)
                assert (status, answer["exit_code"]) == (400, 2)

    run(test)


def test_fences_are_bounded() -> None:
    overrides = Overrides()
    for number in range(MAXIMUM_FENCES + 10):
        changed = fenced(overrides, f"deploy/{number}", 1)
        assert changed is not None
        overrides = changed
    assert len(overrides.fences) == MAXIMUM_FENCES
    assert fenced(overrides, "deploy/1000", 1) is overrides, "nothing to write"


def test_what_is_prepared_is_told_with_its_revision_and_nothing_is_changed(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            backend() as blue,
            backend() as green,
            controller(config(blue, green=(green,)), tmp_path) as running,
            relay(running.directory) as one,
        ):
            await one.table(is_up)
            client = socket_client(running)
            prepared = await client.ask(Prepare(service="shop", pool="green", wait_seconds=10), 20)
            assert prepared == Answer(exit_code=0, message="shop/green is healthy at revision 1", revision=1)
            assert (await client.status()).services["shop"].pools["blue"].percent == 100
            stale = await client.ask(Prepare(service="shop", pool="green", revision=7), 20)
            assert (stale.exit_code, stale.message) == (9, "shop is at revision 1 by now, not 7; nothing changed")
            assert (await client.ask(Switch(service="shop", pool="green", revision=1), 20)).revision == 2
            again = await client.ask(Switch(service="shop", pool="green", revision=1), 20)
            assert again.exit_code == 9, "the answer was lost: status tells that it was taken"
            status = (await client.status()).services["shop"]
            assert (status.revision, status.pools["green"].percent) == (2, 100)

    run(test)


def test_a_pool_that_is_not_healthy_is_not_prepared(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            backend() as blue,
            controller(config(blue, green=(closed_port(),)), tmp_path) as running,
            relay(running.directory) as one,
        ):
            await one.until(lambda: bool(one.tables))
            answer = await socket_client(running).ask(Prepare(service="shop", pool="green", wait_seconds=0.1), 20)
            assert answer.exit_code == 9
            assert answer.message.startswith("shop/green is not healthy (g1 is ")
            gone = await socket_client(running).ask(Prepare(service="shop", pool="red"), 20)
            assert gone.exit_code == 5

    run(test)


def test_only_a_check_that_began_since_says_that_what_was_started_since_is_well(tmp_path: Path) -> None:
    """The last check passed, and another server has come to the address."""

    async def test() -> None:
        answers = itertools.repeat(b"200 OK")

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 " + next(answers) + b"\r\nContent-Length: 0\r\n\r\n")

        async with backend(serve) as up:
            check = 'type = "http"\npath = "/"\ninterval = "1s"\nfast_interval = "10ms"\nfall = 100'
            text = config(up).partition("[service.check]")[0] + f"[service.check]\n{check}\n"
            async with controller(text, tmp_path) as running, relay(running.directory) as one:
                await one.table(is_up)
                client = socket_client(running)
                assert (await client.ask(Verify(server="shop/b1", wait_seconds=20), 30)).exit_code == 0
                assert (await client.ask(Drain(server="shop/b1"), 20)).exit_code == 0
                answers = itertools.repeat(b"503 Sick")
                known = (await client.status()).services["shop"].pools["blue"].backends["b1"].health
                assert known == "up", "as far as anybody knows"
                ready = await client.ask(Ready(server="shop/b1", wait_seconds=0.3, is_afresh=True), 20)
                assert (ready.exit_code, "has passed no check since" in ready.message) == (4, True)
                prepared = await client.ask(Prepare(service="shop", pool="blue", wait_seconds=0.3, is_afresh=True), 20)
                assert prepared.exit_code == 9, "all of it is drained"
                put_out = await client.ask(Verify(server="shop/b1", wait_seconds=0.3), 20)
                assert put_out.exit_code == 0, "who was put out is not judged"
                backends = (await client.status()).services["shop"].pools["blue"].backends
                assert backends["b1"].administrative == "drain", "nothing was changed"
                answers = itertools.repeat(b"200 OK")
                ready = await client.ask(Ready(server="shop/b1", wait_seconds=20, is_afresh=True), 30)
                assert ready.exit_code == 0
                answers = itertools.repeat(b"503 Sick")
                assert (await client.ask(Verify(server="shop/b1", wait_seconds=0.3), 20)).exit_code == 4
                prepared = await client.ask(Prepare(service="shop", pool="blue", wait_seconds=0.3, is_afresh=True), 20)
                assert (prepared.exit_code, "has passed no check since" in prepared.message) == (9, True)

    run(test)


class Here:
    """A transport to this machine, with the run directory of the test."""

    name = "here"

    def __init__(self, root: Path) -> None:
        self._root = root

    async def request(self, argv: Sequence[str], stdin: bytes, timeout: float) -> bytes:
        assert argv[:3] == ["handoff", "lb", "request"]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "handoff", *argv[1:], "--run-dir", str(self._root)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await process.communicate(stdin)
        if process.returncode:
            raise HandoffError(errors.decode().strip())
        return output

    async def aclose(self) -> None:
        return None


def test_handoff_lb_request_carries_everything(tmp_path: Path) -> None:
    async def test() -> None:
        async with backend() as up, controller(config(up), tmp_path) as running, relay(running.directory) as one:
            await one.table(is_up)
            directory = RunDirectory(running.directory.parent, running.directory.name)
            directory.lock()
            client = RemoteBalancer("lb1", Here(running.directory.parent), running.directory.name)  # type: ignore[arg-type]
            assert (await client.status()).name == "edge"
            assert (await client.ask(Drain(server="shop/b1", why="it’s ü"), 20)).exit_code == 0
            shown = (await client.status()).services["shop"].pools["blue"].backends["b1"]
            assert shown.override == "drain: it’s ü"
            absent = RemoteBalancer("lb1", Here(running.directory.parent), "nobody")  # type: ignore[arg-type]
            with pytest.raises(HandoffError, match="no service named nobody"):
                await absent.status()
            directory.close()

    run(test)


def test_what_is_no_balancer_is_told_in_one_line(tmp_path: Path) -> None:
    async def test() -> None:
        gone = client_for(f"unix:{tmp_path}/admin.sock")
        with pytest.raises(Unreachable, match=r"balancer unix:.*: no such file or directory"):
            await gone.status()
        refused = client_for(f"http://127.0.0.1:{closed_port()}")
        with pytest.raises(Unreachable, match=r"balancer http://127.0.0.1:\d+: connection refused"):
            await refused.ask(Ready(server="shop/b1"), 5)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            hung = client_for(f"http://127.0.0.1:{silent.getsockname()[1]}")
            with pytest.raises(Unreachable, match=r"timed out|no answer"):
                await hung.ask(Ready(server="shop/b1"), 0.2)

        async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")
            writer.close()

        async with await asyncio.start_server(other, "127.0.0.1", 0) as server:
            stranger = client_for(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            with pytest.raises(HandoffError, match=r"status 200: is it a balancer\?"):
                await stranger.status()

    run(test)


@pytest.mark.parametrize(
    "address",
    [
        *(
            "",
            "lb1",
            "ftp://lb1",
            "ssh://",
            "ssh://lb1/x",
            "ssh://a:secret@lb1",
            "ssh://lb1?nme=x",
            "ssh://lb1?name=-x",
        ),
        *("http://lb1:x", "http://ann@lb1", "https://lb1:1?name=x", "unix:", "local:.."),
    ],
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(UsageError) as caught:
        client_for(address)
    assert "secret" not in caught.value.message
    assert "\n" not in caught.value.message


def test_the_token_comes_from_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> list[str]:
        seen: list[str] = []

        async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            seen.extend(line for line in head.decode().splitlines() if line.lower().startswith("authorization"))
            writer.write(
                b'HTTP/1.1 401 No\r\nContent-Length: 32\r\nConnection: close\r\n\r\n{"exit_code":9,"message":"token"}'[
                    :-1
                ]
            )
            writer.close()

        async with await asyncio.start_server(take, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            for query in ("", f"?token_file={tmp_path}/token"):
                with pytest.raises(HandoffError) as caught:
                    await client_for(f"http://127.0.0.1:{port}{query}").status()
                assert "secret" not in caught.value.message
        return seen

    monkeypatch.setenv("HANDOFF_LB_TOKEN", "secret-1")
    (tmp_path / "token").write_text("secret-2\n")
    assert asyncio.run(test()) == ["Authorization: Bearer secret-1", "Authorization: Bearer secret-2"]
    with pytest.raises(UsageError, match="cannot be read"):
        client_for(f"http://lb1?token_file={tmp_path}/none")


def test_a_balancer_over_ssh_is_asked_through_a_transport() -> None:
    client = client_for("ssh://deploy@lb1:2222?name=edge")
    assert isinstance(client, RemoteBalancer)
    assert client._words == ["handoff", "lb", "request", "--name=edge"]
    assert type(client._transport) is type(transport_for("ssh://deploy@lb1:2222"))
    assert os.environ.get("HANDOFF_LB_TOKEN") is None
