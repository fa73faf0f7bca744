"""A chat whose clients stay connected through reloads: `nc 127.0.0.1 7000` from two terminals, then `handoff reload`.

The first line is one's name. Everybody in one worker hears everybody there, so run it with one.

handoff run main:main --chdir examples/chat --bind 127.0.0.1:7000 --workers 1
"""

from __future__ import annotations

import asyncio
import json
from typing import cast

import handoff

room: set[Chat] = set()


class Chat(handoff.Protocol):
    def __init__(self) -> None:
        self.name = ""
        self.begun = b""  # of a line whose end has not come yet

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        *lines, self.begun = (self.begun + data).split(b"\n")
        for line in lines:
            self.said(line.decode(errors="replace").strip())

    def said(self, line: str) -> None:
        if not self.name:
            self.name = line or "nobody"
            room.add(self)
            self.transport.write(f"hello {self.name}\n".encode())
            return
        for other in room:
            other.transport.write(f"{self.name}: {line}\n".encode())

    def connection_lost(self, error: Exception | None) -> None:
        room.discard(self)

    def detach(self) -> bytes:
        """At a drain, in the old worker: everything that the new one must know."""
        room.discard(self)
        return json.dumps({"name": self.name, "begun": self.begun.decode("latin-1")}).encode()

    def attach(self, state: bytes) -> None:
        """In the new worker, before any more data."""
        found = json.loads(state)
        self.name, self.begun = str(found["name"]), str(found["begun"]).encode("latin-1")
        if self.name:
            room.add(self)


async def main(worker: handoff.AsyncWorker) -> None:
    await worker.serve(Chat)
