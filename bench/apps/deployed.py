"""Which version this process serves. Each worker says in BENCH_DIR/boots that it has loaded it: pid and version.

So the bench knows, without a request, when all workers are new and whether a reload happened at all.
"""

from __future__ import annotations

import os
from pathlib import Path


def version() -> int:
    directory = os.environ.get("BENCH_DIR")
    return int((Path(directory) / "version").read_text()) if directory else 0


def announce(loaded: int) -> None:
    directory = os.environ.get("BENCH_DIR")
    if directory:
        with (Path(directory) / "boots").open("a") as file:
            file.write(f"{os.getpid()} {loaded}\n")  # one short write with O_APPEND: lines of two workers never mix
