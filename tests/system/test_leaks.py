"""What was opened is closed again, and what is ours stays ours."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from tests.system.apps import hello, workbench
from tests.system.harness import Service, wait_until

TIMES = 20
"""Reloads under which commands and companions crash as well."""


def open_files(pid: int) -> list[str]:
    """What each fd of the process leads to; sockets and pipes without their inodes."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(re.sub(r"\[\d+\]", "", os.readlink(f"/proc/{pid}/fd/{fd}")))
        except FileNotFoundError:
            continue  # closed meanwhile
    return sorted(found)


class Baseline:
    """The master's fds and processes as they were."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._files = open_files(service.pid)
        self._processes = len(service.family())

    def assert_reached(self) -> None:
        wait_until(lambda: len(self._service.family()) == self._processes, "the number of processes is as before")
        wait_until(
            lambda: open_files(self._service.pid) == self._files,
            f"the master's files are as before: {self._files}, now {open_files(self._service.pid)}",
        )


@pytest.mark.timeout(300)
def test_fds_and_processes_are_as_before_after_fifty_reloads(directory: Path) -> None:
    with Service(directory, probation="0s") as service:
        open_fds = service.status()["open_fds"]
        baseline = Baseline(service)
        for number in range(2, 52):
            answer = service.ask({"type": "reload"})
            assert (answer["exit_code"], answer["generation"]) == (0, number)
        service.wait_for_generations(51)
        baseline.assert_reached()
        assert service.status()["open_fds"] == open_fds


def test_fds_and_processes_are_as_before_after_reloads_that_were_rolled_back(directory: Path) -> None:
    with Service(directory, "-w", "2") as service:
        baseline = Baseline(service)
        config = directory / "handoff.toml"
        for number in range(10):
            (directory / "main.py").write_text("1 / 0\n" if number % 2 else hello("2"))
            config.write_text("" if number % 2 else "worker = 2\n")
            assert service.ask({"type": "reload"})["exit_code"] == 3
        baseline.assert_reached()


def test_fds_and_processes_are_as_before_after_crashes(directory: Path) -> None:
    with Service(directory, "-w", "10") as service:
        baseline = Baseline(service)
        pids = {worker["pid"] for worker in service.workers()}
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

        def replaced() -> bool:
            workers = service.workers()
            return [one["state"] for one in workers] == ["accepting"] * 10 and not {
                one["pid"] for one in workers
            } & pids

        wait_until(replaced, "all ten are replaced")
        baseline.assert_reached()


STORES = """
import array, os, signal, socket
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
    notify.connect("\\0" + os.environ["NOTIFY_SOCKET"][1:])
    kept = array.array("i", [os.memfd_create("kept")])
    notify.sendmsg([b"FDSTOREREMOVE=1\\nFDNAME=kept"])
    notify.sendmsg([b"FDSTORE=1\\nFDNAME=kept"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, kept)])
    notify.send(b"READY=1")
signal.pause()
"""


@pytest.mark.timeout(300)
def test_fds_and_processes_are_as_before_after_reloads_and_crashes_of_commands_and_companions(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(STORES)
    command = f'command = "{sys.executable} main.py"\n'
    (tmp_path / "handoff.toml").write_text(
        f'{command}workers = 2\n[companion.a]\n{command}bind = "127.0.0.1:0"\n[companion.b]\n{command}'
    )

    def runs(generation: int) -> bool:
        status = service.status()
        states = [(one["state"], one["generation"]) for one in status["companions"]]
        live = [one["state"] for one in service.workers(generation)]
        return states == [("accepting", generation)] * 2 and live == ["accepting"] * 2

    with Service(tmp_path, app=None, probation="0s") as service:
        wait_until(lambda: runs(1), "all run")
        baseline = Baseline(service)
        for number in range(2, TIMES + 2):
            assert service.ask({"type": "reload"})["exit_code"] == 0
            if number % 2:
                wait_until(lambda expected=number: runs(expected), "all run")
                for one in (service.workers(number)[0], service.status()["companions"][0]):
                    os.kill(one["pid"], signal.SIGKILL)
        wait_until(lambda: runs(TIMES + 1), "all run")
        service.wait_for_generations(TIMES + 1)
        baseline.assert_reached()
        assert sum("memfd:kept" in name for name in open_files(service.pid)) == 4


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_worker_holds_only_what_is_its_own(directory: Path, loop: str) -> None:
    with Service(directory, "-w", "3", "--loop", loop, "--bind", "unix:extra.sock") as service:
        # Each has its channel, its own mailbox, and those of its two siblings.
        wanted = {"listener": 2, "seqpacket": 4}
        for worker in service.workers():
            wait_until(lambda pid=worker["pid"]: socket_kinds(pid) == wanted, "it was told of its siblings")
            others = [name for name in open_files(worker["pid"]) if not name.startswith("socket:")]
            expected = r"/dev/null|pipe:|anon_inode:.*|/memfd:handoff-(post-mortem|counters) \(deleted\)"
            assert [name for name in others if not re.fullmatch(expected, name)] == []
            for own in ("post-mortem", "counters"):
                assert sum(own in name for name in others) == 1


def socket_kinds(pid: int) -> dict[str, int]:
    """How many sockets of the process are listeners, channel or mailboxes, and, under other names, anything else."""
    inodes = {
        match.group(1)
        for fd in os.listdir(f"/proc/{pid}/fd")
        if (match := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{fd}")))
    }
    kinds: dict[str, int] = {}
    for inode in inodes:
        kind = _kind(inode)
        if kind != "own pair":  # the event loop's own wake-up
            kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


def _kind(inode: str) -> str:
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[9] == inode:
            return "listener" if fields[3] == "0A" else f"tcp in state {fields[3]}"
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[6] == inode:
            if fields[4] == "0005":
                return "seqpacket"
            if fields[3] == "00010000":
                # Bound under a temporary name beside its path, then renamed: the kernel goes on showing the first.
                return "listener" if "/.extra.sock." in fields[-1] else f"unix listener {fields[-1]}"
            return "own pair"
    return "unknown"


def test_a_grandchild_inherits_nothing_of_ours(directory: Path) -> None:
    (directory / "main.py").write_text(workbench("1"))
    with Service(directory, "-w", "2", "--bind", "unix:extra.sock") as service:
        child = json.loads(service.get("/grandchild")[2])
        standard = {"0", "1", "2"}
        leaked = {fd: what for fd, what in child["fds"].items() if fd not in standard}
        assert leaked == {}
        ours = [key for key in child["environment"] if key.startswith(("HANDOFF_", "LISTEN_", "NOTIFY_"))]
        known = ("NAME", "GENERATION", "LABEL", "SLOT", "RUNTIME_DIRECTORY")
        assert set(ours) <= {f"HANDOFF_{word}" for word in known}
