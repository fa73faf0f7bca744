"""Two balancers and a virtual address that keepalived gives to one of them: what moves with it, and what is lost.

Machines are network namespaces; keepalived is the real one, and speaks VRRP in unicast. The configuration of
both is the one that docs/operations.md shows.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from bench.slow_link import enter
from tests.system.balancer import Balancer, HttpBackend
from tests.system.harness import DEADLINE_SECONDS, Clients, read_response, wait_until
from tests.system.network import NETWORK, Machine, Network

VIRTUAL = f"{NETWORK}.100"
KEPT, SHORT = 6, 4
"""Clients that keep their connection, and that make one for each request."""
PATIENCE_SECONDS = 4.0
"""Of clients: one whose request has arrived sees nothing of its server's end, and TCP has nothing to send again."""

DOCUMENT = Path(__file__).parents[2] / "docs" / "operations.md"


def documented() -> tuple[str, str]:
    """lb.toml and keepalived.conf of the first one."""
    section = DOCUMENT.read_text().partition("\n## Two balancers\n")[2].partition("\n## ")[0]
    toml, keepalived = re.findall(r"^```\w*\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return toml, keepalived


def of_the_other(text: str, one: str, other: str) -> str:
    return (
        text.replace(one, "x.x.x.x")
        .replace(other, one)
        .replace("x.x.x.x", other)
        .replace("priority 100", "priority 90")
    )


class Keepalived:
    """Owns its process."""

    def __init__(self, machine: Machine, directory: Path, text: str) -> None:
        file = directory / "keepalived.conf"
        file.write_text(text)
        pids = [f"--pid={directory}/keepalived.pid", f"--vrrp_pid={directory}/vrrp.pid"]
        words = ["keepalived", "--dont-fork", "--vrrp", "--log-console", "--log-detail", f"--use-file={file}", *pids]
        self._log = directory / "keepalived.log"
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen([*machine.command, *words], stdout=log, stderr=log)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(DEADLINE_SECONDS)


class Host:
    """A machine with a balancer and a keepalived."""

    def __init__(self, machine: Machine, directory: Path, texts: tuple[str, str]) -> None:
        self.machine = machine
        self.directory = directory / machine.name
        self.directory.mkdir()
        (self.directory / "token").write_text("secret of the pair\n")
        (self.directory / "token").chmod(0o600)
        self._toml, self._keepalived = texts

    def start(self) -> None:
        text = self._toml.replace("/etc/handoff/token", "token")
        self.balancer = Balancer(self.directory, text, "--stop-timeout", "7s")
        self.balancer.command = [*self.machine.command, sys.executable, "-m", "handoff"]
        self.balancer.start()
        self.keepalived = Keepalived(self.machine, self.directory, self._keepalived)

    @property
    def is_active(self) -> bool:
        return self.machine.has(VIRTUAL)

    def lose_power(self) -> None:
        self.machine.cut_power()
        self.balancer.__exit__()
        self.keepalived.end()

    def close(self) -> None:
        self.keepalived.end()
        self.balancer.__exit__()


class Asking:
    """One request after another from a machine, each answered with the name of a backend. For one thread that does
    nothing else: it stays there."""

    def __init__(self, machine: Machine, address: str, keeps: bool = False) -> None:
        self._machine, self._address, self._keeps = machine, address, keeps
        self._is_there = False
        self._connection: socket.socket | None = None

    def __call__(self) -> str:
        if not self._is_there:
            enter(self._machine.namespace)
            self._is_there = True
        if self._connection is None:
            self._connection = socket.create_connection((self._address, 80), timeout=PATIENCE_SECONDS)
        try:
            end = "" if self._keeps else "Connection: close\r\n"
            self._connection.sendall(f"GET / HTTP/1.1\r\nHost: test\r\n{end}\r\n".encode())
            _, _, body = read_response(self._connection)
        except BaseException:
            self.close()
            raise
        if not self._keeps:
            self.close()
        return body.decode().split()[0]

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Load:
    """Both kinds of clients, and what each move costs them."""

    def __init__(self, machine: Machine) -> None:
        self._asking = [Asking(machine, VIRTUAL, keeps) for keeps in (True,) * KEPT + (False,) * SHORT]
        self._clients = [Clients(one, 1) for one in self._asking]

    def __enter__(self) -> Load:
        for one in self._clients:
            one.__enter__()
        self._more()
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._clients:
            one.__exit__()
        for asking in self._asking:
            asking.close()

    def _more(self) -> None:
        for one in self._clients:
            one.more(2)

    def lost(self, move: Callable[[], None]) -> list[int]:
        """Requests of each client that failed while the address moved; those that keep their connection first."""
        before = [len(one.failures) for one in self._clients]
        move()
        self._more()
        return [len(one.failures) - count for one, count in zip(self._clients, before, strict=True)]


def first_answer(asking: Asking) -> Callable[[], str]:
    """Asks until somebody answers, from now on; the call waits for that."""
    found: list[str] = []

    def ask() -> bool:
        try:
            found.append(asking())
        except OSError:  # nobody listens yet
            return False
        return True

    thread = threading.Thread(target=wait_until, args=(ask, "somebody answers"))
    thread.start()

    def wait() -> str:
        thread.join()
        return found[0]

    return wait


def test_the_virtual_address_moves_and_each_connection_that_was_open_costs_one_request_at_most(tmp_path: Path) -> None:
    with Network(client=1, server=2, lb1=11, lb2=12) as network, tempfile.TemporaryDirectory() as directory:
        server, texts = network["server"], documented()
        pools = [
            server.within(lambda name=name, port=port: HttpBackend(tmp_path, name, port, server.address))  # type: ignore[misc]
            for name, port in (("blue", 8001), ("green", 8002))
        ]
        first = Host(network["lb1"], Path(directory), texts)
        one, other = network["lb1"].address, network["lb2"].address
        second = Host(
            network["lb2"], Path(directory), (of_the_other(texts[0], one, other), of_the_other(texts[1], one, other))
        )
        first.start()
        wait_until(lambda: first.is_active, "the first one has the address")
        second.start()
        with Load(network["client"]) as load:

            def power_fails() -> None:
                first.lose_power()
                wait_until(lambda: second.is_active, "the second one has the address")

            lost = load.lost(power_fails)
            # What was open died with it. Who connects meanwhile is late, and not refused.
            assert lost[:KEPT] == [1] * KEPT
            assert max(lost) == 1

            second.balancer.done("switch", "shop", "green")
            network["lb1"].boot()
            answer = first_answer(Asking(network["client"], network["lb1"].address))
            first.start()
            first.balancer.stderr.wait_for(r"^shop: revision 2 is taken from http://10\.0\.0\.12:8404: green 100 %$")
            assert answer() == "green", "it has the newest revision before it accepts"
            wait_until(lambda: "Entering BACKUP" in first.keepalived.log, "it is ready to take over")

            def stops() -> None:
                assert second.balancer.handoff("stop").returncode == 0
                wait_until(lambda: first.is_active, "the first one has the address again")

            lost = load.lost(stops)
            assert lost[:KEPT] == [1] * KEPT
            assert max(lost) == 1
        for host in (first, second):
            host.close()
        for made in pools:
            made.close()
