"""The master's own log: one line for each transition, written so that a stalled reader never blocks the master."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Mapping
from typing import Literal

from handoff.output import Output

MAXIMUM_HELD_LINES = 500
MAXIMUM_LINE_BYTES = 64 * 1024


class MasterLog:
    """Writes to an fd, by default stderr, which it borrows. What cannot be written is dropped and counted."""

    def __init__(self, format: Literal["text", "json"] = "text", fd: int = 2) -> None:
        self._format = format
        self._output = Output(fd)
        self._held: list[bytes] | None = None
        self._is_muted = False
        self.dropped = 0

    # --- what is written --------------------------------------------------------------------------------------------

    def line(self, level: str, message: str, fields: Mapping[str, object] | None = None) -> None:
        if self._is_muted:
            return
        fields = fields or {}
        if self._format == "json":
            record = {"time": _now(), "level": level, "logger": "handoff", "message": message, **fields}
            text = json.dumps(record, default=str)
        else:
            extra = " ".join(f"{key}={value}" for key, value in fields.items() if value not in ("", None))
            text = f"{_now()} {level:<7} handoff {message}{' ' if extra else ''}{extra}"
        data = text.encode(errors="backslashreplace")[:MAXIMUM_LINE_BYTES] + b"\n"
        if self._held is not None and len(self._held) >= MAXIMUM_HELD_LINES:
            self.release()  # so many lines are worth more than brevity
        if self._held is not None:
            self._held.append(data)
        else:
            self._write(data)

    def info(self, message: str, **fields: object) -> None:
        self.line("info", message, fields)

    def warning(self, message: str, **fields: object) -> None:
        self.line("warning", message, fields)

    def failure(self, what: str, error: Exception) -> None:
        """A mistake of ours, with its frames, that was contained."""
        self.line("error", f"{what}: {''.join(traceback.format_exception(error)).strip()}")

    # --- holding back -----------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Keep lines back until `release` or `mute`: an operator's mistake deserves one line, not twenty."""
        self._held = []

    def release(self) -> None:
        held, self._held = self._held or [], None
        for data in held:
            self._write(data)

    def mute(self) -> None:
        """Throw away what was held back, and all that follows: the command itself says the one thing that matters."""
        self._held, self._is_muted = None, True

    # --- writing ----------------------------------------------------------------------------------------------------

    def _write(self, data: bytes) -> None:
        if not self._output.write(data):
            self.dropped += 1

    def close(self) -> None:
        self._output.close()


def _now() -> str:
    seconds = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(seconds)) + f".{int(seconds * 1000) % 1000:03d}"
