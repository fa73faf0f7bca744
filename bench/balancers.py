"""The balancers of the bench: one process or thread each that relays, all to the same server, at their defaults."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

from bench.servers import Handoff, Replaced, Server

MAXIMUM_CONNECTIONS = 6_000
BACKLOG = 4096
"""The same for all: nginx's own, 511, makes a burst wait for the kernel's second try."""
_NGINX_STREAM = Path("/usr/lib/nginx/modules/ngx_stream_module.so")


class Balancer(Server):
    """One balancer before the server on `backend`, a port of loopback."""

    program = ""

    def __init__(self, backend: int) -> None:
        super().__init__(workers=1)
        self.backend = backend

    @classmethod
    def is_installed(cls) -> bool:
        return shutil.which(cls.program) is not None

    def count_workers(self) -> Replaced:
        return Replaced(1, 0)  # that one answers is enough

    def stop(self) -> None:
        children = [] if self.process is None else self.children()  # nginx's have no environment to know them by
        super().stop()
        for one in children:
            with contextlib.suppress(psutil.Error):
                one.kill()
        psutil.wait_procs(children, timeout=10)

    def cpu_seconds(self) -> float:
        """Of all its processes, to the nanosecond where the kernel tells it, else in ticks."""
        assert self.process is not None
        pids = [self.process.pid, *(one.pid for one in self.children())]
        try:
            return sum(
                int(task.read_text().split()[0]) / 1e9
                for pid in pids
                for task in Path(f"/proc/{pid}/task").glob("*/schedstat")
            )
        except (OSError, IndexError):
            return super().cpu_seconds()

    def pss_bytes(self) -> int:
        """User-space memory of all its processes, what is shared counted once."""
        assert self.process is not None
        pids = [self.process.pid, *(one.pid for one in self.children())]
        return sum(_pss_bytes(Path(f"/proc/{pid}/smaps_rollup").read_text()) for pid in pids)


class HAProxy(Balancer):
    name = program = "haproxy"
    defaults = ""

    @classmethod
    def version(cls) -> str:
        return f"haproxy {_version([cls.program, '-v'])}"

    def command(self) -> list[str]:
        path = self.directory / "haproxy.cfg"
        path.write_text(
            f"global\n  nbthread 1\n  maxconn {MAXIMUM_CONNECTIONS}\n"
            f"defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 1h\n  timeout server 1h\n{self.defaults}"
            f"listen bench\n  bind 127.0.0.1:{self.port} backlog {BACKLOG}\n  server one 127.0.0.1:{self.backend}\n"
        )
        return ["haproxy", "-db", "-f", str(path)]


class SplicingHAProxy(HAProxy):
    """As one would set it up for bulk data."""

    name = "haproxy, splice-auto"
    defaults = "  option splice-auto\n"


class Nginx(Balancer):
    name, program = "nginx stream", "nginx"

    @classmethod
    def is_installed(cls) -> bool:
        return super().is_installed() and _NGINX_STREAM.exists()

    @classmethod
    def version(cls) -> str:
        return f"nginx {_version([cls.program, '-v'])}"

    def command(self) -> list[str]:
        path = self.directory / "nginx.conf"
        path.write_text(
            f"load_module {_NGINX_STREAM};\ndaemon off;\nworker_processes 1;\npid {self.directory}/pid;\n"
            f"worker_rlimit_nofile {2 * MAXIMUM_CONNECTIONS + 1000};\nerror_log stderr crit;\n"
            f"events {{ worker_connections {2 * MAXIMUM_CONNECTIONS}; }}\n"
            f"stream {{ server {{ listen 127.0.0.1:{self.port} backlog={BACKLOG}; proxy_timeout 1h; "
            f"proxy_pass 127.0.0.1:{self.backend}; }} }}\n"
        )
        return ["nginx", "-e", "stderr", "-c", str(path)]


class HandoffBalancer(Balancer):
    """One relay worker; master and controller count as well, in CPU and in memory."""

    name = "handoff"

    @classmethod
    def is_installed(cls) -> bool:
        return importlib.util.find_spec("lb.relay.worker") is not None

    @classmethod
    def version(cls) -> str:
        return Handoff.version().partition(" (")[0]

    def count_workers(self) -> Replaced:
        """It begins when the controller answers, too: what that needs to start is not the load's."""
        return Replaced(int((self.directory / "bench" / "admin.sock").exists()), 0)

    def command(self) -> list[str]:
        return [
            *(sys.executable, "-c", "from lb.cli import main; main()", "run", "--name", "bench"),
            *("--listen", f"127.0.0.1:{self.port}", "--backend", f"127.0.0.1:{self.backend}"),
            *("--run-dir", str(self.directory), "--state", str(self.directory / "state")),
        ]


BALANCERS: tuple[type[Balancer], ...] = (HAProxy, SplicingHAProxy, Nginx, HandoffBalancer)


def _pss_bytes(text: str) -> int:
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found is not None else 0


def _version(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    found = re.search(r"\d+(?:\.\d+)+", done.stdout + done.stderr)
    return found[0] if found is not None else "of an unknown version"
