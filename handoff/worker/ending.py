"""The last response of a connection that ends here: announced, complete, and followed by a gentle close."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

if TYPE_CHECKING:
    from handoff.worker.protocol import HTTPProtocol


class LastCycle(RequestResponseCycle):
    """A response while its connection drains: the last one says `Connection: close` and ends the connection.

    Which one is the last is decided when it starts to be sent: pipelined requests that are there are answered first.
    """

    protocol: HTTPProtocol
    wants_keep_alive: bool
    is_last: bool | None

    @staticmethod
    def make(cycle: RequestResponseCycle, protocol: HTTPProtocol) -> None:
        """Turn a cycle into one of these, or, where its head is sent already, let the idle connection linger after."""
        if isinstance(cycle, LastCycle) or cycle.response_complete:
            return
        if cycle.response_started:
            cycle.on_response = _Unannounced(protocol)
            return
        wants_keep_alive = cycle.__dict__.pop("keep_alive")
        cycle.__class__ = LastCycle
        assert isinstance(cycle, LastCycle)
        cycle.protocol, cycle.is_last, cycle.wants_keep_alive = protocol, None, wants_keep_alive
        cycle.transport = _GentleTransport(protocol)  # type: ignore[assignment]

    @property
    def keep_alive(self) -> bool:
        if self.is_last is None and self.response_started:
            self.is_last = not self.protocol.pipeline
        return self.wants_keep_alive and not self.is_last

    @keep_alive.setter
    def keep_alive(self, value: bool) -> None:
        self.wants_keep_alive = value


class _Unannounced:
    """After a response that could not announce the end any more."""

    def __init__(self, protocol: HTTPProtocol) -> None:
        self._protocol = protocol

    def __call__(self) -> None:
        self._protocol.on_response_complete()
        if not self._protocol.pipeline and not self._protocol.transport.is_closing():
            self._protocol.linger()


class _GentleTransport:
    """Stands in for the transport of a response that may end its connection: closing it half-closes first."""

    def __init__(self, protocol: HTTPProtocol) -> None:
        self.write = protocol.transport.write
        self.is_closing = protocol.transport.is_closing
        self.close = protocol.close_gently


class Discard(asyncio.Protocol):
    """Takes and drops what a client still sends after our FIN; the connection's end reaches the real protocol."""

    def __init__(self, protocol: HTTPProtocol) -> None:
        self.connection_lost = protocol.connection_lost  # type: ignore[method-assign]
        self.pause_writing = protocol.pause_writing  # type: ignore[method-assign]
        self.resume_writing = protocol.resume_writing  # type: ignore[method-assign]
