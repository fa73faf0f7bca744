"""Child processes of the deployer: bounded in time and in what they may write, and killed with the task that waits."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from typing import NamedTuple

from handoff.errors import HandoffError

MAXIMUM_OUTPUT_BYTES = 16 * 1024 * 1024
"""Of stdout; who writes more has failed."""
_KEPT_ERROR_BYTES = 8 * 1024
"""Of stderr: the last."""
_READ_BYTES = 64 * 1024
_MAXIMUM_READS = 16


class Ran(NamedTuple):
    exit_code: int
    """Negative: the signal that killed it."""
    output: bytes
    errors: str


class Flooded(HandoffError):
    """It wrote more than anybody wants."""


async def run(argv: Sequence[str], stdin: bytes, timeout: float, *, has_output: bool = True) -> Ran:
    """Raises TimeoutError, OSError where it cannot be started, Flooded. However this ends, the process has ended.

    With `has_output` its stdout is read to the end, whoever has it; without, it is dropped.
    """
    errors = _Errors()
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE if stdin else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE if has_output else asyncio.subprocess.DEVNULL,
            stderr=errors.end,
            start_new_session=True,  # Ctrl-C in a terminal is for the deployer, which then decides
        )
    except BaseException:
        errors.close()
        raise
    errors.listen()
    try:
        async with asyncio.timeout(timeout):
            output = await _talk(process, stdin)
            exit_code = await process.wait()
        return Ran(exit_code, output, errors.text())
    finally:
        errors.close()
        await _end(process)


async def _talk(process: asyncio.subprocess.Process, stdin: bytes) -> bytes:
    """All of its stdout, to the end."""
    if process.stdout is None:
        return b""
    feeding = asyncio.create_task(_feed(process, stdin))
    try:
        output = bytearray()
        while chunk := await process.stdout.read(_READ_BYTES):
            output += chunk
            if len(output) > MAXIMUM_OUTPUT_BYTES:
                raise Flooded(f"wrote more than {MAXIMUM_OUTPUT_BYTES} bytes")
        return bytes(output)
    finally:
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)


async def _feed(process: asyncio.subprocess.Process, stdin: bytes) -> None:
    if process.stdin is None:
        return
    with contextlib.suppress(ConnectionError):  # it did not want all of it, as its answer will say
        process.stdin.write(stdin)
        await process.stdin.drain()
        process.stdin.close()
        await process.stdin.wait_closed()


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill it, unless it has ended, and reap it. A cancellation meanwhile is not lost, and comes after that."""
    transport = getattr(process, "_transport", None)
    assert isinstance(transport, asyncio.SubprocessTransport)
    transport.close()  # kills, and closes the pipes: in some releases of Python wait() is for their ends, too
    waiting = asyncio.ensure_future(process.wait())
    cancelled: asyncio.CancelledError | None = None
    while not waiting.done():
        try:
            await asyncio.shield(waiting)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


class _Errors:
    """The process' stderr. A pipe of our own: an ssh that stays in the background may keep it open for ever, and nobody
    waits for its end."""

    def __init__(self) -> None:
        self._fd, self.end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(self.end, True)
        self._tail = bytearray()
        self._is_listening = False

    def listen(self) -> None:
        os.close(self.end)
        self.end = -1
        asyncio.get_running_loop().add_reader(self._fd, self._read)
        self._is_listening = True

    def text(self) -> str:
        """What has come until now."""
        for _ in range(_MAXIMUM_READS):
            if not self._is_listening or not self._read():
                break
        return bytes(self._tail).decode("utf-8", "replace")

    def close(self) -> None:
        self._stop()
        for fd in (self._fd, self.end):
            if fd >= 0:
                os.close(fd)

    def _read(self) -> bool:
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return False
        self._tail += data
        del self._tail[:-_KEPT_ERROR_BYTES]
        if not data:
            self._stop()
        return bool(data)

    def _stop(self) -> None:
        if self._is_listening:
            asyncio.get_running_loop().remove_reader(self._fd)
            self._is_listening = False
