"""Our own tests' machines: nothing of them is left, whatever happens."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import psutil
import pytest

from tests.system.harness import wait_until
from tests.system.namespaces import Machine, Network


def own_namespace() -> str:
    return os.readlink("/proc/thread-self/ns/net")


class Started:
    """What a test that fails leaves behind."""

    def __init__(self) -> None:
        self.machines: list[Machine] = []
        self.processes: list[psutil.Process] = []

    def run(self) -> None:
        with Network() as network:
            self.machines.append(network.machine("web1", 11))
            words = [*self.machines[0].command, "sh", "-c", "sleep 1000 & exec sleep 1000"]
            self.first = subprocess.Popen(words)
            self.processes = wait_until(self._two, "both run")
            raise ZeroDivisionError

    def _two(self) -> list[psutil.Process]:
        found = self.machines[0].processes()
        return found if [one.name() for one in found] == ["sleep", "sleep"] else []


def test_of_a_test_that_fails_no_process_and_no_namespace_is_left() -> None:
    before = own_namespace()
    started = Started()
    with pytest.raises(ZeroDivisionError):
        started.run()
    assert started.first.wait(60) < 0
    assert own_namespace() == before
    said = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True, timeout=60).stdout
    assert started.machines[0].namespace not in said
    assert not [one for one in started.processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def test_machines_reach_each_other_until_they_are_cut_off() -> None:
    with Network() as network:
        one, other = network.machine("one", 11), network.machine("other", 12)
        listening = f"import socket; s = socket.create_server(('{one.address}', 80)); print(1, flush=True); s.accept()"
        connecting = f"import socket; socket.create_connection(('{one.address}', 80), 60)"
        with subprocess.Popen([*one.command, sys.executable, "-c", listening], stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            server.stdout.readline()
            subprocess.run([*other.command, sys.executable, "-c", connecting], check=True, timeout=60)
            one.cut()
            with pytest.raises(OSError, match="No route to host"):
                socket.create_connection((one.address, 80), 60)
