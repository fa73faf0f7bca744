"""Connections move: out of a relay worker that drains, or has more than its share, and into another one.

Between two turns of the loop every connection is quiet: what was read is delivered, or lies in a buffer or a pipe that
moves along. So everything moves at once, whatever goes on in it.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Collection, Iterator

import msgspec

from handoff import Worker
from handoff.errors import HandoffError
from lb.relay.attempt import Attempt
from lb.relay.engine import Engine
from lb.relay.letters import AttemptLetter, BadLetter, RelayLetter, decode, encode, plain_socket
from lb.relay.loop import Loop
from lb.relay.relay import Relay
from lb.relay.targets import Target

LETTERS_PER_TURN = 64
RETRY_SECONDS = 0.02
BALANCE_SECONDS = 0.2
UNCOUNTED_SECONDS = 10.0
"""So long, at most, who was handed over and is counted nowhere else is counted here, or too many would be let in to a
backend: for receivers that stand still. Those that are gone are no receivers."""

_LOG = logging.getLogger("handoff.lb")


class Moving:
    """Of one relay worker."""

    def __init__(
        self,
        worker: Worker,
        engine: Engine,
        loop: Loop,
        service_at: Callable[[socket.socket], str | None],
        on_read: Callable[[], None] = lambda: None,
    ) -> None:
        """`service_at`: the one whose listener a client came by. `on_read` is called when what the master says was read
        here, and nobody is woken for it."""
        self._worker, self._engine, self._loop = worker, engine, loop
        self._service_at = service_at
        self._on_read = on_read
        self._is_balancing = False
        self._shown: int | None = None
        """Connections here, as the others know them; None: to be told, even if there are as many as before."""
        self._sent: list[Target] = []
        """Backends of connections that nobody else counts yet, one for each."""
        self._uncount_at = 0.0
        self._stuck: set[Relay] = set()
        """What a letter cannot hold: it ends here."""

    @property
    def is_settled(self) -> bool:
        """Everything that was handed over is counted by who has it now."""
        return not self._sent

    def show(self) -> None:
        """Tell the others how many connections are here."""
        connections = self._engine.connections
        if connections != self._shown:
            self._shown = self._worker.connections = connections

    def may_balance(self) -> None:
        """Begin with it if it is of use: there may be siblings now, or no fds for what comes. Who is alone sleeps: each
        look is a tenth of a millisecond in which nobody is served."""
        if not self._is_balancing:
            self._balance()

    # --- out --------------------------------------------------------------------------------------------------------

    def hand_over_some(self, staying: Collection[str]) -> bool:
        """Of a drain. True: there is more, and room for it. Clients of the services `staying` have no backend yet and
        will have none in the next generation: they wait for it here."""
        self._uncount()
        if not self._worker.can_hand_over:
            return False
        budget = LETTERS_PER_TURN
        for one in self._all(staying):
            if not budget:
                return True
            if not self._hand_over(one):
                return False
            budget -= 1
        return False

    def _all(self, staying: Collection[str]) -> Iterator[Attempt | Relay]:
        yield from [one for one in self._engine.attempts if one.service not in staying]
        for relay in self._engine.relays():
            if relay not in self._stuck:
                yield relay

    def _balance(self) -> None:
        worker = self._worker
        is_of_use = bool(worker.has_siblings or worker.is_crowded or self._sent)
        self._is_balancing = is_of_use and worker.drain_seconds is None
        if not self._is_balancing:
            return
        self._loop.timers.call_at(self._loop.now + BALANCE_SECONDS, self._balance)
        self._uncount()
        self.adopt_some()  # those that no fds were left for
        self.show()
        surplus = worker.surplus()
        self._on_read()
        for _, relay in zip(range(surplus), self._engine.relays(), strict=False):
            if not self._hand_over(relay):
                return

    def _hand_over(self, one: Attempt | Relay) -> bool:
        """False: there is no room now."""
        if isinstance(one, Attempt):
            letter: AttemptLetter | RelayLetter = AttemptLetter(service=one.service, state=one.state())
            fds: tuple[int, ...] = (one.client.fileno(),)
        else:
            letter, fds = self._engine.letter(one)
        try:
            if not self._worker.hand_over(fds, encode(letter)):
                return False
        except ValueError:  # more than fits a letter: no relay of ours holds so much
            self._stuck.add(one)  # type: ignore[arg-type]  # an attempt holds a header at most
            return True
        if isinstance(one, Attempt):
            self._engine.let_attempt_go(one)
        else:
            self._sent.append(self._engine.let_go(one))
            self._uncount_at = self._loop.now + UNCOUNTED_SECONDS
        return True

    def _uncount(self) -> None:
        if self._sent and (self._loop.now >= self._uncount_at or not self._worker.has_unread):
            for target in self._sent:
                target.give_back()
            self._sent = []
            self._engine.places_given_back()

    # --- in ---------------------------------------------------------------------------------------------------------

    def adopt_some(self) -> None:
        for fds, data in self._worker.adopted_fds():
            self._shown = None
            try:
                self._adopt(fds, data)
            except (BadLetter, HandoffError, OSError) as error:
                _LOG.warning("a connection could not be taken over: %s", error)
                for fd in fds:
                    os.close(fd)

    def _adopt(self, fds: list[int], data: bytes) -> None:
        """Takes ownership of the fds, unless it raises BadLetter, HandoffError (an address that is none) or OSError."""
        letter = decode(data, len(fds))
        if isinstance(letter, AttemptLetter):
            client = plain_socket(fds[0])
            fds.clear()
            if not self._engine.has_service(letter.service):  # it may be called otherwise by now
                service = self._service_at(client) or letter.service
                letter = msgspec.structs.replace(letter, service=service)
            self._engine.adopt_attempt(letter, client)
            return
        sockets: list[socket.socket] = []
        try:
            for fd in fds[:2]:
                sockets.append(plain_socket(fd))
            client, server = sockets
            self._engine.adopt(letter, client, server, fds[2:])
        except BaseException:
            for one in sockets:
                one.detach()
            raise
