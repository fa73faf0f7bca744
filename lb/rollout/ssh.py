"""Hosts reached by the system's `ssh`, with the user's configuration, keys and agent; one connection for all commands.

The connection is a process of its own (`ssh -M -N -f`): a command's ssh that is killed takes nobody else's with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from handoff.errors import ExitCode, HandoffError, UsageError
from lb.rollout.processes import Flooded, Ran, run
from lb.rollout.transport import AccessDenied, Host, Unreachable, last_line

CONNECT_SECONDS = 10
CONNECTED_SECONDS = 40.0
"""For one that answers, and then takes its time: keys, jump hosts."""
PERSIST_SECONDS = 120
"""The connection waits so long for the next command."""
ALIVE_SECONDS, ALIVE_COUNT = 5, 3
"""A host that does not answer for 15 s is gone."""
CLOSE_SECONDS = 5.0
_UNREACHABLE = 255
"""ssh(1): of ssh itself."""
_COMMAND_NOT_FOUND = 127
_MAXIMUM_DIRECTORY_BYTES = 70
"""unix(7): a socket's path has at most 107; ssh adds 17 of its own while it makes one."""
_PLAIN = re.compile(r"/[A-Za-z0-9._/-]+", re.ASCII)
_DESTINATION = re.compile(r"[A-Za-z0-9_.@:/\[\]%+=~][A-Za-z0-9_.@:/\[\]%+=~-]*", re.ASCII)
_NOT_LET_IN = ("Permission denied", "Host key verification failed", "Too many authentication failures")


class SshHost(Host):
    """Owns a private directory, and in it the connection's socket, until `aclose()`."""

    def __init__(
        self, destination: str, handoff: Sequence[str], gate: asyncio.Semaphore | None, config: str | None
    ) -> None:
        if _DESTINATION.fullmatch(destination) is None:
            raise UsageError(f"ssh = {destination!r}: is no destination; write HOST, USER@HOST or ssh://USER@HOST:PORT")
        super().__init__(destination, handoff, gate)
        self._destination = destination
        self._config = config
        self._directory: Path | None = None
        self._connections = 0
        """Each has a socket of its own: after one that hangs, the next does not go through it."""
        self._connecting = asyncio.Lock()

    async def aclose(self) -> None:
        directory, self._directory = self._directory, None
        if directory is None:
            return
        try:
            for path in sorted(directory.iterdir()):
                with contextlib.suppress(OSError, TimeoutError, Flooded):
                    await run([*self._ssh(path), "-O", "exit", "--", self._destination], b"", CLOSE_SECONDS)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    async def _run(self, argv: Sequence[str], stdin: bytes, timeout: float) -> Ran:
        clock = asyncio.get_running_loop()
        deadline = clock.time() + timeout
        number = self._connections
        try:
            path = await self._connected(timeout)
            ran = await self._call([*self._ssh(path), "-T", "--", self._destination, shlex.join(argv)], stdin, deadline)
        except Unreachable:
            if self._connections == number:
                self._connections += 1
            raise
        if ran.exit_code == _COMMAND_NOT_FOUND and not ran.output:
            said = last_line(ran.errors) or f"{argv[0]}: not found"
            raise HandoffError(f"{self.name}: {said}; say where it is there, or install it")
        return ran

    async def _connected(self, timeout: float) -> Path:
        """The socket of the connection, which is made if there is none."""
        deadline = asyncio.get_running_loop().time() + min(timeout, CONNECTED_SECONDS)
        try:
            async with asyncio.timeout_at(deadline):
                await self._connecting.acquire()
        except TimeoutError:
            raise Unreachable(f"{self.name}: no connection in time", ExitCode.TIMED_OUT) from None
        try:
            path = self._private() / str(self._connections)
            if not path.exists():
                command = [*self._ssh(path), "-M", "-N", "-f", "--", self._destination]
                # In older releases of OpenSSH what goes to the background keeps stdout.
                await self._call(command, b"", deadline, has_output=False)
            return path
        finally:
            self._connecting.release()

    async def _call(self, command: Sequence[str], stdin: bytes, deadline: float, *, has_output: bool = True) -> Ran:
        left = max(0.0, deadline - asyncio.get_running_loop().time())
        try:
            ran = await run(command, stdin, left, has_output=has_output)
        except TimeoutError:
            raise Unreachable(f"{self.name}: no answer in time", ExitCode.TIMED_OUT) from None
        except Flooded as error:
            raise HandoffError(f"{self.name}: {error.message}") from None
        except OSError as error:
            raise HandoffError(f"ssh: {error.strerror}; install an OpenSSH client") from None
        if ran.exit_code == _UNREACHABLE or ran.exit_code < 0:
            said = last_line(ran.errors) or "the connection was lost"
            kind = AccessDenied if any(text in said for text in _NOT_LET_IN) else Unreachable
            raise kind(f"{self.name}: cannot be reached: {said}")
        return ran

    def _ssh(self, path: Path) -> list[str]:
        options = {
            "BatchMode": "yes",
            "ControlMaster": "auto",
            "ControlPath": str(path),
            "ControlPersist": str(PERSIST_SECONDS),
            "ConnectTimeout": str(CONNECT_SECONDS),
            "ServerAliveInterval": str(ALIVE_SECONDS),
            "ServerAliveCountMax": str(ALIVE_COUNT),
            "ClearAllForwardings": "yes",
            "RemoteCommand": "none",
        }
        config = [] if self._config is None else ["-F", self._config]
        return ["ssh", *config, *(word for key, value in options.items() for word in ("-o", f"{key}={value}"))]

    def _private(self) -> Path:
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="handoff-", dir=_short_directory()))
        return self._directory


def _short_directory() -> str:
    """Where a socket's path is short enough, and has nothing that ssh reads as more than a path."""
    for found in (os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir()):
        if _PLAIN.fullmatch(found) and len(found) <= _MAXIMUM_DIRECTORY_BYTES and os.access(found, os.W_OK | os.X_OK):
            return found
    return "/tmp"
