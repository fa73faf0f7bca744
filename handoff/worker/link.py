"""The worker's end of the channel: what the master wants, as facts that anybody in the worker can look at."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable

from handoff.channel import Channel, ChannelBroken, ChannelClosed
from handoff.core.messages import (
    PROTOCOL,
    AlsoAccept,
    Boot,
    Closed,
    Drain,
    Hello,
    Holds,
    Leaving,
    MasterMessage,
    Message,
    Open,
    Receivers,
    Report,
)
from handoff.version import __version__


class Link:
    """Facts: `is_open` (the generation is live: accept), `drain_deadline` (monotonic; None while serving), `moves`
    (a drain may hand connections over).

    `on_change` is called after a message changed one of them; `on_report` makes the answer to a status request;
    `on_receivers` takes a list of receivers, `on_also_accept` sockets of other slots; they own the fds.
    Owns the channel.
    """

    def __init__(self, channel: Channel[MasterMessage]) -> None:
        self._channel = channel
        self.is_open = False
        self.is_orphan = False
        self.drain_deadline: float | None = None
        self.orphan_drain_seconds = 0.0
        self.moves = True
        self._is_closed = False
        self.ending_listeners: tuple[str, ...] = ()
        """Nobody accepts from these after us."""
        self.on_change: Callable[[], None] = lambda: None
        self.on_receivers: Callable[[Receivers, list[int]], None] = _close_all
        self.on_also_accept: Callable[[AlsoAccept, list[int]], None] = _close_all
        self.on_report: Callable[[int], Holds] = lambda request: Holds(request=request, total=0, holds=())

    def fileno(self) -> int:
        return self._channel.fileno()

    @property
    def is_draining(self) -> bool:
        return self.drain_deadline is not None

    def send(self, message: Message) -> None:
        """A master that is gone hears nothing; `read` will notice that."""
        with contextlib.suppress(OSError):
            self._channel.send(message)

    def greet(self) -> Boot:
        """Say hello and wait for the boot message. Ends the process when the master goes away meanwhile."""
        self.send(Hello(protocol=PROTOCOL, release=__version__))
        poll = select.poll()  # select() takes no number above 1023, and the master's numbers are ours
        poll.register(self._channel, select.POLLIN)
        while True:
            poll.poll()
            try:
                message, _ = self._channel.receive()
            except BlockingIOError:
                continue
            except ChannelClosed:
                raise SystemExit(0) from None
            assert isinstance(message, Boot), f"expected boot, got {message}"
            self.orphan_drain_seconds = message.settings.drain_timeout_seconds
            return message

    def read(self) -> None:
        """Take every message that is there. Never waits."""
        changed = False
        while not self.is_orphan:
            try:
                message, fds = self._channel.receive()
            except BlockingIOError:
                break
            except (ChannelClosed, ChannelBroken, OSError):
                self._orphaned()
                changed = True
                break
            if isinstance(message, Receivers):
                self.on_receivers(message, fds)
                changed = True
                continue
            if isinstance(message, AlsoAccept):
                self.on_also_accept(message, fds)
                continue
            for fd in fds:
                os.close(fd)
            changed = self._take(message) or changed
        if changed:
            self.on_change()

    def _take(self, message: Boot | Open | Drain | Report) -> bool:
        match message:
            case Open():
                self.is_open = True
            case Drain():
                # A second message may shorten the drain, or say that nothing moves; who is queued is still let in.
                self.ending_listeners = tuple(dict.fromkeys((*self.ending_listeners, *message.ending)))
                self.moves = message.moves
                self.drain(message.seconds)
            case Report():
                self.send(self.on_report(message.request))
                return False
            case Boot():
                return False
        return True

    def _orphaned(self) -> None:
        """The master is dead, and nobody can adopt us yet: make room for a new one, but lose nothing."""
        self.is_orphan, self.moves = True, False
        self.drain(self.orphan_drain_seconds)

    def drain(self, seconds: float) -> None:
        """Begin a drain, or shorten it; it never turns back and its deadline never moves later."""
        deadline = time.monotonic() + seconds
        if self.drain_deadline is None or deadline < self.drain_deadline:
            self.drain_deadline = deadline

    def closed(self) -> None:
        """Tell that nobody is accepted any more."""
        if not self._is_closed:
            self._is_closed = True
            self.send(Closed())

    def leave(self, reason: str, seconds: float) -> None:
        """Drain because of something that the master did not ask for, and tell it."""
        if self.drain_deadline is None:
            self.send(Leaving(reason=reason))
            self.drain(seconds)
            self.on_change()


def _close_all(_message: Message, fds: list[int]) -> None:
    """Of a program that hands nothing over, or has its own sockets only."""
    for fd in fds:
        os.close(fd)
