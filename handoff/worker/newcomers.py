"""Connections between their accept and HTTP: a header of the PROXY protocol is due, or a handshake of TLS."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass

from handoff.core.messages import Hold
from handoff.core.moves import HTTPState
from handoff.core.proxy_protocol import ProxyError
from handoff.worker.proxied import Beginning, Rules, log_bad_beginning, read_beginning
from handoff.worker.state import address

Serve = Callable[[tuple[HTTPState, bytes] | None], asyncio.Protocol]
"""Makes the protocol of a connection, with what is known of it and was read of it already."""


@dataclass(slots=True)
class _Newcomer:
    peer: str
    since: float
    waits_for: str


class Newcomers:
    """Those of one worker. A drain waits for them, and is told of them."""

    def __init__(self, rules: Rules | None, tls: ssl.SSLContext | None, serve: Serve) -> None:
        self._rules = rules
        self._tls = tls
        self._serve = serve
        self._waiting: dict[socket.socket, _Newcomer] = {}

    @property
    def are_due(self) -> bool:
        """There is something to be waited for at all."""
        return self._rules is not None or self._tls is not None

    def holds(self, now: float) -> list[Hold]:
        return [Hold("connection", one.peer, one.waits_for, now - one.since) for one in self._waiting.values()]

    async def begin(self, connection: socket.socket) -> None:
        """Take what is due from a connection that was accepted just now, and is ours; then serve it."""
        now = asyncio.get_running_loop().time()
        newcomer = self._waiting[connection] = _Newcomer(_peer(connection), now, "no PROXY header yet")
        try:
            await self._begin(connection, newcomer)
        finally:
            del self._waiting[connection]

    async def _begin(self, connection: socket.socket, newcomer: _Newcomer) -> None:
        try:
            client, data = await self._read(connection)
        except (ProxyError, TimeoutError, EOFError, OSError) as error:
            log_bad_beginning(connection, error)
            connection.close()
            return
        except BaseException:
            connection.close()
            raise
        if client is not None:
            newcomer.peer = address(client)
        newcomer.waits_for = "no TLS handshake yet"
        known = None
        if client is not None or data:
            known = HTTPState(client=client, scheme="http" if self._tls is None else "https"), data
        protocol = self._serve(known)
        with contextlib.suppress(OSError):  # it went away, or TLS could not be agreed on: nobody was served yet
            await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, connection, ssl=self._tls)

    async def _read(self, connection: socket.socket) -> Beginning:
        beginning = await read_beginning(connection, self._rules)
        if beginning.data and self._tls is not None:
            # What came in the clear must not count as the first bytes of what TLS protects.
            raise ProxyError("sent neither a PROXY header nor TLS")
        return beginning


def _peer(connection: socket.socket) -> str:
    if connection.family == socket.AF_UNIX:
        return address(None)
    try:
        return address(connection.getpeername()[:2])
    except OSError:  # reset already
        return "gone"
