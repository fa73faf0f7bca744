"""When backends are checked: the first time at once, later one after another, faster while their state is changing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping

import msgspec

from lb.control.checks import Result, check_backend
from lb.core.model import Check, SendProxy

MAXIMUM_AT_ONCE = 64
"""Checks, of all services."""
JITTER = 0.1
"""Intervals are longer or shorter by up to this share."""
FAST_SHARE = 0.25
"""Of the interval, while the state is changing, where the configuration does not say."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be checked: a change of it begins anew."""

    check: Check
    address: str
    send_proxy: SendProxy


class Checker:
    """One asyncio task for each backend. `on_result` is called on the loop; `is_changing` asks how it stands then."""

    def __init__(
        self, tasks: asyncio.TaskGroup, on_result: Callable[[str, Result], None], is_changing: Callable[[str], bool]
    ) -> None:
        self._group = tasks
        self._on_result = on_result
        self._is_changing = is_changing
        self._places = asyncio.Semaphore(MAXIMUM_AT_ONCE)
        self._running: dict[str, tuple[Task, asyncio.Task[None], asyncio.Event]] = {}

    def check_only(self, wanted: Mapping[str, Task]) -> None:
        """By identity. What runs for the same goes on."""
        for identity, (task, running, _) in list(self._running.items()):
            if wanted.get(identity) != task:
                running.cancel()
                del self._running[identity]
        for identity, task in wanted.items():
            if identity not in self._running:
                hurry = asyncio.Event()
                running = self._group.create_task(self._check(identity, task, hurry))
                self._running[identity] = (task, running, hurry)

    def hurry(self, identity: str) -> None:
        """Somebody has found it not to work: ask now, or as soon as the faster interval allows."""
        if identity in self._running:
            self._running[identity][2].set()

    async def _check(self, identity: str, task: Task, hurry: asyncio.Event) -> None:
        fast = _fast_seconds(task.check)
        is_first = True
        if not self._is_changing(identity):  # its health is known: no storm at our start
            await _wait(hurry, random.random() * task.check.interval_seconds)
            is_first = False
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            hurry.clear()
            async with self._places:
                result = await check_backend(task.check, task.address, task.send_proxy)
            self._on_result(identity, result)
            seconds = (fast if self._is_changing(identity) else task.check.interval_seconds) * _jitter()
            if is_first:  # all were asked at once; from here on they are spread
                seconds *= random.random()
                is_first = False
            await asyncio.sleep(max(0.0, began + min(fast, seconds) - loop.time()))
            await _wait(hurry, began + seconds - loop.time())


async def _wait(hurry: asyncio.Event, seconds: float) -> None:
    if seconds > 0:
        try:
            async with asyncio.timeout(seconds):
                await hurry.wait()
        except TimeoutError:
            pass


def _fast_seconds(check: Check) -> float:
    if check.fast_interval_seconds is not None:
        return min(check.fast_interval_seconds, check.interval_seconds)
    return check.interval_seconds * FAST_SHARE


def _jitter() -> float:
    return 1 + random.uniform(-JITTER, JITTER)
