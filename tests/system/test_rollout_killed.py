"""Deployers that are killed, stopped, or two at once: real processes, hosts of this machine, and a real balancer."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.system.balancer import Balancer, HttpBackend, backend, config, http_backends
from tests.system.dying_deployer import Outcome, Wish
from tests.system.harness import DEADLINE_SECONDS, wait_until

ROOT = Path(__file__).resolve().parents[2]
CYCLE = tuple(
    (when, at) for begun in (3, 5) for when, at in (("behind", begun), ("before", begun + 1), ("behind", begun + 1))
)
"""Of a deployer that goes on, the writes are: what others want, the run, perhaps that it asks anew who may be out of
service (two), and then its steps. So one dies when it has said that it begins, the next when it has done it and not yet
said so, the third when it has."""
MAXIMUM_DEPLOYERS = 120

HEAD = """
[deploy]
service = "shop"
balancers = ["unix:ADMIN"]
store = "sqlite:ROOT/deploys.db"
lock_timeout = "60s"
stage = "echo $HANDOFF_OPERATION >>ROOT/log; mkdir -p ROOT/{host}"
once = "echo $HANDOFF_OPERATION >>ROOT/log"
activate = "echo $HANDOFF_OPERATION >>ROOT/log; echo {version} >ROOT/{host}/current"
reload = "echo $HANDOFF_OPERATION >>ROOT/log; test $(cat ROOT/{host}/current){host} != badweb2"
current = "echo v1"
"""
ROLLING = """
[[host]]
name = "web1"
server = "shop/web1"
[[host]]
name = "web2"
server = "shop/web2"
"""
POOLS = """
[[host]]
name = "blue1"
server = "shop/blue/web1"
[[host]]
name = "green1"
server = "shop/green/web2"
"""


class Rollouts:
    """A balancer before two backends, and deployers of what is in a directory."""

    def __init__(self, directory: Path, backends: dict[str, HttpBackend]) -> None:
        self.directory = directory
        check = 'type = "http"\npath = "/health"\ninterval = "200ms"\nrise = 1'
        shown = [backend(one) for one in backends.values()]
        self.one_pool = config({"main": shown}, check=check)
        self.two_pools = config({"blue": shown[:1], "green": shown[1:]}, check=check)
        self.balancer = Balancer(directory, self.one_pool)
        self._ahead = itertools.count(1000, 1000)
        state = {"HANDOFF_HOST_STATE": str(directory / "hosts"), "PYTHONPATH": str(ROOT)}
        self.environment = {**os.environ, **state}
        self.deployers = subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.system.dying_deployer"],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def write(self, text: str) -> None:
        admin = self.balancer.run_dir / "edge" / "admin.sock"
        (self.directory / "deploy.toml").write_text(
            text.replace("ROOT", str(self.directory)).replace("ADMIN", str(admin))
        )

    @contextlib.contextmanager
    def serving(self, text: str = "") -> Iterator[Balancer]:
        """The balancer, its backends checked. `text`: another lb.toml."""
        self.balancer.write(text or self.one_pool)
        with self.balancer as balancer:
            wait_until(lambda: all(one["health"] == "up" for one in balancer.backends().values()), "they are up")
            yield balancer

    def deployer(self, *arguments: str, when: str = "before", at: int = 0) -> Outcome:
        """One of `handoff deploy`, to its end. The leases of all before it have ended."""
        self.ask(*arguments, when=when, at=at)
        return self.answer()

    def ask(self, *arguments: str, when: str = "before", at: int = 0) -> None:
        words = [*arguments, "--file", str(self.directory / "deploy.toml")]
        wish = Wish(arguments=words, when=when, at=at, ahead=next(self._ahead))
        assert self.deployers.stdin is not None
        self.deployers.stdin.write(msgspec.json.encode(wish) + b"\n")
        self.deployers.stdin.flush()

    def answer(self) -> Outcome:
        assert self.deployers.stdout is not None
        return msgspec.json.decode(self.deployers.stdout.readline(), type=Outcome)

    def start(self, *words: str) -> subprocess.Popen[str]:
        """`handoff deploy`, and do not wait."""
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "lb.rollout", *words, "--file", str(self.directory / "deploy.toml")],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def handoff(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "handoff", *words]
        return subprocess.run(command, env=self.environment, input=stdin, capture_output=True, text=True, check=False)

    def killed_at_every_step(self, version: str) -> int:
        """Begin, and go on, each time killed a little later, until the run has ended. How many deployers it took."""
        found = self.deployer(version, "--yes", when="behind", at=1)
        for number, (when, at) in enumerate(itertools.chain([("behind", 1), ("before", 3)], itertools.cycle(CYCLE)), 2):
            assert number <= MAXIMUM_DEPLOYERS, found.output
            if found.exit_code != -signal.SIGKILL:
                assert self.status()["verdict"] is not None, found.output
                return number
            found = self.deployer("resume", when=when, at=at)
        raise AssertionError("unreachable")

    def status(self) -> dict[str, Any]:
        """Of the newest run."""
        found: dict[str, Any] = json.loads(self.deployer("status", "--json").output)["run"]
        assert len(json.loads(self.deployer("history", "--json").output)) == 1
        return found

    def ran(self) -> list[str]:
        """The steps that ran on hosts, in their order; once each."""
        operations = (self.directory / "log").read_text().split()
        twice = [name for name, count in Counter(operations).items() if count > 1]
        assert not twice
        return [one.partition(".")[2] for one in operations]

    def versions(self) -> dict[str, str]:
        return {path.parent.name: path.read_text().strip() for path in self.directory.glob("*/current")}


pytestmark = pytest.mark.timeout(600)
"""Dozens of processes one after the other, each of them short."""


@pytest.fixture
def rollouts(tmp_path: Path) -> Iterator[Rollouts]:
    with http_backends(tmp_path, "web1", "web2") as backends:
        made = Rollouts(tmp_path, backends)
        with made.deployers:
            yield made


def test_killed_at_every_step_of_a_rolling_run_each_deployer_goes_on_where_the_last_one_died(
    rollouts: Rollouts,
) -> None:
    with rollouts.serving():
        rollouts.write(HEAD + 'drain = true\nbake = "0s"\n' + ROLLING)
        assert rollouts.killed_at_every_step("v2") > 35
        assert rollouts.status()["verdict"] == "committed"
        each = ["stage", "activate", "reload"]
        expected = [f"b{number}.{kind}.web{number}" for number in (1, 2) for kind in each]
        assert rollouts.ran() == [expected[0], "b1.once.web1", *expected[1:]]
        assert rollouts.versions() == {"web1": "v2", "web2": "v2"}
        assert {one["administrative"] for one in rollouts.balancer.backends().values()} == {"ready"}


def test_killed_at_every_step_of_the_way_back_it_is_taken_once(rollouts: Rollouts) -> None:
    with rollouts.serving():
        rollouts.write(HEAD + 'bake = "0s"\n' + ROLLING)
        rollouts.killed_at_every_step("bad")
        assert rollouts.status()["verdict"] == "rolled back"
        assert [one for one in rollouts.ran() if one.startswith("undo")] == [
            *("undo1.activate.web2", "undo1.reload.web2"),
            *("undo2.activate.web1", "undo2.reload.web1"),
        ]
        assert rollouts.versions() == {"web1": "v1", "web2": "v1"}


def test_killed_at_every_step_of_blue_green_it_ends_in_one_pool_and_one_verdict(rollouts: Rollouts) -> None:
    with rollouts.serving(rollouts.two_pools) as balancer:
        retire = (
            'strategy = "blue-green"\nbake = "10ms"\nkeep = "10ms"\nretire = "echo $HANDOFF_OPERATION >>ROOT/log"\n'
        )
        rollouts.write(HEAD + retire + POOLS)
        rollouts.killed_at_every_step("v2")
        assert rollouts.status()["verdict"] == "committed"
        service = balancer.lb_status()["services"]["shop"]
        assert (service["revision"], service["pools"]["green"]["percent"]) == (2, 100), "switched once"
        steps = [f"new.{kind}.green1" for kind in ("stage", "once", "activate", "reload")]
        assert rollouts.ran() == [*steps, "old.retire.blue1"]


def test_killed_at_every_step_of_a_switch_and_back_it_ends_where_it_began(rollouts: Rollouts) -> None:
    with rollouts.serving(rollouts.two_pools) as balancer:
        discard = 'strategy = "blue-green"\nbake = "10ms"\ndiscard = "echo $HANDOFF_OPERATION >>ROOT/log"\n'
        rollouts.write(HEAD + discard + POOLS + '[gate]\ncommand = "false"\n')
        rollouts.killed_at_every_step("v2")
        run = rollouts.status()
        assert (run["verdict"], run["reason"]) == ("rolled back", "the gate's command exited with status 1")
        service = balancer.lb_status()["services"]["shop"]
        assert (service["revision"], service["pools"]["blue"]["percent"]) == (3, 100), (
            "switched there and back, once each"
        )
        assert rollouts.ran()[-1] == "undo.discard.green1"


class Gate:
    """A command that waits until it is let through."""

    def __init__(self, directory: Path) -> None:
        self.come, place = directory / "come", directory / "gate"
        os.mkfifo(place)
        # To read and to write: a command that comes to it finds a writer, and what is written waits for it.
        self._gate = os.open(place, os.O_RDWR)
        self.line = f"echo $HANDOFF_TOKEN >>{self.come}; read word <{place}"

    def wait(self) -> None:
        wait_until(self.come.exists, "the command runs")

    def open(self) -> None:
        """For one command."""
        os.write(self._gate, b"\n")

    def close(self) -> None:
        os.close(self._gate)

    @property
    def tokens(self) -> list[str]:
        return self.come.read_text().split()


@pytest.fixture
def gate(rollouts: Rollouts) -> Iterator[Gate]:
    made = Gate(rollouts.directory)
    yield made
    made.close()


def test_of_two_that_deploy_at_once_one_wins_and_the_other_is_told_who(rollouts: Rollouts, gate: Gate) -> None:
    with rollouts.serving():
        rollouts.write(HEAD.replace("once = ", f'before = "{gate.line}"\nonce = ') + 'bake = "0s"\n' + ROLLING)
        both = [rollouts.start(version, "--yes") for version in ("v2", "v3")]
        wait_until(lambda: any(one.poll() is not None for one in both), "one is refused")
        loser = next(one for one in both if one.poll() is not None)
        winner = next(one for one in both if one is not loser)
        said, _ = loser.communicate(timeout=DEADLINE_SECONDS)
        assert loser.returncode == 6, said
        assert f"(pid {winner.pid}) since " in said
        assert ", until " in said
        gate.open()
        said, _ = winner.communicate(timeout=DEADLINE_SECONDS)
        assert winner.returncode == 0, said
        assert len(set(rollouts.versions().values())) == 1


def test_a_deployer_that_stood_still_past_its_lease_is_refused_everywhere(rollouts: Rollouts, gate: Gate) -> None:
    with rollouts.serving() as balancer:
        text = HEAD.replace("once = ", f'before = "{gate.line}"\nonce = ')
        rollouts.write(text + 'drain = true\nbake = "0s"\n' + ROLLING)
        first = rollouts.start("v2", "--yes")
        try:
            gate.wait()
            first.send_signal(signal.SIGSTOP)
            rollouts.ask("resume")
            wait_until(lambda: len(gate.tokens) == 2, "its successor has the lock")
            gate.open()
            gate.open()
            found = rollouts.answer()
            assert found.exit_code == 0, found.output
            first.send_signal(signal.SIGCONT)
            said, _ = first.communicate(timeout=DEADLINE_SECONDS)
            assert first.returncode == 7, said
            assert "our lease has ended" in said
        finally:
            first.send_signal(signal.SIGCONT)
            first.kill()
            first.communicate()
        older = gate.tokens[0]
        drain = {"server": "shop/web1", "fence": "deploy/shop", "token": int(older)}
        asked = {"method": "POST", "path": "/v1/drain", "body": json.dumps(drain)}
        words = ["lb", "request", "--name", "edge", "--run-dir", str(balancer.run_dir)]
        said = rollouts.handoff(*words, stdin=json.dumps(asked)).stdout
        assert json.loads(json.loads(said)["body"])["exit_code"] == 7
        words = ["host", "exec", "--service", "shop", "--token", older, "--operation", "late", "--", "true"]
        late = rollouts.handoff(*words)
        assert (late.returncode, "is fenced" in late.stderr) == (7, True)
        assert rollouts.versions() == {"web1": "v2", "web2": "v2"}


def test_a_command_goes_on_while_its_deployer_is_killed_and_the_next_one_joins_it(
    rollouts: Rollouts, gate: Gate
) -> None:
    with rollouts.serving():
        waits = f"mkdir -p ROOT/{{host}}; test {{host}} != web1 || {{ {gate.line}; }}"
        rollouts.write(HEAD.replace("mkdir -p ROOT/{host}", waits) + 'bake = "0s"\n' + ROLLING)
        first = rollouts.start("v2", "--yes")
        gate.wait()
        first.kill()
        first.communicate()
        rollouts.ask("resume")
        gate.open()
        found = rollouts.answer()
        assert found.exit_code == 0, found.output
        assert len(gate.tokens) == 1
        rollouts.ran()


def test_ctrl_c_stops_at_a_safe_point_gives_the_lock_back_and_says_how_to_go_on(rollouts: Rollouts, gate: Gate) -> None:
    with rollouts.serving():
        waits = f"mkdir -p ROOT/{{host}}; test {{host}} != web1 || {{ {gate.line}; }}"
        rollouts.write(HEAD.replace("mkdir -p ROOT/{host}", waits) + 'bake = "0s"\n' + ROLLING)
        first = rollouts.start("v2", "--yes")
        assert first.stdout is not None
        gate.wait()
        first.send_signal(signal.SIGINT)
        heard = next(line for line in first.stdout if "stops at the next safe point" in line)
        assert heard == "SIGINT: stops at the next safe point; a second one ends this deployer at once\n"
        gate.open()
        said, _ = first.communicate(timeout=DEADLINE_SECONDS)
        assert first.returncode == 7, said
        assert "is paused: by SIGINT; go on with handoff deploy resume" in said
        assert rollouts.deployer("lock").output == "nobody\n"
        assert rollouts.deployer("resume").exit_code == 0
        assert len(gate.tokens) == 1
        rollouts.ran()
