"""The listeners of a service: which generation holds which, reused over reloads, closed by their one owner."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Collection, Sequence

from handoff.addresses import Bind, listener_names
from handoff.binding import WILDCARDS, Listener, bind_listener, fd_listener
from handoff.errors import HandoffError, UsageError
from handoff.inherited import InheritedSocket


class ListenerSet:
    """All listeners of a master, and which generations hold them. Owns every one of them.

    A listener lives as long as a generation holds it; inherited ones live on, since nobody could bind them again.
    """

    def __init__(self) -> None:
        self._open: dict[str, Listener] = {}
        self._held: dict[int, dict[str, str]] = {}  # generation → name → identity
        self._is_started = False

    def adopt_inherited(self, sockets: Sequence[InheritedSocket]) -> None:
        """Take ownership of the sockets that the parent passed; UsageError, and none taken, if one does not listen."""
        with contextlib.ExitStack() as undo:
            adopted = {}
            for inherited in sockets:
                bind = Bind(name=inherited.name, kind="fd", fd=inherited.fd)
                listener = fd_listener(bind, inherited.name, inherited.fd)
                undo.callback(listener.socket.detach)
                adopted[_identity(bind, inherited.name)] = listener
            undo.pop_all()
        self._open.update(adopted)

    def acquire(
        self, generation: int, binds: Sequence[Bind], backlog: int, per_slot: Collection[str] = ()
    ) -> dict[str, Listener]:
        """The listeners for `binds` by name, bound now or already open; borrowed until `release(generation)`.

        All or nothing: if one cannot be had, those newly bound are closed again, the others were not touched, and
        the HandoffError of that one goes to the caller. The path of a unix socket must be absolute. `per_slot`: names
        of those that get a socket for each slot, where they are bound now and are TCP.
        """
        assert generation not in self._held, f"generation {generation} holds listeners already"
        listeners: dict[str, Listener] = {}
        fresh: dict[str, Listener] = {}
        held: dict[str, str] = {}
        with contextlib.ExitStack() as undo:
            for name, bind in zip(listener_names(binds), binds, strict=True):
                identity = _identity(bind, name)
                listener = self._open.get(identity) or fresh.get(identity)
                if listener is None:
                    others = [*self._open.values(), *fresh.values()]
                    listener = self._bind(bind, name, backlog, others, name in per_slot)
                    undo.callback(listener.close)
                    fresh[identity] = listener
                listeners[name] = listener
                held[name] = identity
            for (name, listener), bind in zip(listeners.items(), binds, strict=True):
                _update(listener, name, bind, backlog)
            undo.pop_all()
        self._open.update(fresh)
        self._held[generation] = held
        self._is_started = True
        return listeners

    def release(self, generation: int) -> None:
        """Let go of a generation's listeners, and close those that no other generation holds. May be called again."""
        held = self._held.pop(generation, {})
        still_held = self._held_identities()
        for identity in set(held.values()) - still_held:
            if not self._open[identity].is_inherited:
                self._open.pop(identity).close()

    def close_unclaimed(self) -> list[str]:
        """Close the inherited sockets that no generation holds, and return their names.

        To be called when the first generation is ready: connections to a socket that nobody accepts from would hang.
        """
        unclaimed = [self._open.pop(identity) for identity in sorted(self._open.keys() - self._held_identities())]
        for listener in unclaimed:
            listener.close()
        return [listener.name for listener in unclaimed]

    def addresses(self, generation: int | None = None) -> dict[str, str]:
        """The bound addresses by name, of one generation, or of the newest that holds any."""
        if generation is None:
            generation = max(self._held, default=0)
        return {name: self._open[identity].address for name, identity in self._held.get(generation, {}).items()}

    def close_all(self) -> None:
        """Close every listener, inherited ones too."""
        self._held.clear()
        while self._open:
            self._open.popitem()[1].close()

    def _held_identities(self) -> set[str]:
        return {identity for held in self._held.values() for identity in held.values()}

    def _bind(self, bind: Bind, name: str, backlog: int, others: Sequence[Listener], is_per_slot: bool) -> Listener:
        if bind.kind == "fd" and self._is_started:
            # By now that number may be any file of our own.
            raise UsageError(f"bind {bind}: was not passed when the service started; restart the service with it")
        try:
            return bind_listener(bind, name, backlog, is_per_slot)
        except HandoffError as error:
            own = next((other for other in others if _overlaps(bind, other)), None)
            if own is None or not isinstance(error.__cause__, OSError) or error.__cause__.errno != errno.EADDRINUSE:
                raise
            raise HandoffError(
                f"listener {name}: {bind} overlaps with {own.address} of listener {own.name} of this service;"
                " choose another port or restart the service"
            ) from error


def _identity(bind: Bind, name: str) -> str:
    # Port 0 is another port for each listener: there the name tells them apart.
    return f"{bind.key}={name}" if bind.is_any_port else bind.key


def _overlaps(bind: Bind, listener: Listener) -> bool:
    """Whether a bind cannot be had beside the listener: the same port, and one of the two takes every address."""
    kind = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}.get(bind.kind)
    if kind is not listener.socket.type or listener.socket.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    host, port = listener.socket.getsockname()[:2]
    is_same_family = (":" in bind.host) == (":" in host)
    return is_same_family and port == bind.port and (bind.host == host or {bind.host, host} & WILDCARDS != set())


def _update(listener: Listener, name: str, bind: Bind, backlog: int) -> None:
    """Bring a listener, whether reused or new, to what the newest generation asks for."""
    listener.name = name
    if listener.backlog != backlog:
        listener.listen(backlog)
    if bind.mode != listener.bind.mode:
        listener.set_mode(bind.mode)
    listener.bind = bind
