"""Machines of a test: network namespaces, each with an address of its own, on one bridge. Nothing of it is seen
outside, and nothing of it is left at the end.

The calling thread is in a namespace, too, at the bridge: what it starts, threads and processes, is there as well.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
from types import TracebackType
from typing import Self

import psutil
import pytest

from bench.slow_link import CLONE_NEWNET, enter, libc
from tests.system.harness import wait_until

NETWORK = "10.78.0"
_OWN_NUMBER = 1
_counter = itertools.count(1)


def need_root() -> None:
    """Who is not root cannot make namespaces; CI is."""
    if os.geteuid() == 0:
        return
    if os.environ.get("CI"):
        pytest.fail("network namespaces need root, and CI is root")
    pytest.skip("network namespaces need root: run these tests as root")


class Machine:
    """A namespace with an address. What runs in it at the end is killed."""

    def __init__(self, name: str, namespace: str, address: str, desk: str) -> None:
        self.name, self.namespace, self.address, self._desk = name, namespace, address, desk

    @property
    def command(self) -> list[str]:
        """The words before a command that is to run there. The process is the command's own then."""
        return ["ip", "netns", "exec", self.namespace]

    def cut(self) -> None:
        """Nothing goes there or comes from there any more, without a word."""
        _ip("-n", self.namespace, "link", "set", "eth0", "down")
        _ip("-n", self._desk, "neigh", "flush", "dev", "br0")  # else it is asked for at its old place for a while

    def mend(self) -> None:
        _ip("-n", self.namespace, "link", "set", "eth0", "up")

    def processes(self) -> list[psutil.Process]:
        return _processes(self.namespace)


class Network:
    """A context manager. The calling thread must be the one that leaves it."""

    def __init__(self) -> None:
        self._prefix = f"handoff-{os.getpid()}-{next(_counter)}"
        self._own = f"{self._prefix}-desk"
        self._made: list[str] = []
        self._used: list[str] = []
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        need_root()
        with contextlib.ExitStack() as undo:
            undo.callback(self._remove)
            self._add(self._own)
            _ip("-n", self._own, "link", "add", "br0", "type", "bridge", "forward_delay", "0")
            _ip("-n", self._own, "addr", "add", f"{NETWORK}.{_OWN_NUMBER}/24", "dev", "br0")
            _ip("-n", self._own, "link", "set", "br0", "up")
            undo.callback(_return_to, os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
            enter(self._own)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def machine(self, name: str, number: int, namespace: str | None = None) -> Machine:
        """`number`: the last of its address. `namespace`: one that is there already, and goes without us."""
        if namespace is None:
            namespace = f"{self._prefix}-{name}"
            self._add(namespace)
        self._used.append(namespace)
        port, inside = f"p{number}", ("-n", namespace)
        _ip("-n", self._own, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("-n", self._own, "link", "set", port, "master", "br0", "up")
        _ip(*inside, "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
        _ip(*inside, "link", "set", "eth0", "up")
        return Machine(name, namespace, f"{NETWORK}.{number}", self._own)

    def _add(self, namespace: str) -> None:
        _ip("netns", "add", namespace)
        self._made.append(namespace)
        _ip("-n", namespace, "link", "set", "lo", "up")

    def _remove(self) -> None:
        try:
            for name in (*self._used, self._own):
                kill_all(name)
        finally:
            for name in reversed(self._made):
                _ip("netns", "del", name)


def kill_all(namespace: str) -> None:
    """Whatever runs there, until nothing does."""

    def are_gone() -> bool:
        found = _processes(namespace)
        for one in found:
            with contextlib.suppress(psutil.Error):
                one.kill()
        return not found

    wait_until(are_gone, f"nothing runs in {namespace}")


def _processes(namespace: str) -> list[psutil.Process]:
    said = subprocess.run(["ip", "netns", "pids", namespace], check=True, capture_output=True, text=True, timeout=30)
    found = []
    for pid in said.stdout.split():
        with contextlib.suppress(psutil.NoSuchProcess):
            if int(pid) != os.getpid() and (one := psutil.Process(int(pid))).status() != psutil.STATUS_ZOMBIE:
                found.append(one)
    return found


def _return_to(fd: int) -> None:
    """Takes ownership."""
    try:
        assert libc.setns(fd, CLONE_NEWNET) == 0
    finally:
        os.close(fd)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], check=False, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, (arguments, done.stderr)
