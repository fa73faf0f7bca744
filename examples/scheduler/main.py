"""A web application and, beside its workers, one scheduler: a companion, of which there is never more than one.

handoff run main:app --chdir examples/scheduler --workers 2 --bind 127.0.0.1:8000

`handoff.toml` names the companion. A reload ends the old scheduler before it starts the new one; when it dies it is
started again, and the workers do not notice.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from handoff import Worker

TICKS = Path("ticks")
TICK_SECONDS = 0.2


def scheduler(worker: Worker) -> None:
    if not worker.ready():
        return
    number = ticks()
    while not worker.wait(TICK_SECONDS):
        number += 1
        new = TICKS.with_suffix(".new")
        new.write_text(str(number))
        os.replace(new, TICKS)


def ticks() -> int:
    return int(TICKS.read_text()) if TICKS.exists() else 0


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    assert scope["type"] == "http"
    body = "hello\n" if scope["path"] == "/" else f"{ticks()} ticks\n"
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body.encode()})
