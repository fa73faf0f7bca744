"""Checks that are commands: bounded in time, in what they write, and in how many run at once.

A command runs in a process group of its own, and whatever of the group is left when it has ended, or at its deadline,
is killed. No shell. Each runs under a thread that starts, watches and reaps it, so the loop waits for nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from handoff.addresses import parse_bind
from handoff.resolve import clean_environment
from lb.control.checks import Result, reason_of, target_of
from lb.core.model import Check
from lb.core.standing import Outcome

MAXIMUM_AT_ONCE = 8
"""Commands, of all services."""
MAXIMUM_OUTPUT_BYTES = 64 * 1024
"""Who writes more has failed."""
MAXIMUM_SHOWN = 100
"""Characters of its first line."""
_READ_BYTES = 16 * 1024


class Commands:
    """Owns the threads, and the processes under them."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        """`environ`: ours; what of it is about us alone is left out."""
        self._environ = clean_environment(environ)
        self._threads = ThreadPoolExecutor(MAXIMUM_AT_ONCE, thread_name_prefix="command")

    async def run(self, check: Check, address: str, typed: str) -> Result:
        """Asks the backend once. Who is cancelled kills the command. Raises nothing but cancellation."""
        try:
            stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as error:
            return Result(Outcome.FAILED, reason_of(error), 0.0)
        environ = {**self._environ, **variables(check, address, typed)}
        running = self._threads.submit(run_command, check, environ, stop)
        try:
            return await asyncio.wrap_future(running)
        except asyncio.CancelledError:
            os.eventfd_write(stop, 1)
            raise
        finally:
            running.add_done_callback(lambda _: os.close(stop))

    def close(self) -> None:
        """To be called when nothing is asked any more; the last commands are being killed then."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def variables(check: Check, address: str, typed: str) -> dict[str, str]:
    """What tells a command whom to ask."""
    target = target_of(check, address)
    told = {"HANDOFF_BACKEND_ADDRESS": address, "HANDOFF_BACKEND_TYPED": typed}
    if target.kind == "unix":
        told["HANDOFF_BACKEND_PATH"] = target.path
    else:
        told |= {"HANDOFF_BACKEND_HOST": target.host, "HANDOFF_BACKEND_PORT": str(target.port)}
        told["HANDOFF_BACKEND_NAME"] = parse_bind(typed).host
    return told


def run_command(check: Check, environ: Mapping[str, str], stop: int) -> Result:
    """Blocks, for at most the check's timeout. `stop`: an eventfd, borrowed; once it counts the command is killed."""
    began = time.monotonic()
    try:
        process = subprocess.Popen(
            check.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environ),
            start_new_session=True,
            bufsize=0,
        )
    except OSError as error:
        problem = error.strerror or str(error)
        return Result(Outcome.FAILED, f"{check.command[0]}: {problem[:1].lower()}{problem[1:]}", 0.0)
    except ValueError as error:  # a NUL in an argument
        return Result(Outcome.FAILED, f"{check.command[0]}: {error}", 0.0)
    output = bytearray()
    try:
        problem = _watch(process, output, began + check.timeout_seconds, check.timeout_seconds, stop)
    except OSError as error:  # too many open files
        problem = reason_of(error)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # not reaped yet: the number is still its own
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    seconds = time.monotonic() - began
    if not problem and process.returncode == 0:
        return Result(Outcome.PASSED, f"passed in {seconds * 1000:.0f} ms", seconds)
    return Result(Outcome.FAILED, _told(problem or _ended(process.returncode), output), seconds)


def _watch(process: subprocess.Popen[bytes], output: bytearray, deadline: float, seconds: float, stop: int) -> str:
    """Until it has ended, or must end: why, then. It is not reaped."""
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    os.set_blocking(pipe, False)
    fd = os.pidfd_open(process.pid)
    poll = select.poll()
    for one in (fd, pipe, stop):
        poll.register(one, select.POLLIN)
    try:
        while (left := deadline - time.monotonic()) > 0:
            ready = {one for one, _ in poll.poll(left * 1000 + 1)}
            if stop in ready:
                return "is not wanted any more"
            if pipe in ready or fd in ready:
                is_open = _read(pipe, output)
                if len(output) > MAXIMUM_OUTPUT_BYTES:
                    return f"wrote more than {MAXIMUM_OUTPUT_BYTES} bytes"
                if not is_open and pipe in ready:
                    poll.unregister(pipe)
                    pipe = -1
            if fd in ready:
                return ""
        return f"no end within {seconds:g} s"
    finally:
        os.close(fd)


def _read(pipe: int, output: bytearray) -> bool:
    """What there is, up to the limit. False: it is at its end."""
    while pipe >= 0 and len(output) <= MAXIMUM_OUTPUT_BYTES:
        try:
            data = os.read(pipe, _READ_BYTES)
        except BlockingIOError:
            return True
        if not data:
            return False
        output += data
    return True


def _ended(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"killed by signal {-code}"


def _told(problem: str, output: bytearray) -> str:
    first = next((line for line in bytes(output).decode("utf-8", "replace").splitlines() if line.strip()), "")
    shown = "".join(one if one.isprintable() else "?" for one in first.strip())[:MAXIMUM_SHOWN]
    return f"{problem}: {shown}" if shown else problem
