"""Asking the agent of a backend, as HAProxy does."""

from __future__ import annotations

import asyncio

from lb.control.checks import connect, reason_of, target_of
from lb.core.agent import MAXIMUM_LINE_BYTES, Said, line_of, parse
from lb.core.model import Check


async def ask_agent(check: Check, address: str) -> Said | str:
    """What it said, or why there is no answer. Raises nothing but cancellation."""
    try:
        async with asyncio.timeout(check.timeout_seconds):
            return parse(await _line(check, address))
    except TimeoutError:
        return f"no answer within {check.timeout_seconds:g} s"
    except OSError as error:
        return reason_of(error)
    except ValueError as error:
        return str(error)


async def _line(check: Check, address: str) -> str:
    reader, writer = await connect(target_of(check, address))
    try:
        if check.send:
            writer.write(check.send.encode())
        data, line = b"", None
        while line is None:
            part = await reader.read(MAXIMUM_LINE_BYTES)
            data += part
            line = line_of(data, is_end=not part)
        return line
    finally:
        writer.transport.abort()
