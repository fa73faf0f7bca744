"""Several machines, as an operator has them: hosts with a real sshd and services of handoff, balancers, and a desk from
which `handoff deploy` is called. Release directories lie behind a link `current`; each version says its name.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from handoff.errors import ExitCode
from tests.system.balancer import Balancer
from tests.system.harness import DEADLINE_SECONDS, Output, Service, wait_until
from tests.system.namespaces import Machine, Network, kill_all
from tests.system.sshd import ROOT, plug_ins

STARTED_AT_ONCE = 3
"""More only takes the processors from each other."""
PORT = 8000
LISTEN_PORT, ADMIN_PORT = 80, 8404
TOKEN = "open-sesame"
APP = """
VERSION, HOST = "@VERSION@", "@HOST@"

async def app(scope, receive, send):
    import asyncio
    status = 500 if scope["path"] == "/health" and VERSION.startswith("sick") else 200
    if VERSION.startswith("slow") and scope["path"] == "/":
        await asyncio.sleep(5)
    body = f"{HOST} {VERSION}".encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
"""
STAGE = """#!/bin/sh
# Makes a release. Whoever has put a pipe `hold` here has it wait; a file `full` has it fail.
set -eu
cd "$(dirname "$0")"
if [ -p hold ]; then cat hold; fi
if [ -e full ]; then echo "no space left"; exit 1; fi
mkdir -p "releases/$1"
echo "$1" >>staged
sed -e "s/@VERSION@/$1/" -e "s/@HOST@/$2/" main.py >"releases/$1/main.py"
"""
COMMANDS = {
    "stage": "{root}/stage {version} {host}",
    "activate": "ln -sfn releases/{version} {root}/.next && mv -T {root}/.next {root}/current",
    "reload": "handoff reload --wait --name {name} --label {version}",
    "current": "basename $(readlink {root}/current)",
}
SSHD_CONFIG = """\
ListenAddress {address}:22
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/key.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
SetEnv RUNTIME_DIRECTORY={run} HANDOFF_HOST_STATE={state} PATH={bin}:/usr/local/bin:/usr/bin:/bin
"""
SSH_CONFIG = """\
Host *
    User root
    IdentityFile {directory}/key
    IdentitiesOnly yes
    IdentityAgent none
    UserKnownHostsFile {directory}/known_hosts
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    HostKeyAlias box
"""
CHECK = 'type = "http"\npath = "/health"\ninterval = "200ms"\ntimeout = "10s"\nrise = 1\nfall = 2'
"""A busy machine is no sick one; a sick one says so."""


class Hold:
    """A command that reads this pipe, if there is one, waits until it is released."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        os.mkfifo(self._path)

    def has_come(self) -> None:
        """Wait until somebody waits."""

        def is_read() -> bool:
            with contextlib.suppress(OSError):  # fifo(7): ENXIO, nobody reads
                self._fd = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            return self._fd >= 0

        wait_until(is_read, f"somebody waits at {self._path}")

    def release(self) -> None:
        self._path.unlink()
        os.close(self._fd)


class Spot:
    """A service on a machine: a host of the rollout."""

    def __init__(self, fleet: Fleet, machine: Machine, name: str, service: str, port: int, app: str) -> None:
        """`port`: 0 for none."""
        self.name, self.machine, self.port = name, machine, port
        self.directory = fleet.directory_of(machine) / service
        self.directory.mkdir()
        (self.directory / "main.py").write_text(app.replace("@ROOT@", str(self.directory)))
        (self.directory / "stage").write_text(STAGE)
        (self.directory / "stage").chmod(0o755)
        subprocess.run([str(self.directory / "stage"), "v1", name], check=True, timeout=60)
        (self.directory / "current").symlink_to("releases/v1")
        words = ["--chdir", str(self.directory / "current"), "--no-access-log"]
        self.service = Service(
            fleet.directory_of(machine),
            *words,
            name=service,
            bind=f"0.0.0.0:{port}" if port else "none",
            command=[*machine.command, sys.executable, "-m", "handoff"],
        )

    @property
    def current(self) -> str:
        """The version that would be started next."""
        return os.readlink(self.directory / "current").removeprefix("releases/")

    def hold(self) -> Hold:
        """Of the next stage command here."""
        return Hold(self.directory / "hold")

    @property
    def staged(self) -> list[str]:
        """The versions, each time that one was."""
        return (self.directory / "staged").read_text().split()

    def fill_disk(self) -> None:
        (self.directory / "full").touch()

    def table(self, server: str | None) -> str:
        """Of deploy.toml."""
        lines = ["[[host]]", f'name = "{self.name}"', f'ssh = "{self.machine.name}"']
        if server is not None:
            lines.append(f'server = "{server}"')
        lines.append(f'variables = {{ root = "{self.directory}", name = "{self.service.name}" }}')
        return "\n".join(lines)


class Deployer:
    """`handoff deploy …` that runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.stdout, self.stderr = Output(process.stdout), Output(process.stderr)

    def ends(self, exit_code: int) -> str:
        """Wait for its end, which must be this one; what it said."""
        found = self.process.wait(2 * DEADLINE_SECONDS)
        said = f"{self.stdout.finish()}\n{self.stderr.finish()}"
        assert found == exit_code, f"exit code {found}, not {exit_code}:\n{said}"
        return said


class Fleet:
    """A context manager; everything that was started through it ends with it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.network = Network()
        self._deployers: list[Deployer] = []
        self.spots: dict[str, Spot] = {}
        self.balancers: dict[str, Balancer] = {}
        self.machines: dict[str, Machine] = {}
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        for name in ("bin", "desk"):
            (self.directory / name).mkdir()
        (self.directory / "token").touch(mode=0o600)
        (self.directory / "token").write_text(TOKEN)
        for name in ("host_key", "key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.directory / name)]
            subprocess.run(command, check=True, timeout=60)
        kind, key, *_ = (self.directory / "host_key.pub").read_text().split()
        (self.directory / "known_hosts").write_text(f"box {kind} {key}\n")
        path = f"{plug_ins(self.directory / 'site')}:{ROOT}"
        self._script("handoff", f'PYTHONPATH={path} exec {sys.executable} -P -m handoff "$@"')
        self._script("ssh", f'exec /usr/bin/ssh -F {self.directory / "ssh_config"} "$@"')
        with contextlib.ExitStack() as undo:
            undo.enter_context(self.network)
            undo.callback(self._end)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def _end(self) -> None:
        for one in self._deployers:
            one.process.kill()
            one.process.wait(DEADLINE_SECONDS)
            one.stdout.finish()
            one.stderr.finish()
        services = [one for one in (*self.all_services(),) if one.process is not None]
        side_by_side(lambda one: one.__exit__(), services)

    def all_services(self) -> list[Service]:
        return [*(one.service for one in self.spots.values()), *self.balancers.values()]

    def _script(self, name: str, line: str) -> None:
        path = self.directory / "bin" / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    # --- what there is ----------------------------------------------------------------------------------------------

    def machine(self, name: str, namespace: str | None = None) -> Machine:
        """Known to ssh by its name."""
        found = self.network.machine(name, 11 + len(self.machines), namespace)
        self.machines[name] = found
        self.directory_of(found).mkdir()
        return found

    def directory_of(self, machine: Machine) -> Path:
        return self.directory / machine.name

    def spot(
        self, name: str, machine: Machine | None = None, service: str = "shop", port: int = PORT, app: str = APP
    ) -> Spot:
        """A host with version v1, not started yet. `port`: 0 for none."""
        made = Spot(self, machine or self.machine(name), name, service, port, app)
        self.spots[name] = made
        return made

    def balancer(
        self,
        name: str,
        pools: dict[str, list[Spot]],
        check: str = CHECK,
        machine: Machine | None = None,
        addresses: Mapping[str, str] | None = None,
    ) -> Balancer:
        """Not started yet. `addresses`: of spots that it reaches by another way."""
        machine = machine or self.machine(name)
        lines = ["[balancer]", f'admin = "{machine.address}:{ADMIN_PORT}"']
        lines += [f'admin_token_file = "{self.directory / "token"}"', "[[service]]", 'name = "shop"']
        lines += [f'listen = "{machine.address}:{LISTEN_PORT}"']
        for pool, spots in pools.items():
            places = {one.name: one.machine.address for one in spots} | dict(addresses or {})
            backends = [f'{{ name = "{one.name}", address = "{places[one.name]}:{one.port}" }}' for one in spots]
            lines += [f"[service.pool.{pool}]", f"backends = [{', '.join(backends)}]"]
        lines += ["[service.timeouts]", 'spread = "100ms"', "[service.check]", check]
        made = Balancer(self.directory_of(machine), "\n".join(lines) + "\n", name="edge")
        made.command = [*machine.command, *made.command]
        self.balancers[name] = made
        return made

    def start(self) -> None:
        """All of it, side by side, until each backend is up on each balancer."""
        config = SSH_CONFIG.format(directory=self.directory)
        hosts = [f"Host {one.name}\n    HostName {one.address}\n" for one in self.machines.values()]
        (self.directory / "ssh_config").write_text("".join(hosts) + config)
        begin: list[Callable[[], object]] = [one.start for one in self.all_services()]
        begin += [lambda one=one: self.start_sshd(one) for one in self.machines.values()]
        side_by_side(lambda one: one(), begin, STARTED_AT_ONCE)
        self.are_up()

    def are_up(self) -> None:
        for one in self.balancers.values():
            wait_until(lambda one=one: all(found["health"] == "up" for found in one.backends().values()), "all are up")

    def start_sshd(self, machine: Machine) -> None:
        directory = self.directory_of(machine)
        run = next((one.run_dir for one in self.all_services() if one.directory == directory), directory)
        config = directory / "sshd_config"
        config.write_text(
            SSHD_CONFIG.format(
                address=machine.address,
                directory=self.directory,
                run=run,
                state=directory / "state",
                bin=self.directory / "bin",
            )
        )
        os.makedirs("/run/sshd", mode=0o755, exist_ok=True)  # sshd(8): where it separates privileges
        log = directory / "sshd.log"
        command = [*machine.command, "/usr/sbin/sshd", "-f", str(config), "-E", str(log)]
        subprocess.run(command, check=True, timeout=60)  # in the background when it listens

    def kill_balancer(self, name: str) -> None:
        """As if the power had failed: everything on its machine ends. Its disk stays."""
        kill_all(self.machines[name].namespace)
        self.balancers[name].__exit__()

    def start_again(self, name: str) -> None:
        self.balancers[name].start()
        self.start_sshd(self.machines[name])
        self.are_up()

    def stop_sshd(self, machine: Machine) -> None:
        """It, and its sessions."""
        found = [one for one in machine.processes() if one.name().startswith("sshd")]
        assert found
        for one in found:
            one.kill()
        wait_until(lambda: not any(one.name().startswith("sshd") for one in machine.processes()), "sshd has ended")

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Where clients connect to."""
        return [(self.machines[name].address, LISTEN_PORT) for name in self.balancers]

    def admin(self, name: str) -> str:
        """A balancer, as it is called in deploy.toml."""
        return f"http://{self.machines[name].address}:{ADMIN_PORT}?token_file={self.directory / 'token'}"

    # --- rollouts ---------------------------------------------------------------------------------------------------

    def write(
        self,
        hosts: Iterable[tuple[Spot, str | None]],
        *,
        balancers: Sequence[str] | None = None,
        desk: str = "desk",
        gate: dict[str, Any] | None = None,
        **keys: Any,
    ) -> None:
        """deploy.toml on a desk. `balancers`: as they are called there; by default all, over HTTP."""
        if balancers is None:
            balancers = [self.admin(name) for name in self.balancers]
        values = {"service": "shop", "balancers": list(balancers), "bake": "300ms", **COMMANDS, **keys}
        lines = ["[deploy]", *(f"{key} = {_toml(value)}" for key, value in values.items() if value is not None)]
        if gate:
            lines += ["[gate]", *(f"{key} = {_toml(value)}" for key, value in gate.items())]
        lines += [spot.table(server) for spot, server in hosts]
        (self.directory / desk).mkdir(exist_ok=True)
        (self.directory / desk / "deploy.toml").write_text("\n".join(lines) + "\n")

    def begin(self, *words: str, desk: str = "desk") -> Deployer:
        """`handoff deploy …` at a desk: ours, or on the machine of that name."""
        place = self.machines[desk].command if desk in self.machines else []
        process = subprocess.Popen(
            [*place, "handoff", "deploy", *words],
            cwd=self.directory / desk,
            env={**os.environ, "PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._deployers.append(Deployer(process))
        return self._deployers[-1]

    def gate(self) -> Hold:
        """Of what has `gate_command` in it."""
        return Hold(self.directory / "gate")

    @property
    def gate_command(self) -> str:
        path = self.directory / "gate"
        return f"if [ -p {path} ]; then cat {path}; fi"

    def resume(self, *words: str, exit_code: int = 0, desk: str = "desk") -> str:
        """As soon as the lock is free, whose holder is gone."""
        while True:
            one = self.begin("resume", *words, desk=desk)
            if one.process.wait(2 * DEADLINE_SECONDS) != ExitCode.LOCKED:
                return one.ends(exit_code)

    def deploy(self, *words: str, exit_code: int = 0, desk: str = "desk") -> str:
        """To its end, which must be this one; what it said."""
        return self.begin(*words, desk=desk).ends(exit_code)


def side_by_side(call: Callable[[Any], object], subjects: Sequence[Any], at_once: int = 16) -> None:
    """Raises what the first of them that failed has raised, when all have ended."""
    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(call, one) for one in subjects]
    for future in futures:
        future.result()


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml(one) for one in value)}]"
    if isinstance(value, str):
        return "'" + value + "'"
    return str(value)
