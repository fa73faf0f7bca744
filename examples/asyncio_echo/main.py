"""A protocol of one's own on asyncio: `serve` says ready, accepts after the commit, and drains under the deadline.

handoff run main:main --chdir examples/asyncio_echo --bind 127.0.0.1:7000
"""

from __future__ import annotations

import asyncio
from typing import cast

from handoff import AsyncWorker


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


async def main(worker: AsyncWorker) -> None:
    await worker.serve(Echo)
