"""The overrides on the disk. Where it is full, or cannot be written, they hold in memory, and it is tried again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from pathlib import Path

import msgspec

from lb.control.files import read_decoded, write_atomically
from lb.control.stored import OVERRIDES_NAME, decode_overrides
from lb.core.overrides import Overrides

FIRST_RETRY_SECONDS = 1.0
LAST_RETRY_SECONDS = 60.0

_LOG = logging.getLogger("handoff.lb")


class Store:
    """Owns the file. Few and small writes, by people: they are made in place, on the loop."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._path = directory / OVERRIDES_NAME
        self._unsaved: Overrides | None = None
        self._problem: str | None = None
        self._has_problem = asyncio.Event()

    def load(self) -> Overrides:
        """Empty where there are none. One that cannot be used is kept beside, as NAME.bad."""
        found = read_decoded(self._path, decode_overrides)
        if found is None and self._path.exists():
            with contextlib.suppress(OSError):
                os.replace(self._path, f"{self._path}.bad")
        return found or Overrides()

    @property
    def problem(self) -> str | None:
        """Why the latest is not on the disk; None: it is."""
        return self._problem

    def save(self, overrides: Overrides) -> None:
        """Try to; `problem` says how that went."""
        self._unsaved = overrides
        if not self._try():
            self._has_problem.set()

    async def keep_trying(self) -> None:
        """Runs until it is cancelled."""
        while True:
            await self._has_problem.wait()
            self._has_problem.clear()
            await self.until_saved()

    async def until_saved(self) -> None:
        """Try again and again, more and more rarely."""
        delay = FIRST_RETRY_SECONDS
        while self._unsaved is not None:
            await asyncio.sleep(delay)
            delay = min(delay * 2, LAST_RETRY_SECONDS)
            self._try()

    def _try(self) -> bool:
        if self._unsaved is None:
            return True
        try:
            self._make_directory()
            write_atomically(self._path, msgspec.json.encode(self._unsaved), is_durable=True)
        except OSError as error:
            problem = f"{self._path}: {error.strerror}"
            if problem != self._problem:
                _LOG.error("changes are not durable: %s", problem)
            self._problem = problem
            return False
        self._unsaved = None
        if self._problem is not None:
            _LOG.info("changes are durable again: %s", self._path)
        self._problem = None
        return True

    def _make_directory(self) -> None:
        if not self.directory.is_dir():
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            self.directory.mkdir(mode=0o700, exist_ok=True)
