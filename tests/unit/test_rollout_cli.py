"""`handoff deploy …` as people and programs meet it: what it prints, and its exit codes. Hosts are this machine."""

from __future__ import annotations

import asyncio
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from handoff.cli.commands import run_command
from lb.core.rollout.model import Deploy, Host
from lb.core.rollout.plan import Seen, rolling
from lb.core.rollout.progress import Record, Run, State, Verdict
from lb.rollout.cli import main
from lb.rollout.follow import follow
from lb.rollout.journal import Journal
from lb.rollout.report import Bars
from lb.rollout.stores.base import Lease
from tests.sim.memory_store import MemoryStore

FILE = """
[deploy]
service = "shop"
store = "sqlite:{directory}/deploys.db"
bake = "0s"
activate = "echo {{version}} >>{directory}/{{host}}; test {{version}} != bad"
current = "echo v1"
[[host]]
name = "web1"
[[host]]
name = "web2"
"""
Deploying = Callable[..., tuple[int, str, str]]


@pytest.fixture
def deploy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Deploying:
    """Runs `handoff deploy` with these words; its exit code, and what it wrote to stdout and stderr."""
    monkeypatch.setenv("HANDOFF_HOST_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("HANDOFF_LB_TOKEN", "a-secret-of-the-balancer")
    (tmp_path / "deploy.toml").write_text(FILE.format(directory=tmp_path))

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["handoff deploy", *words, "--file", str(tmp_path / "deploy.toml")])
        code = run_command(main)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_rollout_is_told_in_plain_lines_and_kept_in_the_history(deploy: Deploying, tmp_path: Path) -> None:
    assert deploy("status") == (5, "", "handoff: error: service shop: no rollout yet\n")
    assert deploy("history") == (0, "no rollout yet\n", "")
    code, said, _ = deploy("plan", "v2")
    assert (code, said) == (
        0,
        f"  1. web1: activate\n       activate web1 : echo v2 >>{tmp_path}/web1; test v2 != bad\n"
        f"  2. web2: activate\n       activate web2 : echo v2 >>{tmp_path}/web2; test v2 != bad\n",
    )
    assert not (tmp_path / "web1").exists()
    assert deploy("v2") == (0, "web1: activate\nweb2: activate\nshop: deploy of v2: committed\n", "")
    code, said, _ = deploy("bad", "--yes")
    assert code == 3
    assert "shop: deploy of bad: rolled back: web1: activate exited with status 1 (operation " in said
    assert (tmp_path / "web1").read_text() == "v2\nbad\nv2\n"
    assert (tmp_path / "web2").read_text() == "v2\n"
    code, said, _ = deploy("history")
    lines = said.splitlines()
    assert lines[0].split() == ["BEGAN", "WHAT", "VERSION", "WHO", "SECONDS", "VERDICT"]
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ  deploy  bad      \S+ \(pid \d+\)  \d+ +rolled back", lines[1]
    )
    assert lines[2].endswith("committed")
    runs = json.loads(deploy("history", "--json")[1])
    assert [(one["version"], one["verdict"]) for one in runs] == [("bad", "rolled back"), ("v2", "committed")]
    status = json.loads(deploy("status", "--json")[1])
    assert (status["run"]["verdict"], status["lock"]) == ("rolled back", None)
    assert deploy("rollback")[0] == 0
    assert (tmp_path / "web2").read_text() == "v2\nv1\n"


def test_no_secret_of_the_environment_is_in_the_journal_or_on_a_host(deploy: Deploying, tmp_path: Path) -> None:
    _, said, _ = deploy("bad", "--yes")
    assert "a-secret" not in said
    found = [path for path in tmp_path.rglob("*") if path.is_file() and b"a-secret" in path.read_bytes()]
    assert not found


def test_what_is_over_is_neither_resumed_nor_aborted_nor_paused(deploy: Deploying) -> None:
    assert deploy("v2", "--yes")[0] == 0
    for command in ("resume", "abort"):
        code, _, said = deploy(command)
        assert (code, "committed, nothing to resume" in said) == (9, True)
    code, said, _ = deploy("pause")
    assert (code, said.endswith(": committed\n")) == (0, True)
    for version in ("", "-v", "a b", "$(id)", "v" * 129):
        assert deploy("plan", "--", version)[0] == 2
    assert deploy("plan", "v3", "--strategy", "canary")[0] == 2


def test_who_has_the_lock_is_told_by_name_and_time(deploy: Deploying, tmp_path: Path) -> None:
    from lb.rollout.stores.sqlite import SQLiteStore

    assert deploy("lock") == (0, "nobody\n", "")
    assert deploy("lock", "--json") == (0, "null\n", "")
    store = SQLiteStore(tmp_path / "deploys.db")
    store.lock("deploy/shop", "ann@laptop (pid 7)", 600.0)
    told = r"lock deploy/shop: is held by ann@laptop \(pid 7\) since \d{4}-\S+ \S+ \S+, until \d{4}-\S+ \S+ \S+, unless"
    code, said, _ = deploy("lock")
    assert (code, bool(re.match(told, said))) == (0, True)
    holder = json.loads(deploy("lock", "--json")[1])
    assert (holder["owner"], holder["until"] - holder["since"]) == ("ann@laptop (pid 7)", pytest.approx(600, abs=5))
    for words in (("v2", "--yes"), ("resume",), ("rollback",)):
        code, _, said = deploy(*words)
        assert (code, bool(re.search(told, said))) == (6, True)
    store.close()


# --- looking on -----------------------------------------------------------------------------------------------------


def begun(store: MemoryStore) -> tuple[Run, Journal, Lease]:
    hosts = tuple(Host(name=name) for name in ("web1", "web2"))
    deploy = Deploy(service="shop", hosts=hosts, stage="stage", activate="activate", bake_seconds=0.0)
    seen = Seen()
    plan = rolling(deploy, "v2", (), seen)
    run = Run(id="r1", version="v2", deploy=deploy, plan=plan, seen=seen, who="ann", began_at=0.0)
    journal = Journal(store, "shop")
    lease = store.lock("deploy/shop", "ann", 600.0)
    journal.begin(lease, run)
    return run, journal, lease


def test_in_a_terminal_status_shows_bars_until_the_run_has_ended() -> None:
    store = MemoryStore()
    run, journal, lease = begun(store)
    looks = iter(
        [
            lambda: journal.write(lease, run, [Record(step="b1.stage.web1", state=State.DONE, at=0.0)]),
            lambda: journal.write(lease, run, [Record(step="b1.activate.web1", state=State.BEGUN, at=0.0)]),
            lambda: journal.save(lease, msgspec.structs.replace(run, verdict=Verdict.COMMITTED)),
        ]
    )
    real = store.watch

    def watch(prefix: str, after: int, timeout: float) -> list:  # type: ignore[type-arg]
        next(looks)()
        return real(prefix, after, timeout)

    store.watch = watch  # type: ignore[method-assign]
    shown = io.StringIO()
    asyncio.run(follow(store, journal, run.id, Bars(Console(file=shown, force_terminal=True, width=100))))
    assert "web1: activate" in shown.getvalue()
    assert "all steps" in shown.getvalue()
    assert "1/4" in shown.getvalue()
    assert next(looks, None) is None


def test_in_a_terminal_status_ends_where_nobody_is_at_work() -> None:
    store = MemoryStore()
    run, journal, lease = begun(store)
    store.release(lease)
    asyncio.run(follow(store, journal, run.id, Bars(Console(file=io.StringIO(), force_terminal=True))))


def test_bars_show_the_whole_run_and_the_group_and_what_failed() -> None:
    store = MemoryStore()
    run, _, _ = begun(store)
    shown = io.StringIO()
    bars = Bars(Console(file=shown, force_terminal=True, width=120))
    steps = run.plan[0].steps
    bars.begins("web1: stage [it]", steps, (0, 4))
    bars.ended(steps[0], Record(step=steps[0].id, state=State.FAILED, at=0.0, note="web1: exited with [red]"))
    bars.close()
    assert "web1: stage [it]" in shown.getvalue()
    assert "  failed: web1: exited with [red]" in shown.getvalue()
    assert "0/4" in shown.getvalue()
