"""A real PostgreSQL on loopback, with a cluster of its own, in the foreground. It ends with the test."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.system.foreign import free_port
from tests.system.harness import DEADLINE_SECONDS

MAXIMUM_TRIES = 5
"""A port that was free may be somebody else's a moment later."""
OPTIONS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "fsync": "off",
    "shared_buffers": "16MB",
    "max_connections": "50",
    "autovacuum": "off",
}


def program(name: str) -> str:
    """One of those that Debian keeps beside the server; .ci/run installs it."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    assert found, f"{name} is not installed: .ci/run does that"
    return str(found[-1])


class Postgres:
    """Use as a context manager. The server refuses to run as root: then it runs as `postgres`, in a directory of that
    user's own."""

    def __init__(self) -> None:
        self.port = 0
        self._directory = Path(tempfile.mkdtemp(prefix="handoff-postgres-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._as_user: dict[str, Any] = {}
        if os.geteuid() == 0:
            owner = pwd.getpwnam("postgres")
            os.chown(self._directory, owner.pw_uid, owner.pw_gid)
            self._as_user = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}

    def __enter__(self) -> Postgres:
        try:
            words = [
                program("initdb"),
                "-D",
                "data",
                "-U",
                "tester",
                "-A",
                "trust",
                "-E",
                "UTF8",
                "--locale",
                "C",
                "-N",
            ]
            subprocess.run(words, cwd=self._directory, check=True, capture_output=True, timeout=120, **self._as_user)
            for _ in range(MAXIMUM_TRIES):
                if self._start():
                    return self
            raise AssertionError((self._directory / "log").read_text(errors="replace"))
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)  # at once, with all its processes
            self._process.wait(DEADLINE_SECONDS)
        shutil.rmtree(self._directory)

    def _start(self) -> bool:
        """Whether it accepts. It says so in its pid file (postmaster.pid: its last line)."""
        self.port = free_port()
        words = [program("postgres"), "-D", "data"]
        for key, value in (OPTIONS | {"port": str(self.port)}).items():
            words += ["-c", f"{key}={value}"]
        with open(self._directory / "log", "ab") as log:
            self._process = subprocess.Popen(words, cwd=self._directory, stdout=log, stderr=log, **self._as_user)
        probe = [program("pg_isready"), "-h", "127.0.0.1", "-p", str(self.port), "-t", "1"]
        while self._process.poll() is None:
            if subprocess.run(probe, capture_output=True, check=False, timeout=DEADLINE_SECONDS).returncode == 0:
                return True
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.1)
        return False
