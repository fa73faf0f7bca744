"""The sockets of the admin API: admin.sock in the runtime directory, and the listener `admin` where there is one."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from handoff.errors import HandoffError
from lb.control.admin import Admin, Door
from lb.control.peers import Credentials, PrivateListener
from lb.core.admin import SOCKET_NAME
from lb.core.model import Balancer
from lb.token_file import NEEDS_TOKEN, read_token

LISTENER = "admin"
MAXIMUM_CONNECTIONS = 256
END_SECONDS = 1.0
"""For answers that are being given when we end."""

_LOG = logging.getLogger("handoff.lb")


class AdminServer:
    """Owns admin.sock and all connections; borrows the listener."""

    def __init__(
        self, admin: Admin, balancer: Balancer, directory: Path, listeners: Mapping[str, socket.socket]
    ) -> None:
        """Raises HandoffError where the listener needs a token and there is none."""
        self._admin = admin
        self._path = directory / SOCKET_NAME
        self._public = listeners.get(LISTENER)
        token = read_token(balancer.admin_token_file)
        self._door = None if self._public is None else public_door(self._public, balancer.admin or "", token)
        self._private: PrivateListener | None = None
        self._servers: list[asyncio.AbstractServer] = []
        self._states: list[ServerState] = []

    async def open(self) -> None:
        """Raises OSError."""
        loop = asyncio.get_running_loop()
        self._private = PrivateListener(self._path)
        factory = self._factory(Door(is_private=True), _PrivateProtocol)
        self._servers.append(await loop.create_unix_server(factory, sock=self._private.socket))
        if self._public is not None and self._door is not None:
            factory = self._factory(self._door, H11Protocol)
            self._servers.append(await loop.create_server(factory, sock=self._public))

    async def close(self) -> None:
        """Requests that are being carried out get a moment."""
        self._admin.is_draining = True
        for server in self._servers:
            server.close()
        if self._private is not None:
            self._private.close()
        for state in self._states:
            for connection in list(state.connections):
                connection.shutdown()
        tasks = [task for state in self._states for task in state.tasks]
        if tasks:
            await asyncio.wait(tasks, timeout=END_SECONDS)
        for state in self._states:
            for connection in list(state.connections):
                transport = getattr(connection, "transport", None)
                if transport is not None:
                    transport.abort()

    def _factory(self, door: Door, protocol: type[H11Protocol]) -> Callable[[], asyncio.Protocol]:
        config = Config(
            self._admin.behind(door),
            interface="asgi3",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            ws="none",
            limit_concurrency=MAXIMUM_CONNECTIONS,
            workers=1,  # else it looks at WEB_CONCURRENCY by itself
            timeout_keep_alive=30,
        )
        config.load()
        state = ServerState()
        self._states.append(state)
        return lambda: protocol(config=config, server_state=state, app_state={})


class _PrivateProtocol(H11Protocol):
    """For our own user, and root."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        try:
            credentials = Credentials(transport.get_extra_info("socket"))
        except OSError:  # it is gone already
            transport.abort()
            return
        if not credentials.is_ours:
            _LOG.warning("admin.sock: refused process %d of user %d", credentials.pid, credentials.uid)
            transport.abort()


def public_door(listener: socket.socket, configured: str, token: str | None) -> Door:
    """Raises HandoffError where anybody could reach it, and no token is asked for."""
    if listener.family == socket.AF_UNIX:
        is_loopback = True  # the mode of its path says who may
    else:
        is_loopback = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback
    if not is_loopback and token is None:
        raise HandoffError(f"admin {configured}: {NEEDS_TOKEN}")
    host = configured.rpartition(":")[0].strip("[]")
    return Door(is_private=False, is_loopback=is_loopback, host=host, token=token)
