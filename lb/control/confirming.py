"""Checks that began after somebody asked. What was seen before says nothing of what was started since."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from lb.control.controller import Controller
from lb.core.compose import Present
from lb.core.standing import Administrative

LOOK_SECONDS = 0.05
"""Between two looks: a check that passes again is no change, of which anybody would be told."""


async def confirm(controller: Controller, is_meant: Callable[[Present], bool], seconds: float | None) -> list[str]:
    """Have all of these checked that can be. Who has not passed a check that began since, by then; empty: nobody."""
    asked_at = time.monotonic()
    deadline = asked_at + (seconds or 0.0)
    for one in controller.present.values():
        if is_meant(one):
            controller.hurry(one.identity)
    while True:
        missing = [
            one for one in controller.present.values() if is_meant(one) and _is_missing(controller, one, asked_at)
        ]
        if not missing or time.monotonic() >= deadline:
            return [_told(controller, one) for one in missing]
        await asyncio.sleep(LOOK_SECONDS)


def _is_missing(controller: Controller, one: Present, asked_at: float) -> bool:
    """In maintenance, or without a check, there is nothing to wait for."""
    service = controller.service(one.service)
    if service is None or service.health_check is None or one.standing.administrative is Administrative.MAINT:
        return False
    return controller.passed_since(one.identity) < asked_at


def _told(controller: Controller, one: Present) -> str:
    last = controller.records[one.identity].last_check
    return f"{one.key} has passed no check since ({one.standing.health.value}{f': {last}' if last else ''})"
