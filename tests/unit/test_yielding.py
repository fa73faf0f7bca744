"""Workers that boot for a reload are nicer, and nothing of that is left when they are ready."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from handoff.master import yielding
from handoff.master.yielding import STEPS, Yielding, may_take_back

OURS = os.getpriority(os.PRIO_PROCESS, 0)
PROGRAM = """
import os, subprocess, sys, threading
sys.stdin.readline()
os.nice(int(sys.argv[1]))
child = subprocess.Popen(["cat"])
threading.Thread(target=sys.stdin.read).start()
print(child.pid, flush=True)
sys.stdin.read()
child.kill()
child.wait()
"""


class Booting:
    """A process with a thread and a child; `own`: how much nicer it makes itself."""

    def __init__(self, own: int = 0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(own)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.pid = self._process.pid
        self._child = 0

    def go_on(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        self._child = int(self._process.stdout.readline())

    def niceness(self) -> set[int]:
        threads = [int(one) for one in os.listdir(f"/proc/{self.pid}/task")]
        assert len(threads) >= 2
        return {os.getpriority(os.PRIO_PROCESS, one) - OURS for one in (*threads, self._child)}

    def end(self) -> None:
        assert self._process.stdout is not None
        self._process.communicate()


@pytest.fixture
def booting() -> Iterator[Booting]:
    made = Booting()
    yield made
    made.end()


def test_a_process_is_nicer_until_it_is_ready_with_its_threads_and_children(booting: Booting) -> None:
    ours = Yielding()
    ours.begin(1, booting.pid, 100.0)
    booting.go_on()
    assert booting.niceness() == {min(STEPS, 14 - OURS) if may_take_back(OURS) else 0}
    ours.end(1)
    assert booting.niceness() == {0}
    ours.end(1)


def test_its_time_is_bounded(booting: Booting) -> None:
    ours = Yielding()
    ours.begin(1, booting.pid, 100.0)
    booting.go_on()
    ours.check(99.0)
    assert booting.niceness() == {min(STEPS, 14 - OURS) if may_take_back(OURS) else 0}
    assert ours.next_deadline() == (100.0 if may_take_back(OURS) else None)
    ours.check(100.0)
    assert booting.niceness() == {0}
    assert ours.next_deadline() is None


def test_what_an_application_wants_of_its_own_niceness_stays() -> None:
    booting = Booting(own=3)
    ours = Yielding()
    ours.begin(1, booting.pid, 100.0)
    booting.go_on()
    ours.end(1)
    assert booting.niceness() == {3}
    booting.end()


def test_nobody_is_made_nicer_who_would_stay_so(booting: Booting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yielding, "may_take_back", lambda niceness: False)
    ours = Yielding()
    ours.begin(1, booting.pid, 100.0)
    booting.go_on()
    assert booting.niceness() == {0}


def test_one_that_has_ended_is_no_matter() -> None:
    ours = Yielding()
    process = subprocess.Popen(["true"])
    process.wait()
    ours.begin(1, process.pid, 100.0)
    ours.end(1)
    ours.forget(1)


@pytest.mark.parametrize(
    ("limit", "capabilities", "niceness", "expected"),
    [(20, "0", 0, True), (0, "0", 0, False), (15, "0", 5, True), (0, "800000", 0, True), (0, "7fffff", 0, False)],
)
def test_what_allows_it(
    limit: int, capabilities: str, niceness: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    monkeypatch.setattr(Path, "read_text", lambda self: f"Name:\tx\nCapEff:\t{capabilities:0>16}\n")
    assert may_take_back(niceness) is expected
