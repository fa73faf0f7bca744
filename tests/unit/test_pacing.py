"""A start beside others that serve pauses where they want its processor, and only there."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from handoff.pacing import BURST_SECONDS, BUSY_BURSTS, PAUSE_SECONDS, WAITED_SECONDS, Pacer


class Machine:
    """Its clocks, and what was slept."""

    def __init__(self) -> None:
        self.cpu = self.wall = 10.0
        self.pauses: list[float] = []
        self.pacer = Pacer(self.wall + 5, lambda: self.cpu, lambda: self.wall, self.sleep)

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.wall += seconds

    def run(self, seconds: float = BURST_SECONDS * 1.5, waited: float = 0.0) -> int:
        """Burn so much, wait so long for a processor, and import something; how many pauses it made."""
        before = len(self.pauses)
        self.cpu += seconds
        self.wall += seconds + waited
        self.pacer.find_spec("something")
        return len(self.pauses) - before


@pytest.fixture
def machine() -> Machine:
    made = Machine()
    assert made.run() == 1, "the interpreter's own start was a burst"
    assert made.pauses == [PAUSE_SECONDS]
    return made


def test_alone_it_does_not_pause(machine: Machine) -> None:
    assert [machine.run() for _ in range(100)] == [0] * 100


def test_a_short_import_is_no_burst(machine: Machine) -> None:
    machine.run(waited=WAITED_SECONDS * 2)
    assert [machine.run(BURST_SECONDS * 0.4) for _ in range(5)] == [0, 0, 1, 0, 0]


def test_who_had_to_wait_pauses_for_a_while(machine: Machine) -> None:
    assert machine.run(waited=WAITED_SECONDS * 2) == 1
    assert [machine.run() for _ in range(BUSY_BURSTS)] == [1] * (BUSY_BURSTS - 1) + [0]


def test_to_be_woken_late_is_to_wait(machine: Machine) -> None:
    machine.run(waited=WAITED_SECONDS * 2)
    later = [machine.run(waited=WAITED_SECONDS * 2 if number == 20 else 0) for number in range(20 + BUSY_BURSTS)]
    assert later == [1] * (20 + BUSY_BURSTS)


def test_it_ends_at_its_time(machine: Machine) -> None:
    machine.wall += 6
    assert [machine.run(waited=1) for _ in range(3)] == [0, 0, 0]


def test_imports_of_other_threads_do_not_pause(machine: Machine) -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(machine.run(waited=1)))
    thread.start()
    thread.join()
    assert found == [0]


def test_imports_go_on_as_without_it_and_nothing_is_left() -> None:
    program = """
import sys
before = list(sys.meta_path)
from handoff.pacing import begin_pacing, end_pacing
begin_pacing(60)
assert len(sys.meta_path) == len(before) + 1
import json.tool, importlib
importlib.invalidate_caches()
try:
    import no_such_module
except ModuleNotFoundError as error:
    assert error.name == "no_such_module"
end_pacing()
assert sys.meta_path == before
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_nothing_heavy_comes_before_the_first_pause() -> None:
    program = "import sys, handoff.pacing; print(*sys.modules, sep=',')"
    environment = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-S", "-c", program]  # -S: what an installation loads by itself is not ours
    loaded = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert not {"typing", "threading", "collections"} & set(loaded.split(","))
