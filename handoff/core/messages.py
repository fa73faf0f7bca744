"""What master and worker say to each other: one datagram is one of these, as JSON, plus the fds it declares.

The first datagram is the worker's Hello; it carries the protocol's version, and the master answers in that version.
"""

from __future__ import annotations

import msgspec

from handoff.settings import Settings, TLSFiles

PROTOCOL = 1
SERVED_PROTOCOLS = frozenset({1})
"""A master serves its own version and the one before."""
MAXIMUM_INLINE_BYTES = 64 * 1024
"""A longer message travels in a memfd."""
MAXIMUM_MESSAGE_BYTES = 16 * 1024 * 1024
MAXIMUM_TEXT = 16 * 1024
"""Reasons and tracebacks are cut to this many characters, at the end that says least."""
MAXIMUM_HOLDS = 200
"""How many connections one report of a drain lists."""


class Message(msgspec.Struct, frozen=True, tag_field="type", kw_only=True):
    """`fds`: how many file descriptors come with the datagram. Any other count closes the peer."""

    fds: int = 0


# --- worker to master -----------------------------------------------------------------------------------------------


class Hello(Message, frozen=True, tag="hello"):
    protocol: int
    release: str
    """The version of handoff that the worker runs."""


class Progress(Message, frozen=True, tag="progress"):
    step: str


class Ready(Message, frozen=True, tag="ready"):
    """The application is loaded, warmed up and checked; nothing is accepted yet."""

    interface: str
    unserved: tuple[str, ...] = ()
    """Names of listeners that the application does not serve."""
    adopts: tuple[str, ...] = ()
    """Kinds of live connections that it can take over (handoff.core.moves)."""


class Opened(Message, frozen=True, tag="opened"):
    """Connections are accepted from now on."""


class Closed(Message, frozen=True, tag="closed"):
    """Of a drain: no connection is accepted here any more (a program that accepts by itself: it was told)."""


class Leaving(Message, frozen=True, tag="leaving"):
    reason: str


class Failed(Message, frozen=True, tag="failed"):
    """The boot failed; the process ends right after."""

    reason: str
    traceback: str = ""


class Hold(msgspec.Struct, frozen=True):
    """One thing that keeps a drain from ending."""

    kind: str
    """request, websocket, connection or task."""
    peer: str
    path: str
    age_seconds: float


class Holds(Message, frozen=True, tag="holds"):
    request: int
    total: int
    holds: tuple[Hold, ...]


# --- master to worker -----------------------------------------------------------------------------------------------


class ListenerInfo(msgspec.Struct, frozen=True):
    """A listener that the worker inherited under the number `fd`."""

    name: str
    address: str
    fd: int


class Boot(Message, frozen=True, tag="boot"):
    generation: int
    label: str
    slot: int
    worker: int
    settings: Settings
    listeners: tuple[ListenerInfo, ...]
    counters_fd: int
    counters_row: int
    mailbox_fd: int
    """The reading end of its slot's mailbox, inherited."""
    measures: bool = False
    """Count requests by status and duration."""
    tls: TLSFiles | None = None


class Open(Message, frozen=True, tag="open"):
    pass


class Drain(Message, frozen=True, tag="drain"):
    """Take nothing new, and finish what exists within so many seconds."""

    seconds: float
    ending: tuple[str, ...] = ()
    """Names of listeners that nobody accepts from after this drain: who is queued there is still let in."""
    moves: bool = False
    """Connections may move to receivers, who are told of in a message of their own, now or later."""


class ReceiverInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that connections may be handed over to. `mailbox` is the number of its mailbox."""

    mailbox: int
    row: int
    """Its row in the page of counters."""
    adopts: tuple[str, ...]
    is_new: bool
    """The writing end of the mailbox comes with this message; otherwise it came with an earlier one."""


class Receivers(Message, frozen=True, tag="receivers"):
    """All of them: who is not in the list any more is not to be sent anything."""

    receivers: tuple[ReceiverInfo, ...]


class SlotSocket(msgspec.Struct, frozen=True):
    """The socket of a slot that nobody serves."""

    name: str
    """Of the listener."""
    slot: int
    is_new: bool
    """It comes with this message; otherwise it came with an earlier one."""


class AlsoAccept(Message, frozen=True, tag="also-accept"):
    """All sockets that the worker is to accept from beside its own; those not in the list any more, no longer."""

    sockets: tuple[SlotSocket, ...]


class Report(Message, frozen=True, tag="report"):
    """Asks for a Holds with the same number."""

    request: int


WorkerMessage = Hello | Progress | Ready | Opened | Closed | Leaving | Failed | Holds
MasterMessage = Boot | Open | Drain | Receivers | AlsoAccept | Report


class InMemfd(Message, frozen=True, tag="in-memfd"):
    """The message itself is in the memfd that comes with this, `size` bytes long. Its own fds follow."""

    size: int


def cut(text: str, limit: int = MAXIMUM_TEXT) -> str:
    """The last `limit` characters: a traceback says most at its end."""
    return text if len(text) <= limit else "…" + text[1 - limit :]
