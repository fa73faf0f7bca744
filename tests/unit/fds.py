"""What is open in this process. Others may close theirs meanwhile: what an earlier test left to the collector."""

from __future__ import annotations

import contextlib
import os
from collections import Counter


def open_fds() -> Counter[str]:
    """How often what is open; `not open_fds() - before`: nothing more than then."""
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found[os.readlink(f"/proc/self/fd/{name}")] += 1
    return found
