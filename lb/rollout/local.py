"""What a deployer does on its own machine: hooks, the gate's command and its probe. Bounded in time and size."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Mapping

MAXIMUM_OUTPUT_BYTES = 64 * 1024
PROBE_TIMEOUT_SECONDS = 10.0


async def command_here(command: str, environment: Mapping[str, str], timeout: float) -> tuple[int, str]:
    """Its exit status, negative for a signal, and the end of what it printed. Raises TimeoutError; then it is killed,
    with all that it has started in its session."""
    process = await asyncio.create_subprocess_exec(
        "/bin/sh",
        "-c",
        command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=dict(environment),
        start_new_session=True,
    )
    assert process.stdout is not None
    output = b""
    try:
        async with asyncio.timeout(timeout):
            while data := await process.stdout.read(65536):
                output = (output + data)[-MAXIMUM_OUTPUT_BYTES:]
            code = await process.wait()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        raise
    return code, output.decode(errors="replace")


async def probe(url: str) -> str | None:
    """What is wrong with the answer; None: nothing."""
    return await asyncio.to_thread(_probe, url)


def _probe(url: str) -> str | None:
    request = urllib.request.Request(url, headers={"User-Agent": "handoff"})
    try:
        with urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_SECONDS) as answer:
            answer.read(1024)
            return None
    except urllib.error.HTTPError as error:
        error.close()
        return f"status {error.code}"
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error)).lower()
