"""The server behind the balancers, and the loads that wrk has not: `bench/peer.c`, compiled when it is needed."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

SOURCE = Path(__file__).with_name("peer.c")
SPARE_SECONDS = 10.0
"""How much longer than its own limit a load may run before it is ended from here."""


class Peer:
    """The compiled program. Its server runs as long as the context manager `serving`."""

    def __init__(self, directory: Path) -> None:
        """Compiles it into the directory. Raises RuntimeError where that fails."""
        self._program = directory / "peer"
        command = ["cc", "-O2", "-Wall", "-Werror", "-o", str(self._program), str(SOURCE)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        except FileNotFoundError:
            raise RuntimeError("the bench of the balancers needs a C compiler: cc is not installed") from None
        if done.returncode:
            raise RuntimeError(f"{SOURCE.name} cannot be compiled:\n{done.stderr}")

    @contextlib.contextmanager
    def serving(self) -> Iterator[int]:
        """Gives the port of a server on loopback."""
        with self._running("serve", "0") as said:
            yield int(said["port"])

    @contextlib.contextmanager
    def holding(self, port: int, count: int, seconds: float) -> Iterator[None]:
        """So many connections that have been used once and then say nothing, for at most so long."""
        with self._running("hold", str(port), str(count), str(seconds)) as said:
            if said != {"held": count}:
                raise RuntimeError(f"hold: {said}")
            yield

    def latency(self, port: int, rate: int, seconds: float, connections: int) -> dict[str, Any]:
        return self._run("latency", port, rate, seconds, connections, limit=seconds)

    def burst(self, port: int, count: int, seconds: float = 30.0) -> dict[str, Any]:
        return self._run("burst", port, count, seconds, limit=seconds)

    def bulk(
        self, port: int, direction: Literal["down", "up"], streams: int, size_bytes: int, seconds: float = 60.0
    ) -> dict[str, Any]:
        return self._run("bulk", port, direction, streams, size_bytes, seconds, limit=seconds)

    def _run(self, load: str, *arguments: object, limit: float) -> dict[str, Any]:
        command = [str(self._program), load, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit + 2 * SPARE_SECONDS)
        if done.returncode:
            raise RuntimeError(f"{load}: {done.stderr.strip()}")
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    @contextlib.contextmanager
    def _running(self, *arguments: str) -> Iterator[dict[str, Any]]:
        """The first line that it says. It ends when its standard input is closed."""
        with subprocess.Popen(
            [str(self._program), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                seconds = float(arguments[-1]) if arguments[0] == "hold" else SPARE_SECONDS
                is_there = select.select([process.stdout], [], [], seconds)[0]
                line = process.stdout.readline() if is_there else b""
                if not line:
                    raise RuntimeError(f"{arguments[0]}: said nothing")
                yield json.loads(line)
            finally:
                process.stdin.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(SPARE_SECONDS)
                process.kill()
