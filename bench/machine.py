"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform

import psutil


def describe() -> str:
    memory = psutil.virtual_memory().total / 2**30
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    return (
        f"{platform.system()} {platform.release()}, {os.cpu_count()} cores ({_model()}), {memory:.0f} GiB, "
        f"{platform.python_implementation()} {platform.python_version()}, load average before: {load}"
    )


def _model() -> str:
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
