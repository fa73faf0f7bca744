"""Connections that begin with a header of the PROXY protocol: accepted, and read up to its end, before HTTP or TLS.

The header is taken from the raw socket, and not a byte more: what follows is for whoever reads next.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Sequence
from typing import NamedTuple

from handoff.core.proxy_protocol import V2_MAXIMUM_BYTES, Absent, Address, Header, Incomplete, ProxyError, read_header

HEADER_SECONDS = 5.0
"""How long a proxy may take for its header."""
UNIX = "unix"
LOCAL = ("127.0.0.0/8", "::1/128", UNIX)
"""Where no sources are given."""

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Rules:
    """Whose header is believed, and whether there must be one."""

    def __init__(self, mode: str, sources: Sequence[str]) -> None:
        """`sources`: networks, and `unix` for peers on a unix socket."""
        self.is_required = mode == "require"
        sources = sources or LOCAL
        self._takes_unix = UNIX in sources
        self._networks: list[_Network] = [ipaddress.ip_network(one, strict=False) for one in sources if one != UNIX]

    def trusts(self, connection: socket.socket) -> bool:
        """Raises OSError where the peer has gone already."""
        return self.trusts_peer(connection.getpeername())

    def trusts_peer(self, peer: object) -> bool:
        """`peer`: as accept() tells it, also of one that was reset meanwhile."""
        if not isinstance(peer, tuple):
            return self._takes_unix
        address = ipaddress.ip_address(peer[0].partition("%")[0])
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return any((mapped or address) in network for network in self._networks)


class Beginning(NamedTuple):
    """`client`: as the header says; None: the connection's own. `data`: what was read and is no header."""

    client: Address | None = None
    data: bytes = b""


async def read_beginning(connection: socket.socket, rules: Rules | None) -> Beginning:
    """Take the header from a connection, which is borrowed. Without rules there is none.

    Raises ProxyError for a peer that may not, or does not, send a good one; EOFError for one that sent nothing at
    all; TimeoutError; OSError.
    """
    if rules is None:
        return Beginning()
    if not rules.trusts(connection):
        if rules.is_required:
            raise ProxyError("is none of --proxy-from")
        return Beginning()
    taken = bytearray()
    try:
        async with asyncio.timeout(HEADER_SECONDS):
            return await _read(connection, rules, taken)
    except TimeoutError:
        if rules.is_required:
            raise
        return Beginning(data=bytes(taken))  # a client that takes its time for its first request


async def _read(connection: socket.socket, rules: Rules, taken: bytearray) -> Beginning:
    """`taken`: grows by what is taken from the connection."""
    while True:
        peeked = await _peek(connection)
        if not peeked:
            if taken and rules.is_required:
                raise ProxyError("ended within its PROXY header")
            if taken:
                return Beginning(data=bytes(taken))
            raise EOFError
        match read_header(bytes(taken) + peeked):
            case Incomplete():  # all of it belongs to the header: taken, or it would wake us again and again
                taken += connection.recv(len(peeked))
            case Absent() if rules.is_required:
                raise ProxyError("sent no PROXY header")
            case Absent():
                return Beginning(data=bytes(taken))
            case Header() as header:
                connection.recv(header.size_bytes - len(taken))
                return Beginning(header.source)


async def _peek(connection: socket.socket) -> bytes:
    """What has arrived, left where it is; waits for the first byte."""
    while True:
        try:
            return connection.recv(V2_MAXIMUM_BYTES, socket.MSG_PEEK)
        except BlockingIOError:
            await _until_readable(connection)


async def _until_readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(connection.fileno(), readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(connection.fileno())


def log_bad_beginning(connection: socket.socket, error: Exception) -> None:
    """One line with the peer; none for one that said nothing, as a health check does, or that went away."""
    if isinstance(error, TimeoutError):
        reason = f"sent no whole PROXY header within {HEADER_SECONDS:g} s"
    elif isinstance(error, ProxyError):
        reason = str(error)
    else:
        return
    peer = "a peer on a unix socket"
    if connection.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):
            peer = connection.getpeername()[0]
    logging.getLogger("uvicorn.error").warning("proxy-protocol: %s %s; the connection is closed", peer, reason)
