"""The store that a balancer keeps: `POST /v1/store`, asked as a deployer asks it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from lb.control import store_api as store_api_module
from lb.control.store_api import FILE_NAME
from lb.core.admin import SOCKET_NAME, STORE_PATH
from lb.rollout.stores import Fenced, Locked, RemoteStore, StoreError
from tests.unit.lb_harness import SECONDS, Running, backend, controller, run
from tests.unit.test_lb_commands import ask, listener
from tests.unit.test_lb_control import config

LONG = 3600.0
T = TypeVar("T")


def call_over(path: Path) -> Callable[[bytes], bytes]:
    """One request of the admin socket, blocking."""

    def call(request: bytes) -> bytes:
        connection = http.client.HTTPConnection("localhost", timeout=SECONDS)
        with contextlib.closing(connection):
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(SECONDS)
            connection.sock.connect(str(path))
            connection.request("POST", STORE_PATH, request)
            return connection.getresponse().read()

    return call


class Client:
    """A RemoteStore, off the loop."""

    def __init__(self, running: Running) -> None:
        self.store = RemoteStore(call_over(running.directory / SOCKET_NAME), "edge")

    async def do(self, call: Callable[[RemoteStore], T]) -> T:
        return await asyncio.to_thread(call, self.store)


@contextlib.asynccontextmanager
async def balancer(tmp_path: Path, generation: int = 1) -> AsyncIterator[Client]:
    async with backend() as port, controller(config(port), tmp_path, generation=generation) as running:
        yield Client(running)


def test_two_deployers_share_one_lock_and_one_truth(tmp_path: Path) -> None:
    async def test() -> None:
        async with balancer(tmp_path) as alice:
            bob = Client.__new__(Client)
            bob.store = alice.store
            lease = await alice.do(lambda store: store.lock("shop", "alice@laptop", LONG))
            with pytest.raises(Locked, match="alice@laptop since 20"):
                await bob.do(lambda store: store.lock("shop", "bob@ci", LONG))
            version = await alice.do(lambda store: store.txn(lease, {"a": 0}, {"a": b"1"}))
            assert await bob.do(lambda store: store.get("a")) == ("a", b"1", version)
            assert await bob.do(lambda store: store.txn(None, {}, {"free/shop": b"pause"})) is not None
            await alice.do(lambda store: store.release(lease))
            with pytest.raises(Fenced):
                await alice.do(lambda store: store.txn(lease, {}, {"a": b"2"}))
            assert (await bob.do(lambda store: store.lock("shop", "bob@ci", LONG))).token > lease.token

    run(test)


def test_the_file_is_made_at_first_use_in_the_state_directory(tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "state" / FILE_NAME
        async with balancer(tmp_path) as client:
            assert not path.exists()
            assert await client.do(lambda store: store.list("")) == []
            assert path.stat().st_mode & 0o777 == 0o600
            assert path.parent.stat().st_mode & 0o777 == 0o700

    run(test)


def test_a_lease_outlives_the_controller_and_is_shared_by_two_generations(tmp_path: Path) -> None:
    async def test() -> None:
        async with balancer(tmp_path) as first:
            lease = await first.do(lambda store: store.lock("shop", "alice", LONG))
        async with balancer(tmp_path, generation=2) as second:
            await second.do(lambda store: store.renew(lease))
            assert await second.do(lambda store: store.txn(lease, {}, {"a": b"1"})) is not None

    run(test)


def test_a_watch_hears_of_a_change_and_holds_up_nobody(tmp_path: Path) -> None:
    async def test() -> None:
        async with balancer(tmp_path) as client:
            lease = await client.do(lambda store: store.lock("shop", "alice", LONG))
            version = await client.do(lambda store: store.txn(lease, {}, {"w/a": b"1"}))
            watches = [
                asyncio.ensure_future(client.do(lambda store: store.watch("w/", version or 0, SECONDS)))
                for _ in range(4)
            ]
            await client.do(lambda store: store.txn(lease, {}, {"other": b""}))
            await client.do(lambda store: store.txn(lease, {}, {"w/b": b"2"}))
            for found in await asyncio.gather(*watches):
                assert [(one.key, one.value) for one in found] == [("w/b", b"2")]

    run(test)


def test_a_watch_does_not_hold_up_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        looked = asyncio.Event()
        before = store_api_module.StoreApi._do

        async def do(self: Any, request: Any) -> Any:
            response = await before(self, request)
            looked.set()
            return response

        monkeypatch.setattr(store_api_module.StoreApi, "_do", do)
        monkeypatch.setattr(store_api_module, "LOOK_SECONDS", LONG)
        monkeypatch.setattr(store_api_module, "WATCH_SECONDS", LONG)
        body = b'{"type":"watch","prefix":"","after":0,"seconds":3600}'
        async with balancer(tmp_path) as client:
            watching = asyncio.ensure_future(client.do(lambda store: store._call(body)))
            await looked.wait()
        assert await watching == b'{"type":"found","entries":[],"has_more":false}'

    run(test)


def test_many_at_once_are_told_to_come_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr(store_api_module, "MAXIMUM_PENDING", 0)
        async with balancer(tmp_path) as client:
            with pytest.raises(StoreError, match="requests wait for it already; try again"):
                await client.do(lambda store: store.get("a"))
        monkeypatch.setattr(store_api_module, "MAXIMUM_WATCHES", 0)
        async with balancer(tmp_path) as client:
            with pytest.raises(StoreError, match="watch it already; try again"):
                await client.do(lambda store: store.watch("a", 0, 1.0))

    run(test)


def test_a_store_that_cannot_be_opened_is_told_and_the_balancer_goes_on(tmp_path: Path) -> None:
    async def test() -> None:
        async with balancer(tmp_path) as client:
            file = tmp_path / "state" / FILE_NAME
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"somebody else's " * 1000)
            file.chmod(0o600)
            with pytest.raises(StoreError, match="file is not a database; see that the file can be written, or move"):
                await client.do(lambda store: store.get("a"))
            file.unlink()
            assert await client.do(lambda store: store.get("a")) is None

    run(test)


def test_garbage_is_answered_and_too_much_is_not_read(tmp_path: Path) -> None:
    async def test() -> None:
        async with backend() as port, controller(config(port), tmp_path) as running:
            path = running.directory / SOCKET_NAME
            for body, status, match in (
                ({}, 200, "cannot be used"),
                ([1], 200, "cannot be used"),
                ({"type": "get", "key": "a b"}, 200, "use 1 to 256 of letters"),
                ({"type": "get", "key": "a" * 3_000_000}, 200, "more than 2097152 bytes"),
                ({"type": "get", "key": "a" * 5_000_000}, 413, "more than 4194304 bytes"),
            ):
                found, answer = await ask(path, "POST", STORE_PATH, body)
                assert (found, answer["exit_code"]) == (status, 9 if status == 200 else 2)
                assert match in answer["message"]
            assert (await ask(path, "GET", STORE_PATH))[0] == 404
            assert (await ask(path, "PUT", STORE_PATH))[0] == 405

    run(test)


def test_over_tcp_reading_needs_the_token_as_writing_does(tmp_path: Path) -> None:
    async def test() -> None:
        token_file = tmp_path / "token"
        token_file.write_text("secret\n")
        token_file.chmod(0o600)
        async with backend() as blue, listener() as admin:
            port = admin.getsockname()[1]
            named = f'name = "edge"\nadmin = "127.0.0.1:{port}"\nadmin_token_file = "{token_file}"'
            text = config(blue).replace('name = "edge"', named, 1)
            async with controller(text, tmp_path, admin=admin):
                body = {"type": "get", "key": "a"}
                assert (await ask(port, "POST", STORE_PATH, body))[0] == 401
                assert (await ask(port, "POST", STORE_PATH, body, origin="http://evil.example"))[0] == 403
                status, answer = await ask(port, "POST", STORE_PATH, body, authorization="Bearer secret")
                assert (status, answer["type"]) == (200, "found")

    run(test)
