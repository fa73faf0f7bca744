"""What a rollout over many hosts costs: time and sessions of ssh, rolling and blue/green; and planning 1,000 hosts.

`python -m bench.rollout`: 50 simulated hosts and one real balancer, which keeps the journal and the lock as by default.
An `ssh` that comes first in PATH counts connections and sessions and runs everything here; `handoff host exec` and the
balancer's commands are the real ones. So all hosts share this machine's cores, which most of the time goes to: each
command starts a Python. Stage, activate and reload do nothing, and nothing is baked.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec

from bench import machine
from bench.servers import end_on_term
from lb.core.rollout.model import Deploy, Host
from lb.core.rollout.plan import Seen, pooled, rolling
from lb.core.rollout.progress import Do, Record, Run, State, turned_back, what_next

SSH = """#!/bin/sh
mode=session path=
while :; do
    case "$1" in
        -o) case "$2" in ControlPath=*) path=${2#ControlPath=} ;; esac; shift 2 ;;
        -M) mode=connection; shift ;;
        -O) mode=control; shift 2 ;;
        --) shift; break ;;
        *) shift ;;
    esac
done
host=$1; shift
[ $mode = control ] && exec rm -f "$path"
echo "$mode $host" >>"$BENCH_ROOT/sessions"
[ $mode = connection ] && exec touch "$path"
HANDOFF_HOST_STATE="$BENCH_ROOT/hosts/$host" exec sh -c "$*"
"""
_START_SECONDS = 30.0
_ROLLOUT_SECONDS = 1800.0
_COMMANDS = {"stage": "true {version}", "activate": "true {version}", "reload": "true"}


class Fleet:
    """Hosts, a balancer before them, and a deploy.toml for each strategy, below one directory."""

    def __init__(self, root: Path, hosts: int, at_once: int) -> None:
        self.root, self.hosts, self.at_once = root, hosts, at_once
        programs = root / "bin"
        programs.mkdir()
        (programs / "ssh").write_text(SSH)
        (programs / "ssh").chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
            "RUNTIME_DIRECTORY": str(root / "run"),
            "BENCH_ROOT": str(root),
        }

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """The balancer, whose backends accept, and close."""
        with contextlib.ExitStack() as stack:
            listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2 * self.hosts)]
            ports = [one.getsockname()[1] for one in listeners]
            stack.enter_context(_accepting(listeners))
            self._write(ports)
            log = stack.enter_context((self.root / "balancer.log").open("wb"))
            command = [sys.executable, "-P", "-m", "handoff", "lb", "run", "lb.toml"]
            process = subprocess.Popen(command, cwd=self.root, env=self.environment, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            self._wait(process)
            yield

    def _write(self, ports: list[int]) -> None:
        names = [f"web{number}" for number in range(self.hosts)]
        lines = ['[balancer]\nname = "edge"\n' + f'state = "{self.root}/edge"']
        for service, pools in (("rolling", ("main",)), ("blue-green", ("blue", "green"))):
            lines.append(f'[[service]]\nname = "{service}"\nlisten = "127.0.0.1:0"\n[service.check]\ntype = "tcp"')
            for pool, of_pool in zip(pools, (ports[: self.hosts], ports[self.hosts :]), strict=False):
                backends = [
                    f'{{ name = "{name}", address = "127.0.0.1:{port}" }}'
                    for name, port in zip(names, of_pool, strict=True)
                ]
                lines.append(f"[service.pool.{pool}]\nbackends = [{', '.join(backends)}]")
            own = f'[deploy]\nservice = "{service}"\nstrategy = "{service}"\nbalancers = ["ssh://lb1?name=edge"]\n'
            own += f'batch = {self.at_once}\nmax_unavailable = {self.at_once}\nparallel = {self.at_once}\nbake = "0s"\n'
            own += "\n".join(f'{key} = "{line}"' for key, line in _COMMANDS.items())
            for pool in pools:
                for name in names:
                    where = f"{service}/{pool}/{name}"
                    own += f'\n[[host]]\nname = "{name}-{pool}"\nssh = "{name}"\nserver = "{where}"'
            (self.root / f"{service}.toml").write_text(own + "\n")
        (self.root / "lb.toml").write_text("\n".join(lines) + "\n")

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        """Until the backends were checked."""
        deadline = time.monotonic() + _START_SECONDS
        command = [sys.executable, "-P", "-m", "handoff", "lb", "status", "--name", "edge", "--json"]
        while time.monotonic() < deadline and process.poll() is None:
            done = subprocess.run(command, env=self.environment, capture_output=True, check=False)
            if done.returncode == 0:
                pools = json.loads(done.stdout)["services"]["blue-green"]["pools"]
                if all(one["health"] == "up" for one in pools["blue"]["backends"].values()):
                    return
            time.sleep(0.2)
        raise RuntimeError((self.root / "balancer.log").read_text())

    def deploy(self, strategy: str) -> dict[str, Any]:
        """Seconds, and what the counting ssh has counted."""
        sessions = self.root / "sessions"
        sessions.write_text("")
        command = [sys.executable, "-P", "-m", "handoff", "deploy", "v1", "--yes", "--file", f"{strategy}.toml"]
        began = time.monotonic()
        done = subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=_ROLLOUT_SECONDS
        )
        seconds = time.monotonic() - began
        if done.returncode != 0:
            raise RuntimeError(
                f"{strategy}: exit code {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-2000:]}"[:8000]
            )
        lines = [line.split() for line in sessions.read_text().splitlines()]
        counted = Counter((mode, "lb" if host == "lb1" else "hosts") for mode, host in lines)
        return {
            "strategy": strategy,
            "seconds": seconds,
            "sessions_to_hosts": counted["session", "hosts"],
            "sessions_to_the_balancer": counted["session", "lb"],
            "connections": counted["connection", "hosts"] + counted["connection", "lb"],
        }


@contextlib.contextmanager
def _accepting(listeners: list[socket.socket]) -> Iterator[None]:
    """Checks connect for as long as a rollout takes: what nobody accepted would fill the queues."""
    selector, has_ended = selectors.DefaultSelector(), threading.Event()
    for one in listeners:
        one.setblocking(False)
        selector.register(one, selectors.EVENT_READ, one)

    def accept() -> None:
        while not has_ended.is_set():
            for key, _ in selector.select(0.5):
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    key.data.accept()[0].close()

    thread = threading.Thread(target=accept, name="backends")
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()
        selector.close()


def planner(hosts: int) -> dict[str, float]:
    """Milliseconds: the plan (median of 5), the processor's time for its slowest decision, and the way back."""
    found: dict[str, float] = {}
    for strategy in ("rolling", "blue-green"):
        deploy = _deploy(strategy, hosts)
        seen = Seen(previous={one.name: "v0" for one in deploy.hosts}, active="blue")
        make = rolling if strategy == "rolling" else pooled
        times = []
        for _ in range(5):
            began = time.perf_counter()
            plan = make(deploy, "v1", deploy.balancers, seen)
            times.append(1000 * (time.perf_counter() - began))
        run = Run(id="r", version="v1", deploy=deploy, plan=plan, seen=seen, who="bench", began_at=0.0)
        records: dict[str, Record] = {}
        slowest = 0.0
        while True:
            began = time.process_time()  # there are many: one of them is sure to be interrupted by somebody else
            following = what_next(run, records)
            slowest = max(slowest, time.process_time() - began)
            if not isinstance(following, Do):
                break
            records |= {one.id: Record(step=one.id, state=State.DONE, at=0.0) for one in following.steps}
        began = time.perf_counter()
        turned_back(run, records, "bench")
        found |= {
            f"{strategy} plan": statistics.median(times),
            f"{strategy} slowest decision": 1000 * slowest,
            f"{strategy} way back": 1000 * (time.perf_counter() - began),
            f"{strategy} steps": sum(len(group.steps) for group in plan),
        }
    return found


def _deploy(strategy: str, hosts: int) -> Deploy:
    pools = ("blue", "green")
    places = [f"shop/{pools[number % 2]}/web{number}" for number in range(hosts)]
    return Deploy(
        service="shop",
        strategy="rolling" if strategy == "rolling" else "blue-green",
        hosts=tuple(Host(name=f"web{number}", server=place) for number, place in enumerate(places)),
        balancers=("ssh://deploy@lb1", "ssh://deploy@lb2"),
        drain=strategy == "rolling",
        batch="5%",
        max_unavailable=hosts // 20 or 1,
        discard="true",
        **_COMMANDS,  # type: ignore[arg-type]
    )


@click.command()
@click.option("--hosts", default=50, show_default=True)
@click.option("--at-once", default=10, show_default=True, help="Hosts in a batch, and steps side by side.")
@click.option("--planned", default=1000, show_default=True, help="Hosts that are only planned for.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/out"), show_default=True)
def main(hosts: int, at_once: int, planned: int, out: Path) -> None:
    """Measure rollouts over simulated hosts, and the planner."""
    end_on_term()
    heading = f"{machine.describe()}; {hosts} simulated hosts on this machine, {at_once} at once, 1 balancer, no bake"
    click.echo(heading)
    figures: dict[str, Any] = {"heading": heading, "planner": planner(planned), "rollouts": []}
    for name, value in figures["planner"].items():
        click.echo(f"{planned} hosts, {name}: {value:.0f}{'' if name.endswith('steps') else ' ms'}")
    with tempfile.TemporaryDirectory(prefix="handoff-bench-") as directory:
        fleet = Fleet(Path(directory), hosts, at_once)
        with fleet.serving():
            for strategy in ("rolling", "blue-green"):
                one = fleet.deploy(strategy)
                figures["rollouts"].append(one)
                click.echo(
                    f"{strategy}: {one['seconds']:.1f} s, {one['sessions_to_hosts']} sessions to {hosts} hosts "
                    f"({one['sessions_to_hosts'] / hosts:.1f} each), {one['sessions_to_the_balancer']} to the "
                    f"balancer, over {one['connections']} connections"
                )
    out.mkdir(parents=True, exist_ok=True)
    (out / "rollout.json").write_bytes(msgspec.json.encode(figures))


if __name__ == "__main__":
    main()
