"""A balancer that starts takes newer revisions from its peers: which ones, from whom, and what if nobody answers."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from handoff.errors import HandoffError, UsageError
from lb.config import parse_config
from lb.control import catching_up
from lb.control.catching_up import UNHEARD_NAME, catch_up_before_start
from lb.control.stored import OVERRIDES_NAME, read_overrides
from lb.core.catching_up import caught_up
from lb.core.model import Backend, Service
from lb.core.overrides import Overrides, ServiceOverride, Shares, StateChange, revision_of, shares_of
from tests.unit.lb_harness import Running, backend, controller, relay, run
from tests.unit.test_lb_commands import command, is_up
from tests.unit.test_lb_control import config

POOLS = {name: (Backend(name="b1", address="10.0.0.1:80"),) for name in ("blue", "green")}
SHOP = Service(name="shop", listen=(":80",), pools=POOLS, active="blue")
DRAINED = {"shop/blue/b1": StateChange(state="drain", at=1.0, configured="10.0.0.1:80")}


def at(revision: int, pool: str | None, at: float = 0.0, configured: str = "blue", **more: Any) -> Overrides:
    """The service `shop` at a revision that leads to this pool; None: as configured."""
    shares = None if pool is None else Shares(shares={pool: 100}, at=at)
    return Overrides(
        services={"shop": ServiceOverride(revision=revision, configured=configured, shares=shares)}, **more
    )


def taken(own: Overrides, theirs: Overrides, is_new: bool = False) -> tuple[int, dict[str, int], int]:
    """Revision, shares, and how many lines."""
    found, notes = caught_up(own, theirs, [SHOP], "lb2", is_new=is_new)
    return revision_of("shop", found), shares_of(SHOP, found), len(notes)


def test_a_newer_revision_is_taken_and_an_older_one_is_not() -> None:
    assert taken(at(4, "blue"), at(5, "green")) == (5, {"green": 100}, 1)
    assert taken(at(4, "blue"), at(3, "green")) == (4, {"blue": 100}, 0)
    assert taken(at(4, "blue"), at(4, "blue", 9.0)) == (4, {"blue": 100}, 0)
    assert taken(Overrides(), at(5, "green")) == (5, {"green": 100}, 1)
    assert taken(at(4, "green"), Overrides()) == (4, {"green": 100}, 0)
    assert taken(at(4, "green"), at(5, None)) == (5, {"blue": 100}, 1)


def test_of_two_equal_revisions_the_later_switch_counts() -> None:
    assert taken(at(4, "blue", 1.0), at(4, "green", 2.0)) == (4, {"green": 100}, 1)
    assert taken(at(4, "blue", 2.0), at(4, "green", 1.0)) == (4, {"blue": 100}, 0)


def test_what_does_not_fit_the_own_file_is_not_taken_and_said() -> None:
    assert taken(at(4, "blue"), at(5, "red")) == (4, {"blue": 100}, 1)
    assert taken(at(4, "blue"), at(5, None, configured="green")) == (4, {"blue": 100}, 1)
    found, notes = caught_up(at(4, "blue"), at(5, "red"), [SHOP], "lb2", is_new=False)
    assert (found, notes) == (at(4, "blue"), ("shop: revision 5 of lb2 is not taken: there is no pool red here",))


def test_drains_are_taken_by_a_balancer_that_never_ran_and_by_no_other() -> None:
    theirs = at(5, "green", states=DRAINED)
    assert caught_up(Overrides(), theirs, [SHOP], "lb2", is_new=True)[0].states == DRAINED
    assert caught_up(at(4, "blue"), theirs, [SHOP], "lb2", is_new=False)[0].states == {}
    assert caught_up(at(4, "blue", states=DRAINED), at(5, "green"), [SHOP], "lb2", is_new=False)[0].states == DRAINED


def test_of_fences_the_highest_token_counts() -> None:
    own, theirs = Overrides(fences={"a": 3, "b": 1}), Overrides(fences={"a": 2, "b": 5, "c": 1})
    found, _ = caught_up(own, theirs, [], "lb2", is_new=False)
    assert found.fences == {"a": 3, "b": 5, "c": 1}


@pytest.mark.parametrize("address", ["lb2", "ssh://", "ssh://lb2/x", "http://u@lb2:1", "local:a b", "http://lb2:1?x=1"])
def test_a_peer_that_is_no_balancer_is_a_mistake_in_the_file(address: str) -> None:
    text = f'[balancer]\npeers = ["{address}"]\n[[service]]\nname = "shop"\nlisten = ":1"\npool.blue.backends = []\n'
    with pytest.raises(UsageError, match="line 2"):
        parse_config(text, "lb.toml")


def test_a_wish_of_a_rollout_that_the_peer_has_taken_is_not_taken_twice() -> None:
    """Somebody there has switched since; the watch would undo that."""
    theirs = at(5, "blue", desired={"shop": (7, 2), "blog": (3, 1)}, number=40)
    found, _ = caught_up(at(4, "green", desired={"shop": (6, 1)}, number=2), theirs, [SHOP], "lb2", is_new=False)
    assert (found.desired, found.number) == ({"shop": (7, 2)}, 2)
    found, _ = caught_up(at(6, "green", desired={"shop": (6, 1)}), theirs, [SHOP], "lb2", is_new=False)
    assert found.desired == {"shop": (6, 1)}, "what was not taken is not noted"
    assert caught_up(Overrides(), theirs, [SHOP], "lb2", is_new=True)[0].desired == {"shop": (7, 2)}


# --- with real controllers ------------------------------------------------------------------------------------------


def with_peers(text: str, *peers: str) -> str:
    return text.replace('name = "edge"', f'name = "edge"\npeers = [{", ".join(map(repr, peers))}]', 1)


def peer_at(running: Running) -> str:
    return f"unix:{running.directory}/admin.sock"


async def started(text: str, tmp_path: Path) -> tuple[str, ...]:
    """As `handoff lb run` does it, in a thread."""
    balancer = parse_config(text, "lb.toml")
    return await asyncio.to_thread(catch_up_before_start, balancer, tmp_path / "state", str(tmp_path))


def test_a_starting_balancer_has_what_was_switched_while_it_was_down(tmp_path: Path) -> None:
    async def test() -> None:
        (tmp_path / "one").mkdir()
        async with backend() as blue, backend() as green:
            text = config(blue, green=(green,))
            async with controller(text, tmp_path / "one") as running, relay(running.directory) as one:
                await one.table(is_up)
                assert (await command(running, "switch", service="shop", pool="green", wait_seconds=20))[0] == 200
                own = with_peers(text, peer_at(running))
                notes = await started(own, tmp_path)
                assert notes == (f"shop: revision 2 is taken from {peer_at(running)}: green 100 %",)
                found = read_overrides(tmp_path / "state")
                assert (found.services["shop"].revision, shares_of(SHOP, found)) == (2, {"green": 100})
                assert found.number == 1, "later than what any process of an earlier run knows"
                assert await started(own, tmp_path) == (), "there is nothing newer"
                assert not (tmp_path / "state" / UNHEARD_NAME).exists()
            async with controller(own, tmp_path) as other, relay(other.directory) as one:
                assert (await one.table(lambda _: True)).routes["shop"].shares == {"green": 100}

    run(test)


def test_a_peer_that_was_silent_at_the_start_is_heard_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catching_up, "FIRST_RETRY_SECONDS", 0.02)

    async def test() -> None:
        (tmp_path / "one").mkdir()
        async with backend() as blue, backend() as green:
            text = config(blue, green=(green,))
            async with controller(text, tmp_path / "one") as running, relay(running.directory) as one:
                await one.table(is_up)
                assert (await command(running, "switch", service="shop", pool="green", wait_seconds=20))[0] == 200
                peer = peer_at(running)
            own = with_peers(text, peer, "unix:/nowhere/admin.sock")
            notes = await started(own, tmp_path)
            assert len(notes) == 2
            assert not (tmp_path / "state" / OVERRIDES_NAME).exists()
            unheard = msgspec.json.decode((tmp_path / "state" / UNHEARD_NAME).read_bytes())
            assert unheard == [peer, "unix:/nowhere/admin.sock"]
            async with controller(own, tmp_path) as other, relay(other.directory) as two:
                assert (await two.table(lambda _: True)).routes["shop"].shares == {"blue": 100}
                async with controller(text, tmp_path / "one"):
                    await two.table(lambda table: table.routes["shop"].shares == {"green": 100})
                    assert (await two.table(lambda _: True)).routes["shop"].revision == 2
            unheard = msgspec.json.decode((tmp_path / "state" / UNHEARD_NAME).read_bytes())
            assert unheard == ["unix:/nowhere/admin.sock"], "for the next controller to ask"

    run(test)


def test_a_peer_that_never_answers_holds_up_no_start_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catching_up, "ANSWER_SECONDS", 0.1)

    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            peer = f"http://127.0.0.1:{silent.getsockname()[1]}"
            [note] = await started(with_peers(config(), peer), tmp_path)
            assert note.startswith(f"balancer {peer}: no answer within 0.1 s")

    run(test)


def test_a_peer_is_asked_with_the_token_that_the_pair_shares(tmp_path: Path) -> None:
    async def test() -> None:
        seen = []

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            seen.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            await writer.drain()

        for name, token in (("ours", "secret"), ("theirs", "other")):
            (tmp_path / name).write_text(f"{token}\n")
            (tmp_path / name).chmod(0o600)
        async with backend(answer) as port:
            peers = (f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port}?token_file=theirs")
            text = with_peers(config(), *peers).replace("[balancer]", '[balancer]\nadmin_token_file = "ours"', 1)
            assert await started(text, tmp_path) == ()
        assert sorted(head.partition(b"Bearer ")[2].split()[0] for head in seen) == [b"other", b"secret"]
        assert all(head.startswith(b"GET /v1/overrides ") for head in seen)

    run(test)


def test_a_token_that_cannot_be_read_refuses_the_start(tmp_path: Path) -> None:
    text = with_peers(config(), "http://127.0.0.1:1?token_file=nowhere")
    with pytest.raises(HandoffError, match="nowhere cannot be read"):
        catch_up_before_start(parse_config(text, "lb.toml"), tmp_path / "state", str(tmp_path))
    (tmp_path / "lb.toml").write_text(text)
    asked = [sys.executable, "-P", "-m", "lb.catch_up", str(tmp_path / "lb.toml"), f"--state={tmp_path}/state"]
    ran = subprocess.run(asked, env=dict(os.environ), capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 2
    assert "nowhere cannot be read" in ran.stderr
    assert "Traceback" not in ran.stderr
