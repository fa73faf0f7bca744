"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
import statistics
import time

import psutil

_NAPS = 100
_NAP_SECONDS = 0.01


def describe() -> str:
    memory = psutil.virtual_memory().total / 2**30
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    return (
        f"{platform.system()} {platform.release()}, {os.cpu_count()} cores ({_model()}), {memory:.0f} GiB, "
        f"{platform.python_implementation()} {platform.python_version()}, load average before: {load}, "
        f"{_lateness()}"
    )


def _lateness() -> str:
    """How late a sleeper wakes here: what the machine itself adds to every time and gap."""
    late = []
    for _ in range(_NAPS):
        began = time.monotonic()
        time.sleep(_NAP_SECONDS)
        late.append((time.monotonic() - began - _NAP_SECONDS) * 1000)
    nap = _NAP_SECONDS * 1000
    return f"a sleep of {nap:.0f} ms is late by {statistics.median(late):.1f} ms, at most {max(late):.0f} ms"


def _model() -> str:
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
