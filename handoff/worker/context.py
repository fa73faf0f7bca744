"""What a worker was given: who it is, and its listeners, which it can claim by name."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping

from handoff.core.messages import Boot
from handoff.errors import HandoffError


class Claims(Mapping[str, socket.socket]):
    """The inherited listeners by name. Looking one up claims it: who took it serves it."""

    def __init__(self, boot: Boot) -> None:
        self._sockets = {}
        for info in boot.listeners:
            os.set_inheritable(info.fd, False)
            self._sockets[info.name] = socket.socket(fileno=info.fd)
            self._sockets[info.name].setblocking(False)  # the kernel knows already; Python's object does not
        self.claimed: set[str] = set()

    def __getitem__(self, name: str) -> socket.socket:
        found = self._sockets[name]
        self.claimed.add(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._sockets)

    def __len__(self) -> int:
        return len(self._sockets)

    def __contains__(self, name: object) -> bool:
        return name in self._sockets

    def unclaimed(self) -> dict[str, socket.socket]:
        return {name: listener for name, listener in self._sockets.items() if name not in self.claimed}

    def close_unclaimed(self) -> tuple[str, ...]:
        """An inherited listener that nobody serves would only keep clients waiting. Returns the names."""
        names = tuple(self.unclaimed())
        for name in names:
            self._sockets.pop(name).close()
        return names


class _Current:
    """The one worker that this process is, for `handoff.listener`, which an application calls while it is imported."""

    claims: Mapping[str, socket.socket] | None = None


current = _Current()


def listener(name: str) -> socket.socket:
    """The listener that was bound as `--bind NAME=…`: listening, non-blocking, kept over reloads.

    The application serves it from now on; the server does not. Borrowed: do not close it (`shutdown` never).
    Raises HandoffError outside of a worker, or for a name that was not bound.
    """
    if current.claims is None:
        raise HandoffError(f"listener {name}: this process is no worker of `handoff run`")
    if name not in current.claims:
        known = ", ".join(current.claims) or "none"
        raise HandoffError(f"listener {name}: is not bound; bound are: {known}; add --bind {name}=HOST:PORT")
    return current.claims[name]
