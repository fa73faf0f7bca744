"""Machines of a test: network namespaces on one bridge, each with an address. They can lose their power. Needs root."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from bench.slow_link import enter

T = TypeVar("T")
NETWORK = "10.0.0"


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30).stdout


class Machine:
    """One of a network."""

    def __init__(self, network: Network, name: str, number: int) -> None:
        self.name, self.address = name, f"{NETWORK}.{number}"
        self.namespace = f"handoff-net-{os.getpid()}-{name}"
        self.command = ["ip", "netns", "exec", self.namespace]
        """What runs a command there."""
        self._network, self._port = network, f"to-{name}"

    def boot(self) -> None:
        ip("netns", "add", self.namespace)
        inside = ("-n", self.namespace)
        ip(*inside, "link", "set", "lo", "up")
        ip(*inside, "link", "add", "eth0", "type", "veth", "peer", "name", self._port, "netns", self._network.switch)
        ip(*inside, "addr", "add", f"{self.address}/24", "dev", "eth0")
        ip(*inside, "link", "set", "eth0", "up")
        ip("-n", self._network.switch, "link", "set", self._port, "master", "bridge", "up")

    def cut_power(self) -> None:
        """Nothing more comes from there, and kill -9 of all that ran."""
        with contextlib.suppress(subprocess.CalledProcessError):  # it had none
            ip("-n", self._network.switch, "link", "del", self._port)
        while pids := self._pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        ip("netns", "del", self.namespace)

    def has(self, address: str) -> bool:
        return f"inet {address}/" in ip("-n", self.namespace, "-4", "addr", "show", "dev", "eth0")

    def within(self, call: Callable[[], T]) -> T:
        """Called in a thread that is there: sockets that it makes, and processes that it starts, are there."""
        found: list[T] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                enter(self.namespace)
                found.append(call())
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]
        return found[0]

    def _pids(self) -> list[int]:
        """Those that still run; zombies are somebody's to reap."""
        found = []
        for pid in map(int, ip("netns", "pids", self.namespace).split()):
            with contextlib.suppress(OSError):
                if b") Z " not in Path(f"/proc/{pid}/stat").read_bytes():
                    found.append(pid)
        return found


class Network:
    """A context manager. Owns its machines, and what runs on them."""

    def __init__(self, **machines: int) -> None:
        """Their names, and the last numbers of their addresses."""
        self.switch = f"handoff-net-{os.getpid()}-switch"
        self._machines = {name: Machine(self, name, number) for name, number in machines.items()}
        self._undo = contextlib.ExitStack()

    def __getitem__(self, name: str) -> Machine:
        return self._machines[name]

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            ip("netns", "add", self.switch)
            undo.callback(ip, "netns", "del", self.switch)
            ip("-n", self.switch, "link", "add", "bridge", "up", "type", "bridge")
            for machine in self._machines.values():
                machine.boot()
                undo.callback(machine.cut_power)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._undo.close()
