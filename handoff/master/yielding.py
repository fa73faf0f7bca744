"""Workers that boot for a reload leave the processor to those that serve: they are nicer until they are ready.

Only where this may be taken back: with CAP_SYS_NICE, or with an RLIMIT_NICE that allows it (LimitNICE=+0 of systemd).
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

STEPS = 12
"""Nice values: a fifteenth of the weight of those that serve, so that a boot on a machine without an idle processor is
slower, not starved."""
OWN_STEPS = 5
"""So many, at least, are left for what the application does to its own niceness."""
_NICEST = 19  # setpriority(2)
SHARE_OF_BOOT_TIMEOUT = 0.25
"""So much of its boot timeout, at most, a worker yields: then its boot is as urgent as the rest."""
_CAP_SYS_NICE = 23  # capability.h
_MAXIMUM_DEPTH = 8
"""Of processes that a worker has started while it booted."""


class Yielding:
    """Of one crew: who is nicer now, and until when."""

    def __init__(self) -> None:
        self._niceness = os.getpriority(os.PRIO_PROCESS, 0)
        self._steps = min(STEPS, _NICEST - self._niceness - OWN_STEPS)
        self._is_possible = self._steps > 0 and may_take_back(self._niceness)
        self._deadlines: dict[int, tuple[int, float]] = {}

    def begin(self, worker: int, pid: int, deadline: float) -> None:
        """From its first moment on: the process executes its interpreter just now."""
        if self._is_possible:
            with contextlib.suppress(OSError):  # it has ended
                os.setpriority(os.PRIO_PROCESS, pid, self._niceness + self._steps)
                self._deadlines[worker] = pid, deadline

    def end(self, worker: int) -> None:
        """It is ready, or its time is over: all its threads, and what it has started, are as others are."""
        pid, _ = self._deadlines.pop(worker, (0, 0.0))
        done: set[int] = set()
        while pid and (fresh := [thread for thread in _threads_below(pid) if thread not in done]):
            done.update(fresh)  # and once more: one that was still nice may have started another meanwhile
            for thread in fresh:
                self._take_back(thread)

    def _take_back(self, thread: int) -> None:
        """Our steps, not what the application has made of its own niceness."""
        with contextlib.suppress(OSError):  # it has ended
            present = os.getpriority(os.PRIO_PROCESS, thread)
            if present >= self._niceness + self._steps:
                os.setpriority(os.PRIO_PROCESS, thread, present - self._steps)

    def forget(self, worker: int) -> None:
        """It has ended; its pid may be another's soon."""
        self._deadlines.pop(worker, None)

    def next_deadline(self) -> float | None:
        return min((at for _, at in self._deadlines.values()), default=None)

    def check(self, now: float) -> None:
        for worker in [worker for worker, (_, at) in self._deadlines.items() if at <= now]:
            self.end(worker)


def may_take_back(niceness: int) -> bool:
    """Whether a process of ours that was made nicer may come back to this: setpriority(2), getrlimit(2)."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NICE)
    if limit == resource.RLIM_INFINITY or 20 - limit <= niceness:
        return True
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        effective = next(line for line in lines if line.startswith("CapEff:")).split()[1]
        return bool(int(effective, 16) >> _CAP_SYS_NICE & 1)
    return False


def _threads_below(pid: int, depth: int = 0) -> Iterator[int]:
    """Of a process and of those that it has started, deepest last. Linux has a niceness for each thread."""
    children: list[int] = []
    with contextlib.suppress(OSError):  # it ends just now
        for thread in map(int, os.listdir(f"/proc/{pid}/task")):
            yield thread
            with contextlib.suppress(OSError):  # a kernel without CONFIG_PROC_CHILDREN
                children += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    if depth < _MAXIMUM_DEPTH:
        for child in children:
            yield from _threads_below(child, depth + 1)
