"""Taking over live connections from our mailbox."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable

from handoff.core.moves import AnyState
from handoff.counters import ADOPTED, REFUSED
from handoff.mailbox import Unreadable, receive_letters
from handoff.rights import has_headroom

LETTERS_PER_TURN = 16
"""After so many no further datagram is taken in one turn of the loop: the clients of this worker would wait (seen:
101 ms without a limit)."""
RETRY_SECONDS = 0.1


class Adopter:
    """Reads the mailbox while it is started. Owns its reading end.

    `adopt` owns the fds that it is given, and has closed them where it raises: Unreadable, or anything unforeseen.
    """

    def __init__(
        self, reader: socket.socket, adopt: Callable[[AnyState, bytes, list[int]], None], counters: memoryview
    ) -> None:
        reader.setblocking(False)
        self._reader = reader
        self._adopt = adopt
        self._counters = counters
        self._is_started = False
        self.ended = asyncio.Event()
        """Nobody can send anything any more, and everything was taken."""

    def start(self) -> None:
        if self.ended.is_set():
            return
        self._is_started = True
        asyncio.get_running_loop().add_reader(self._reader.fileno(), self._read)

    def stop(self) -> None:
        """Leave the rest to who reads it now: our replacement, or the master."""
        self._is_started = False
        asyncio.get_running_loop().remove_reader(self._reader.fileno())

    def _read(self) -> None:
        taken = 0
        while taken < LETTERS_PER_TURN:
            if not has_headroom(self._reader.fileno()):
                logging.getLogger("uvicorn.error").warning("no free fds to take over connections; they wait")
                asyncio.get_running_loop().remove_reader(self._reader.fileno())
                asyncio.get_running_loop().call_later(RETRY_SECONDS, self._resume)
                return
            taken += self._take_some()

    def _take_some(self) -> int:
        """Of one datagram. A whole turn's number, where there is none."""
        try:
            letters = receive_letters(self._reader)
        except BlockingIOError:
            return LETTERS_PER_TURN
        except EOFError:
            self.ended.set()
            self.stop()
            return LETTERS_PER_TURN
        except Unreadable as error:
            self._refused(error, error.connections)
            return error.connections
        for letter in letters:
            self._take(*letter)
        return len(letters)

    def _resume(self) -> None:
        if self._is_started:
            self.start()

    def _take(self, state: AnyState, data: bytes, fds: list[int]) -> None:
        """Whatever is wrong with this one, those that came with it are taken."""
        try:
            self._adopt(state, data, fds)
        except Unreadable as error:
            self._refused(error, 1)
        except Exception:
            self._counters[REFUSED] += 1
            logging.getLogger("uvicorn.error").exception("a connection could not be taken over")
        else:
            self._counters[ADOPTED] += 1

    def _refused(self, error: Unreadable, connections: int) -> None:
        self._counters[REFUSED] += connections
        logging.getLogger("uvicorn.error").warning("a connection could not be taken over: %s", error)


def socket_of(state: AnyState, fds: list[int]) -> socket.socket:
    """The one connection of a letter, non-blocking; takes ownership of the fds. Raises Unreadable."""
    try:
        if len(fds) != 1:
            raise Unreadable(f"a connection with {len(fds)} fds: {state}")
        connection = socket.socket(fileno=fds[0])
    except (OSError, Unreadable) as error:
        for fd in fds:
            os.close(fd)
        raise Unreadable(f"not a connection: {error}") from None
    connection.setblocking(False)
    return connection


def sockets_of(fds: list[int]) -> list[socket.socket]:
    """Takes ownership of the fds. Empty where one of them is no socket."""
    sockets: list[socket.socket] = []
    try:
        for fd in fds:
            sockets.append(socket.socket(fileno=fd))
            sockets[-1].setblocking(False)
    except OSError:
        for one in sockets:
            one.detach()
        for fd in fds:
            os.close(fd)
        return []
    return sockets
