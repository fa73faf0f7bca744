"""The servers of the bench: how each is started, reloaded, and stopped. Only processes started here are ended."""

from __future__ import annotations

import contextlib
import importlib.util
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
from typing import NamedTuple, Self

import psutil

UP_SECONDS = 30.0
LIVE_SECONDS = 30.0
"""How long the new workers may take to be there; then the reload counts as one that did not happen."""
GONE_SECONDS = 8.0
"""How long the old workers may take to go; then the reload counts as over."""
KEEP_ALIVE_SECONDS = 75
"""The same for all: with the servers' own (2 s, 5 s) an idle connection is lost to the clock and not to the reload."""
_POLL_SECONDS = 0.02
_ROOT = Path(__file__).resolve().parent.parent


class Replaced(NamedTuple):
    """What there was when a reload was over: workers of the new version, and workers of older ones."""

    new: int
    old: int
    note: str = ""


class Server:
    """One server with its own port and temporary directory. Use as a context manager."""

    name = ""
    package = ""
    has_keep_alive = True
    up_seconds = UP_SECONDS

    def __init__(self, workers: int = 2, environment: Mapping[str, str] | None = None) -> None:
        self.workers = workers
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="handoff-bench-"))
        self.deployed = 0
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(_ROOT),
            "BENCH_DIR": str(self.directory),
            "XDG_RUNTIME_DIR": str(
                self.directory
            ),  # gunicorn puts a control socket there, else into the home directory
            **(environment or {}),
        }
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise AssertionError("each server says its own")

    @classmethod
    def version(cls) -> str:
        return f"{cls.package} {metadata.version(cls.package)}"

    @classmethod
    def is_installed(cls) -> bool:
        with contextlib.suppress(metadata.PackageNotFoundError):
            metadata.version(cls.package)
            return True
        return False

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def start(self) -> None:
        """Returns when all workers have loaded the application and one answers."""
        (self.directory / "version").write_text(str(self.deployed))
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                cwd=_ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                process_group=0,
            )
        deadline = time.monotonic() + self.up_seconds
        while self.count_workers().new < self.workers or not answers(self.port):
            if self.process.poll() is not None or time.monotonic() > deadline:
                text = (self.directory / "log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{self.name} does not come up:\n{text}")
            time.sleep(_POLL_SECONDS)

    def deploy(self) -> Replaced:
        """Puts the next version there and reloads. Returns when only that one runs, or after the limits above."""
        self.deployed += 1
        (self.directory / "version").write_text(str(self.deployed))
        note = self.reload()
        began = time.monotonic()
        while True:
            found = self.count_workers()._replace(note=note)
            waited = time.monotonic() - began
            is_live = found.new >= self.workers
            if note or (is_live and (not found.old or waited > GONE_SECONDS)) or waited > LIVE_SECONDS:
                return found
            time.sleep(_POLL_SECONDS)

    def reload(self) -> str:
        """Asks for it, and does not wait. Returns why it was refused, if the server says so."""
        assert self.process is not None
        self.process.send_signal(signal.SIGHUP)
        return ""

    def count_workers(self) -> Replaced:
        """By what they wrote when they had loaded the application (see bench/apps/deployed.py)."""
        try:
            lines = (self.directory / "boots").read_text().splitlines()
        except FileNotFoundError:
            return Replaced(0, 0)
        versions = {int(pid): int(version) for pid, version in (line.split() for line in lines)}
        alive = [version for pid, version in versions.items() if _is_alive(pid)]
        new = alive.count(self.deployed)
        return Replaced(new, len(alive) - new)

    def children(self) -> list[psutil.Process]:
        assert self.process is not None
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def stop(self) -> None:
        """Ends all that was started here: whoever has this server's own directory in its environment."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        family = self._family()
        while family:
            for one in family:
                with contextlib.suppress(psutil.Error):
                    one.kill()
            psutil.wait_procs(family, timeout=10)
            family = self._family()  # one may have forked before it was ended
        self.process = None

    def _family(self) -> list[psutil.Process]:
        found = []
        for one in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if one.status() != psutil.STATUS_ZOMBIE and one.environ().get("BENCH_DIR") == str(self.directory):
                    found.append(one)
        return found

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

    @classmethod
    def is_installed(cls) -> bool:
        return importlib.util.find_spec("handoff") is not None  # a checkout on the path will do

    @classmethod
    def version(cls) -> str:
        own = "of the checkout"
        with contextlib.suppress(metadata.PackageNotFoundError):
            own = metadata.version(cls.package)
        return f"handoff {own} (uvicorn {metadata.version('uvicorn')})"

    def command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "handoff", "run", self.app, "--name", "bench", "--run-dir", str(self.directory)),
            *("--bind", f"127.0.0.1:{self.port}", "--workers", str(self.workers), "--no-access-log"),
            *("--keep-alive", f"{KEEP_ALIVE_SECONDS}s", *self.options),
        ]

    def reload(self) -> str:
        """Waits for the verdict."""
        try:
            self.ask("reload")
        except RuntimeError as error:
            return str(error)
        return ""

    def ask(self, *command: str) -> str:
        arguments = [sys.executable, "-m", "handoff", *command, "--name", "bench", "--run-dir", str(self.directory)]
        done = subprocess.run(arguments, cwd=_ROOT, env=self._environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"handoff {' '.join(command)}: exit {done.returncode}: {done.stderr.strip()}")
        return done.stdout


class HandoffWSGI(Handoff):
    name, app = "handoff wsgi", "bench.apps.hello:wsgi"
    options = ("--threads", "10")


class Uvicorn(Server):
    """With a patient health check: at its default of 5 s a busy machine makes it give a reload up, in silence."""

    name = package = "uvicorn"

    def command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "uvicorn", "bench.apps.hello:app", "--port", str(self.port), "--no-access-log"),
            *("--workers", str(self.workers), "--http", "httptools", "--loop", "uvloop"),
            *("--timeout-keep-alive", str(KEEP_ALIVE_SECONDS), "--timeout-worker-healthcheck", "30"),
        ]


class GunicornThreads(Server):
    name, package = "gunicorn gthread", "gunicorn"
    worker_class, app = "gthread", "bench.apps.hello:wsgi"

    def command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "gunicorn", self.app, "-b", f"127.0.0.1:{self.port}", "-w", str(self.workers)),
            *("-k", self.worker_class, "--threads", "10", "--log-level", "error"),
            *("--keep-alive", str(KEEP_ALIVE_SECONDS)),
        ]


class GunicornASGI(GunicornThreads):
    name, worker_class, app = "gunicorn asgi", "asgi", "bench.apps.hello:app"


class Granian(Server):
    name = package = "granian"

    def command(self) -> list[str]:
        return [
            *(str(Path(sys.executable).with_name("granian")), "--interface", "asgi", "--no-ws"),
            *("--workers", str(self.workers), "--host", "127.0.0.1", "--port", str(self.port)),
            *("--http1-header-read-timeout", "60000", "bench.apps.hello:app"),
        ]


class UWSGI(Server):
    """Its own socket, no router: the quicker way, which closes after each answer without saying so."""

    name, package = "uWSGI", "uwsgi"
    has_keep_alive = False

    def command(self) -> list[str]:
        return [
            *(str(Path(sys.executable).with_name("uwsgi")), *self.frontend(), "--master", "--die-on-term"),
            *("--processes", str(self.workers), "--threads", "10", "--lazy-apps", "--disable-logging", "--need-app"),
            *("--module", "bench.apps.hello:wsgi"),
        ]

    def frontend(self) -> tuple[str, ...]:
        return ("--http-socket", f"127.0.0.1:{self.port}")


class UWSGIRouter(UWSGI):
    """Behind its router, and reloaded worker by worker."""

    name, has_keep_alive = "uWSGI router, chain reload", True

    def frontend(self) -> tuple[str, ...]:
        return (
            *("--http", f"127.0.0.1:{self.port}", f"--http-keepalive={KEEP_ALIVE_SECONDS}"),
            *("--master-fifo", str(self.directory / "fifo")),
        )

    def reload(self) -> str:
        fifo = os.open(self.directory / "fifo", os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(fifo, b"c")
        finally:
            os.close(fifo)
        return ""


class Restart(Uvicorn):
    """The negative control: kill and start again. A load that finds no failure here proves nothing."""

    name = "kill and restart"

    def reload(self) -> str:
        self.stop()
        self.start()
        return ""


SERVERS: tuple[type[Server], ...] = (
    Handoff,
    HandoffWSGI,
    GunicornThreads,
    GunicornASGI,
    Uvicorn,
    Granian,
    UWSGI,
    UWSGIRouter,
    Restart,
)


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def end_on_term() -> None:
    """TERM, like Ctrl-C, leaves through the context managers, so that nothing stays behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


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
