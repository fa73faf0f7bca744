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
"""More in one turn of the loop would make the clients of this worker wait (seen: 101 ms without a limit)."""
RETRY_SECONDS = 0.1


class Adopter:
    """Reads the mailbox while it is started. Owns its reading end.

    `adopt` owns the fds that it is given, and may raise Unreadable after it has closed them.
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
        if not has_headroom(self._reader.fileno()):
            logging.getLogger("uvicorn.error").warning("no free fds to take over connections; they wait")
            asyncio.get_running_loop().remove_reader(self._reader.fileno())
            asyncio.get_running_loop().call_later(RETRY_SECONDS, self._resume)
            return
        taken = 0
        while taken < LETTERS_PER_TURN:
            try:
                letters = receive_letters(self._reader)
            except BlockingIOError:
                return
            except EOFError:
                self.ended.set()
                self.stop()
                return
            except Unreadable as error:
                self._refused(error, error.connections)
                taken += 1
                continue
            taken += len(letters)
            for letter in letters:
                self._take(*letter)

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
