"""A balancer that looks into etcd for what rollouts want: at its start, before it accepts, and by watch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from pathlib import Path

import msgspec

from lb.control.commands import Commands
from lb.control.controller import Controller
from lb.control.files import write_atomically
from lb.control.stored import DESIRED_NAME
from lb.core.admin import Switch
from lb.core.desired import PREFIX, Desired, Wanted, is_news, noted
from lb.core.lookup import FENCED
from lb.rollout.stores import open_store
from lb.rollout.stores.base import Entries, Store, StoreError

START_SECONDS = 3.0
"""For the store to answer before a start, which goes on without it."""
WATCH_SECONDS = 60.0
RETRY_SECONDS = 1.0
"""After a store that does not answer, and for a pool that is not healthy yet."""

_LOG = logging.getLogger("handoff.lb")


def look(url: str, near: str, state: Path) -> None:
    """Write down what is wanted now, for those who are about to start. Raises StoreError: what is there stays."""
    store = open_store(url, near=near, timeout_seconds=START_SECONDS)
    try:
        found = wanted_of(store.list(PREFIX))
    finally:
        store.close()
    with contextlib.suppress(OSError):  # as with overrides: it is told where they cannot be written
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(state / DESIRED_NAME, msgspec.json.encode(found), is_durable=True)


def wanted_of(entries: Entries) -> list[Wanted]:
    """What cannot be read is told, and left out."""
    found = []
    for one in entries:
        try:
            desired = msgspec.json.decode(one.value, type=Desired)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            _LOG.warning("store: %s cannot be read: %s", one.key, error)
            continue
        found.append(Wanted(service=one.key.removeprefix(PREFIX), desired=desired, version=one.version))
    return found


class DesiredWatch:
    """Takes what is wanted, as soon as it may be. A daemon thread waits for the store; all the rest is on the loop."""

    def __init__(self, controller: Controller, commands: Commands, url: str, near: str) -> None:
        """Raises UsageError."""
        self._controller, self._commands = controller, commands
        self._store: Store = open_store(url, near=near)
        self._latest: dict[str, Wanted] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_ended = threading.Event()

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._watch, name="desired", daemon=True).start()

    def close(self) -> None:
        self._is_ended.set()
        for task in self._tasks:
            task.cancel()
        self._store.close()

    def _watch(self) -> None:
        after, was_reached = 0, True
        while not self._is_ended.is_set():
            try:
                entries = self._store.watch(PREFIX, after, WATCH_SECONDS)
                was_reached = True
            except StoreError as error:
                if was_reached and not self._is_ended.is_set():
                    _LOG.warning("%s; goes on with what it has", error.message)
                was_reached = False
                self._is_ended.wait(RETRY_SECONDS)
                continue
            after = max((one.version for one in entries), default=after)
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._arrived, wanted_of(entries))

    def _arrived(self, wanted: list[Wanted]) -> None:
        for one in wanted:
            if not self._is_ended.is_set() and self._controller.service(one.service) is not None:
                self._latest[one.service] = one
                task = asyncio.ensure_future(self._take(one))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _take(self, one: Wanted) -> None:
        """Until it is so, or something later is wanted."""
        request = Switch(
            service=one.service,
            pool=one.desired.pool,
            percent=one.desired.percent,
            who=one.desired.who,
            why=one.desired.why,
            fence=one.fence,
            token=one.desired.token,
        )
        while self._latest[one.service] is one and is_news(self._controller.overrides, one):
            answer = await self._commands.carry_out(request)
            if answer.exit_code in (0, FENCED):
                self._controller.override(noted(self._controller.overrides, one))
                return
            await asyncio.sleep(RETRY_SECONDS)


def near_of(shown: str) -> str:
    """The directory that paths in a file are taken from."""
    return os.path.dirname(shown) or "."
