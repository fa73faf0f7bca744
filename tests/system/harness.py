"""A real service for a test: its own run directory, port 0, and every process of it accounted for at the end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

DEADLINE_SECONDS = 60.0
"""No wait in a test is longer; none is meant to come near."""


def wait_until(condition: Callable[[], Any], what: str, seconds: float = DEADLINE_SECONDS) -> Any:
    """Ask again until the condition gives something true. For what nobody can be told of, such as /proc."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        threading.Event().wait(0.02)


class Output:
    """What a process writes, line by line, readable while it goes on."""

    def __init__(self, stream: Any) -> None:
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def _read(self, stream: Any) -> None:
        with stream:
            for line in stream:
                with self._changed:
                    self._lines.append(line.rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    @property
    def text(self) -> str:
        with self._changed:
            return "\n".join(self._lines)

    def wait_for(self, pattern: str, seconds: float = DEADLINE_SECONDS, start: int = 0) -> re.Match[str]:
        """The first line, from line `start` on, that the pattern is found in."""
        deadline = time.monotonic() + seconds
        seen = start
        with self._changed:
            while True:
                for line in self._lines[seen:]:
                    if found := re.search(pattern, line):
                        return found
                seen = max(seen, len(self._lines))
                if self._is_closed or not self._changed.wait(deadline - time.monotonic()):
                    raise AssertionError(f"no line like {pattern!r} in:\n" + "\n".join(self._lines))

    @property
    def count(self) -> int:
        with self._changed:
            return len(self._lines)

    def finish(self) -> str:
        self._thread.join(DEADLINE_SECONDS)
        return self.text


class Service:
    """`handoff run` of an application, in a directory of its own. Use as a context manager."""

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        app: str | None = "main:app",
        name: str = "web",
        bind: str | None = "127.0.0.1:0",
        environment: dict[str, str] | None = None,
        command: list[str] | None = None,
        probation: str | None = "50ms",
    ) -> None:
        self.directory = directory
        self.name = name
        # Not beside the directory: the path of a unix socket may have 107 bytes only.
        self.run_dir = Path(tempfile.gettempdir()) / f"handoff-{hashlib.sha256(bytes(directory)).hexdigest()[:16]}"
        self.command = command or [sys.executable, "-m", "handoff"]
        self.arguments = ["run", *([app] if app else []), "--name", name, "--run-dir", str(self.run_dir)]
        if bind is not None:
            self.arguments += ["--bind", bind]
        if probation is not None:
            self.arguments += ["--probation", probation]
        self.arguments += arguments
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
        self.environment.pop("PWD", None)
        self.pass_fds: tuple[int, ...] = ()
        self.process: subprocess.Popen[str] | None = None
        self.port = 0

    # --- life -------------------------------------------------------------------------------------------------------

    def launch(self) -> Service:
        """Start the master and do not wait."""
        self.process = subprocess.Popen(
            [*self.command, *self.arguments],
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
            pass_fds=self.pass_fds,
        )
        self.stdout, self.stderr = Output(self.process.stdout), Output(self.process.stderr)
        return self

    def start(self) -> Service:
        """Start, and wait for the first commit."""
        self.launch()
        found = self.stderr.wait_for(r'handoff serving .*addresses=(\S+)|"serving".*"addresses": "([^"]*)"')
        ports = re.findall(r":(\d+)(?:,|$)", found.group(1) or found.group(2) or "")
        self.port = int(ports[0]) if ports else 0
        return self

    def __enter__(self) -> Service:
        if self.process is None:
            try:
                self.start()
            except BaseException:
                self.__exit__()  # `with` calls it only for what was entered
                raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process is not None
        family = self.family()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGQUIT)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        leftover = [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        alive = psutil.wait_procs(leftover, 10)[1]
        for one in alive:
            with contextlib.suppress(psutil.Error):
                one.kill()
        self.stdout.finish()
        self.stderr.finish()
        shutil.rmtree(self.run_dir / self.name, ignore_errors=True)
        with contextlib.suppress(OSError):  # another service of the test is still there
            self.run_dir.rmdir()
        assert not alive, f"left behind: {alive}"

    def wait(self) -> int:
        """Wait for the master's end; its exit code."""
        assert self.process is not None
        return self.process.wait(DEADLINE_SECONDS)

    def family(self) -> list[psutil.Process]:
        """The master's processes, without itself."""
        assert self.process is not None
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.Error:
            return []

    # --- commands ---------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def handoff(self, *arguments: str, timeout: float = DEADLINE_SECONDS) -> subprocess.CompletedProcess[str]:
        """Run a command of handoff on this service."""
        return subprocess.run(
            [*self.command, *arguments, "--name", self.name, "--run-dir", str(self.run_dir)],
            cwd=self.directory,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def reload(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.handoff("reload", *arguments)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request on the control socket; quicker than the command."""
        return self.begin(request).answer()

    def begin(self, request: dict[str, Any]) -> Asked:
        """Send a request, and come back for its answer later."""
        return Asked(self.control_socket(), request)

    def control_socket(self) -> socket.socket:
        """A connection to the control socket; the caller owns it."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(self.run_dir / self.name / "control.sock"))  # with a timeout: EAGAIN in a full queue
        except OSError:
            connection.close()
            raise
        connection.settimeout(DEADLINE_SECONDS)
        return connection

    def status(self, drain: bool = False) -> dict[str, Any]:
        return self.ask({"type": "status", "drain": drain})

    def workers(self, generation: int | None = None) -> list[dict[str, Any]]:
        return [
            worker
            for one in self.status()["generations"]
            if generation is None or one["generation"] == generation
            for worker in one["workers"]
        ]

    def wait_for_generations(self, *numbers: int) -> None:
        """Until exactly these generations are there, all their workers accepting."""

        def settled() -> bool:
            found = self.status()["generations"]
            states = {worker["state"] for one in found for worker in one["workers"]}
            return [one["generation"] for one in found] == list(numbers) and states <= {"accepting"}

        wait_until(settled, f"generations {numbers}: {self.status()}")

    # --- clients ----------------------------------------------------------------------------------------------------

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def get(self, path: str = "/", headers: str = "Connection: close\r\n") -> tuple[int, dict[str, str], bytes]:
        """One request on a connection of its own."""
        with self.connect() as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\n{headers}\r\n".encode())
            return read_response(connection)


class Asked:
    """One request on the control socket that was sent. Owns the connection."""

    def __init__(self, connection: socket.socket, request: dict[str, Any]) -> None:
        self.connection = connection
        connection.sendall(json.dumps(request).encode() + b"\n")

    def answer(self) -> dict[str, Any]:
        """The one answer; nothing may follow it."""
        data = b""
        with self.connection:
            while chunk := self.connection.recv(65536):
                data += chunk
        assert data.endswith(b"\n"), "the control socket closed without an answer"
        assert data.count(b"\n") == 1, f"more than one answer: {data!r}"
        return json.loads(data)  # type: ignore[no-any-return]


def read_response(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Read exactly one response. Raises EOFError when it is cut short. Pipelining is not for this."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _more(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    headers = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    status = int(status_line.split()[1])
    if headers.get("transfer-encoding") == "chunked":
        return status, headers, _read_chunked(connection, body)
    size = int(headers.get("content-length", "0"))
    while len(body) < size:
        body += _more(connection)
    assert len(body) == size, f"more than one response: {body[size:]!r}"
    return status, headers, body


def _read_chunked(connection: socket.socket, buffer: bytes) -> bytes:
    body = b""
    while True:
        while b"\r\n" not in buffer:
            buffer += _more(connection)
        line, _, buffer = buffer.partition(b"\r\n")
        size = int(line, 16)
        while len(buffer) < size + 2:
            buffer += _more(connection)
        body += buffer[:size]
        buffer = buffer[size + 2 :]
        if size == 0:
            return body


def _more(connection: socket.socket) -> bytes:
    data = connection.recv(65536)
    if not data:
        raise EOFError("the connection ended in the middle of a response")
    return data


class Clients:
    """Strict clients in threads: each repeats one exchange until told to stop; every failure is kept, none retried."""

    def __init__(self, exchange: Callable[[], object], count: int = 4, pace_seconds: float = 0.02) -> None:
        """`pace_seconds`: each client's pause, so that they do not take the processors from what they look at."""
        self._exchange = exchange
        self._pace_seconds = pace_seconds
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._answered = threading.Condition(self._lock)
        self.done = 0
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]

    def _run(self) -> None:
        while not self._stop.wait(self._pace_seconds):
            try:
                self._exchange()
            except Exception as error:  # a strict client keeps whatever went wrong
                with self._lock:
                    self.failures.append(f"{type(error).__name__}: {error}")
            with self._answered:
                self.done += 1
                self._answered.notify_all()

    def more(self, count: int) -> None:
        """Wait for so many more exchanges."""
        with self._answered:
            goal = self.done + count
            assert self._answered.wait_for(lambda: self.done >= goal, DEADLINE_SECONDS), "clients make no progress"

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(DEADLINE_SECONDS)

    def assert_none_failed(self) -> None:
        assert self.done > 0
        assert not self.failures, f"{len(self.failures)} of {self.done} failed: {self.failures[:5]}"
