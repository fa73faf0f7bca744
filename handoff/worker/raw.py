"""Connections of a program's own protocol that move: `handoff.Protocol`."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from handoff.core.moves import RAW, RawState
from handoff.worker.mover import Mover


class Protocol(asyncio.Protocol):
    """An asyncio protocol whose connection can move to another worker. For `AsyncWorker.serve`.

    At a drain, and where a sibling has fewer connections, `detach` is asked for the connection's state: at once, and
    again after whatever happens on it. The worker that takes over makes a protocol of its own, and calls
    `connection_made`, then `attach` with that state, and only then `data_received`.
    """

    _connection: RawConnection | None = None

    def detach(self) -> bytes | None:
        """The state of the connection, at most 16 MiB, to let it move; None: not now.

        Everything that was written has left this process. After a state was returned nothing is received any more, and
        nothing may be written. `connection_lost(None)` follows, or, where the connection could not move after all,
        `attach` with the same state. Raising keeps the connection here.
        """
        return None

    def attach(self, state: bytes) -> None:
        """Go on where another worker stopped; `state` is what its `detach` returned. Data, from a peer: check it.

        Raising closes the connection, which is counted as refused.
        """

    def quiet(self) -> None:
        """Ask to be asked: `detach` would return a state now. Of no effect while the connection is not to move."""
        if self._connection is not None:
            asyncio.get_running_loop().call_soon(self._connection.try_move)


def makes_movable(factory: Callable[[], Any]) -> bool:
    """The factory is a subclass of Protocol, or a partial of one."""
    made = factory.func if isinstance(factory, functools.partial) else factory
    return isinstance(made, type) and issubclass(made, Protocol)


class RawConnection:
    """One connection that may move. Borrows the protocol and its transport."""

    kind = RAW

    def __init__(self, protocol: Protocol, transport: asyncio.Transport, listener: str, mover: Mover) -> None:
        self._protocol: Any = protocol
        self._transport = transport
        self._listener = listener
        self._mover = mover
        self._client = transport.get_extra_info("peername")
        self._state: bytes | None = None
        self._mailbox: int | None = None
        self._is_leaving = False
        self._is_watched = False
        self._stays = False
        """It cannot move: its state fits no letter."""
        self._is_ours_to_resume = False
        """Reading was paused here, and not by the protocol."""
        self._limits: tuple[int, int] | None = None
        """Of the write buffer, as the protocol has them."""
        self._has_failed = False
        """Its `detach` has raised, and that was logged."""

    def begin_move(self, mailbox: int | None = None) -> None:
        """As soon as the protocol lets it; `mailbox`: to this receiver rather than to any."""
        if self._is_leaving or self._stays or not self._is_plain:
            return
        self._is_leaving, self._mailbox = True, mailbox
        if self._is_watched:
            self.try_move()
            return
        self._is_watched = True
        protocol = self._protocol
        received, resumed = protocol.data_received, protocol.resume_writing

        def data_received(data: bytes) -> None:
            received(data)
            self.try_move()

        def resume_writing() -> None:
            resumed()
            self.try_move()

        protocol.data_received, protocol.resume_writing = data_received, resume_writing
        protocol._connection = self
        self._transport.set_protocol(protocol)  # uvloop keeps the bound methods
        self.try_move()

    @property
    def _is_plain(self) -> bool:
        """The protocol talks to the socket itself; the state of TLS that it has begun would lie in this process."""
        return self._transport.get_protocol() is self._protocol

    def try_move(self) -> None:
        """When everything is written, ask the protocol; reading stops first, so that nothing comes in between."""
        if self._state is not None or not self._is_leaving or self._transport.is_closing() or not self._is_plain:
            return
        if self._transport.is_reading():
            self._transport.pause_reading()
            self._is_ours_to_resume = True
        if self._transport.get_write_buffer_size():
            if self._limits is None:
                self._limits = self._transport.get_write_buffer_limits()
            self._transport.set_write_buffer_limits(high=0)  # so that resume_writing says when it is empty
            return
        try:
            self._state = _checked(self._protocol.detach())
        except Exception:
            if not self._has_failed:
                self._has_failed = True
                logging.getLogger("handoff").exception("detach failed; the connection stays")
        if self._state is None:
            self._resume()
        else:
            self._mover.post(self, self._mailbox)

    def cancel_move(self) -> None:
        """The connection stays: the protocol goes on with its own state."""
        if not self._go_on():
            self._mover.count_refused()

    def _go_on(self) -> bool:
        """False: the protocol does not take its state back, and the connection is closed."""
        state, self._state = self._state, None
        was_leaving, self._is_leaving = self._is_leaving, False
        if not was_leaving or self._transport.is_closing():
            return True
        if self._limits is not None:
            low, high = self._limits
            self._transport.set_write_buffer_limits(high=high, low=low)
            self._limits = None
        try:
            if state is not None:
                self._protocol.attach(state)
        except Exception:
            logging.getLogger("handoff").exception("attach failed; the connection is closed")
            self._transport.abort()
            return False
        self._resume()
        return True

    def _resume(self) -> None:
        if self._is_ours_to_resume:
            self._is_ours_to_resume = False
            self._transport.resume_reading()

    # --- what the mover asks ----------------------------------------------------------------------------------------

    def letter(self) -> tuple[RawState, bytes, Sequence[int]] | None:
        if self._state is None or self._transport.is_closing():
            return None
        client = tuple(self._client[:2]) if isinstance(self._client, tuple) else None
        state = RawState(client=client, listener=self._listener)
        return state, self._state, (self._transport.get_extra_info("socket").fileno(),)

    def waits(self) -> None:
        """Reading is paused already."""

    def moved(self) -> None:
        self._transport.abort()

    def refused(self) -> None:
        """It is served here until it ends, or the drain does. The mover has counted it."""
        self._stays = True
        self._go_on()


def _checked(state: object) -> bytes | None:
    """Raises TypeError where it is no state."""
    return state if state is None or isinstance(state, bytes) else bytes(memoryview(state))  # type: ignore[arg-type]
