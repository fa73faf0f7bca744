"""How long the machine itself stood still: on a shared machine a gap in answers may not be the server's.

One meter for each processor, above all other processes (SCHED_FIFO, which needs root), wakes every millisecond; when
it wakes late, that processor was not ours (the hypervisor gave it to somebody else). Where the kernel throttles
real-time processes, as its log says, the meter itself is late and flatters. `python -m bench.stalls PROCESSOR` prints
the intervals as JSON when its standard input is closed.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Self

from bench.statistics_of import Window

PERIOD_SECONDS = 0.001
LEAST_SECONDS = 0.005
"""A shorter delay is the kernel's own business."""


class StallMeter:
    """Measures from its making to `stop`, which returns the merged intervals; none where priority is refused."""

    def __init__(self) -> None:
        self._meters = [
            subprocess.Popen(
                [sys.executable, "-m", "bench.stalls", str(processor)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for processor in sorted(os.sched_getaffinity(0))
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for meter in self._meters:
            meter.kill()
            meter.wait()

    def stop(self) -> list[Window]:
        found: list[Window] = []
        for meter in self._meters:
            written, _ = meter.communicate("", timeout=30)
            found += [Window(start, end) for start, end in json.loads(written)]
        return merge(found)


def merge(windows: Iterable[Window]) -> list[Window]:
    merged: list[Window] = []
    for window in sorted(windows):
        if merged and window.start <= merged[-1].end:
            merged[-1] = Window(merged[-1].start, max(merged[-1].end, window.end))
        else:
            merged.append(window)
    return merged


def _measure(processor: int) -> list[tuple[float, float]]:
    os.sched_setaffinity(0, {processor})
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
    except PermissionError:
        return []
    found = []
    before = time.monotonic()
    while not select.select([sys.stdin], [], [], PERIOD_SECONDS)[0]:
        now = time.monotonic()
        if now - before > LEAST_SECONDS:
            found.append((before, now))
        before = now
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measure(int(sys.argv[1]))) + "\n")
