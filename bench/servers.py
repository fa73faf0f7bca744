"""The servers of the bench: how each is started, reloaded, and stopped. Only processes started here are ended."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Self

import psutil

UP_SECONDS = 30.0
REPLACED_SECONDS = 8.0
"""How long the old workers of a peer may take to go; then the reload counts as over."""
_ROOT = Path(__file__).resolve().parent.parent


class Server:
    """One server with its own port and temporary directory. Use as a context manager."""

    name = ""
    package = ""

    def __init__(self, workers: int = 2, environment: Mapping[str, str] | None = None) -> None:
        self.workers = workers
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="handoff-bench-"))
        self._environment = {**os.environ, "PYTHONPATH": str(_ROOT), **(environment or {})}
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise AssertionError("each server says its own")

    def version(self) -> str:
        return f"{self.package} {metadata.version(self.package)}"

    @classmethod
    def is_installed(cls) -> bool:
        with contextlib.suppress(metadata.PackageNotFoundError):
            metadata.version(cls.package)
            return True
        return False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command(),
            cwd=_ROOT,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(self.directory / "log").open("ab"),
            process_group=0,
        )
        deadline = time.monotonic() + UP_SECONDS
        while not answers(self.port):
            if self.process.poll() is not None or time.monotonic() > deadline:
                text = (self.directory / "log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{self.name} does not come up:\n{text}")
            time.sleep(0.05)

    def reload(self) -> None:
        """Returns when the new workers serve and the old ones are gone, or REPLACED_SECONDS have passed."""
        old = self.children()
        assert self.process is not None
        self.process.send_signal(signal.SIGHUP)
        self.wait_until_gone(old)

    def wait_until_gone(self, old: list[psutil.Process]) -> None:
        psutil.wait_procs(old, timeout=REPLACED_SECONDS)

    def children(self) -> list[psutil.Process]:
        assert self.process is not None
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def stop(self) -> None:
        if self.process is None:
            return
        family = self.children()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        for one in family:
            with contextlib.suppress(psutil.Error):
                one.kill()
        psutil.wait_procs(family, timeout=10)
        self.process = None

    def cpu_seconds(self) -> float:
        """CPU of the master and its present workers so far."""
        assert self.process is not None
        total = 0.0
        for one in [psutil.Process(self.process.pid), *self.children()]:
            with contextlib.suppress(psutil.Error):
                times = one.cpu_times()
                total += times.user + times.system
        return total


class Handoff(Server):
    name, package = "handoff", "handoff"
    app = "bench.apps.hello:app"
    options: tuple[str, ...] = ()

    def command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "handoff", "run", self.app, "--name", "bench", "--run-dir", str(self.directory)),
            *("--bind", f"127.0.0.1:{self.port}", "--workers", str(self.workers), "--no-access-log", *self.options),
        ]

    def reload(self) -> None:
        old = self.children()
        self.ask("reload")
        self.wait_until_gone(old)

    def ask(self, *command: str) -> str:
        arguments = [sys.executable, "-m", "handoff", *command, "--name", "bench", "--run-dir", str(self.directory)]
        done = subprocess.run(arguments, cwd=_ROOT, env=self._environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"handoff {' '.join(command)}: exit {done.returncode}: {done.stderr}")
        return done.stdout


class HandoffWSGI(Handoff):
    name, app = "handoff wsgi", "bench.apps.hello:wsgi"
    options = ("--threads", "10")


class Uvicorn(Server):
    name = package = "uvicorn"

    def command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "uvicorn", "bench.apps.hello:app", "--port", str(self.port), "--no-access-log"),
            *("--workers", str(self.workers), "--http", "httptools", "--loop", "uvloop"),
        ]


class GunicornThreads(Server):
    name, package = "gunicorn gthread", "gunicorn"
    worker_class, app = "gthread", "bench.apps.hello:wsgi"

    def command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "gunicorn", self.app, "-b", f"127.0.0.1:{self.port}", "-w", str(self.workers)),
            *("-k", self.worker_class, "--threads", "10", "--log-level", "error"),
        ]


class GunicornASGI(GunicornThreads):
    name, worker_class, app = "gunicorn asgi", "asgi", "bench.apps.hello:app"


class Granian(Server):
    name = package = "granian"

    def command(self) -> list[str]:
        return [
            *(str(Path(sys.executable).with_name("granian")), "--interface", "asgi", "--no-ws"),
            *("--workers", str(self.workers), "--host", "127.0.0.1", "--port", str(self.port), "bench.apps.hello:app"),
        ]


class UWSGI(Server):
    name, package = "uWSGI", "uwsgi"

    def command(self) -> list[str]:
        return [
            *(str(Path(sys.executable).with_name("uwsgi")), "--http-socket", f"127.0.0.1:{self.port}", "--master"),
            *("--processes", str(self.workers), "--threads", "10", "--lazy-apps", "--disable-logging", "--need-app"),
            *("--module", "bench.apps.hello:wsgi", "--die-on-term"),
        ]


class Restart(Uvicorn):
    """The negative control: kill and start again. A load that finds no failure here proves nothing."""

    name = "kill and restart"

    def reload(self) -> None:
        self.stop()
        self.start()


SERVERS: tuple[type[Server], ...] = (
    Handoff,
    HandoffWSGI,
    GunicornThreads,
    GunicornASGI,
    Uvicorn,
    Granian,
    UWSGI,
    Restart,
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    """Whether a whole HTTP answer comes from that port."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
            return connection.recv(12).startswith(b"HTTP/1.1 200")
    except OSError:
        return False
