"""The control socket: who may connect, and lines of JSON in and out, without ever waiting for a peer."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from handoff.core.control import MAXIMUM_REQUEST_BYTES, AnyAnswer, AnyRequest
from handoff.errors import HandoffError
from handoff.master.log import MasterLog
from handoff.master.loop import Loop, Order
from handoff.master.processes import peer_groups

MAXIMUM_PEERS = 64
ACCEPT_AGAIN_SECONDS = 0.1
_DECODER = msgspec.json.Decoder(AnyRequest)


class ControlPeer:
    """One connected client: its bytes in and out. Owns the socket."""

    def __init__(self, connection: socket.socket, number: int) -> None:
        self.connection = connection
        self.number = number
        self.received = b""
        self.to_send = b""
        self.is_finished = False
        """Close it when everything is sent."""
        self.has_asked = False
        self.is_watched = True


class ControlServer:
    """Listens in the service's run directory, and hands each well-formed request to `on_request(number, request)`."""

    def __init__(
        self,
        path: Path,
        group_id: int | None,
        loop: Loop,
        log: MasterLog,
        on_request: Callable[[int, AnyRequest], None],
    ) -> None:
        self._path = path
        self._group_id = group_id
        self._loop = loop
        self._log = log
        self._on_request = on_request
        self._peers: dict[int, ControlPeer] = {}
        self._next_number = 1
        self._listener = _listen(path, group_id)
        self._again_at: float | None = None
        self._watch_listener()

    def _watch_listener(self) -> None:
        self._again_at = None
        self._loop.watch(self._listener, Order.CONTROL, self._accept, on_failure=self._pause)

    def _pause(self, error: Exception) -> None:
        """Out of fds, say: the listener stays readable, so look away for a moment."""
        if not isinstance(error, OSError):
            self._log.failure("control", error)
        self._loop.forget(self._listener)
        self._again_at = time.monotonic() + ACCEPT_AGAIN_SECONDS

    def next_deadline(self) -> float | None:
        return self._again_at

    def check(self, now: float) -> None:
        if self._again_at is not None and self._again_at <= now:
            self._watch_listener()

    def answer(self, number: int, answer: AnyAnswer) -> None:
        """Send the answer and then close. A peer that has gone away is nobody's loss."""
        peer = self._peers.get(number)
        if peer is None or peer.is_finished:
            return
        peer.to_send += _encoded(answer) + b"\n"
        peer.is_finished = True
        self._write(peer)

    def close(self) -> None:
        """Unlinks the socket first; what is still to be sent is tried once."""
        with contextlib.suppress(OSError):  # somebody removed the directory
            self._path.unlink()
        if self._again_at is None:
            self._loop.forget(self._listener)
        self._listener.close()
        for peer in list(self._peers.values()):
            self._drop(peer)

    # --- peers ------------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # it went away again
            return
        connection.setblocking(False)
        if not self._is_allowed(connection):
            connection.close()
            return
        self._make_room()
        peer = ControlPeer(connection, self._next_number)
        self._next_number += 1
        self._peers[peer.number] = peer
        self._watch(peer)

    def _make_room(self) -> None:
        """For one more: who never asked anything goes first, then who waits for the longest time."""
        if len(self._peers) < MAXIMUM_PEERS:
            return
        oldest = min(self._peers.values(), key=lambda peer: (peer.has_asked, peer.number))
        self._log.warning("control: too many peers; the oldest was dropped", count=len(self._peers))
        self._drop(oldest)

    def _watch(self, peer: ControlPeer, writable: bool = False) -> None:
        self._loop.watch(
            peer.connection,
            Order.CONTROL,
            lambda: self._serve(peer),
            writable,
            on_failure=lambda error: self._failed(peer, error),
        )

    def _failed(self, peer: ControlPeer, error: Exception) -> None:
        self._log.failure("control", error)
        self._drop(peer)

    def _is_allowed(self, connection: socket.socket) -> bool:
        """root, our own user, and with a control group its members (unix(7), SO_PEERCRED)."""
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, uid, gid = struct.unpack("3i", credentials)
        if uid in (0, os.geteuid()):
            return True
        if self._group_id is not None and (gid == self._group_id or self._group_id in peer_groups(connection)):
            return True
        self._log.warning("control: refused a peer of another user", peer_pid=pid, peer_uid=uid)
        return False

    def _serve(self, peer: ControlPeer) -> None:
        if peer.to_send:
            self._write(peer)
        if peer.number in self._peers:
            self._read(peer)

    def _read(self, peer: ControlPeer) -> None:
        try:
            data = peer.connection.recv(MAXIMUM_REQUEST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self._drop(peer)
            return
        if not data:
            self._ended(peer)
            return
        if peer.is_finished:
            return
        peer.received += data
        if b"\n" in peer.received:
            line, peer.received = peer.received.split(b"\n", 1)
            self._request(peer, line)
        elif len(peer.received) > MAXIMUM_REQUEST_BYTES:
            self._refuse(peer, "a request longer than the limit")

    def _ended(self, peer: ControlPeer) -> None:
        """It sends no more. One that has asked and waits for its verdict still gets it (`printf … | nc -N`)."""
        if peer.has_asked and not peer.is_finished:
            self._loop.forget(peer.connection)
            peer.is_watched = False
        else:
            self._drop(peer)

    def _request(self, peer: ControlPeer, line: bytes) -> None:
        try:
            request = _DECODER.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self._refuse(peer, str(error))
            return
        peer.has_asked = True
        self._on_request(peer.number, request)

    def _refuse(self, peer: ControlPeer, reason: str) -> None:
        self._log.warning("control: closed a peer that sent garbage", reason=reason)
        self._drop(peer)

    def _write(self, peer: ControlPeer) -> None:
        try:
            sent = peer.connection.send(peer.to_send, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._drop(peer)
            return
        peer.to_send = peer.to_send[sent:]
        if peer.to_send:
            peer.is_watched = True
            self._watch(peer, writable=True)
        elif peer.is_finished:
            self._drop(peer)

    def _drop(self, peer: ControlPeer) -> None:
        if self._peers.pop(peer.number, None) is not None:
            if peer.is_watched:
                self._loop.forget(peer.connection)
            peer.connection.close()


def _encoded(answer: AnyAnswer) -> bytes:
    """As JSON. A path that is no UTF-8 has surrogates in it, which JSON has no place for."""
    try:
        return msgspec.json.encode(answer)
    except UnicodeEncodeError:
        return msgspec.json.encode(_printable(msgspec.to_builtins(answer)))


def _printable(value: Any) -> Any:
    match value:
        case str():
            return value.encode(errors="backslashreplace").decode()
        case dict():
            return {key: _printable(one) for key, one in value.items()}
        case list() | tuple():
            return [_printable(one) for one in value]
        case _:
            return value


def _listen(path: Path, group_id: int | None) -> socket.socket:
    """The run directory is locked by us, so a socket that lies there is left over from a dead master."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(mask)
        if group_id is not None:
            os.chown(path, -1, group_id)
            os.chmod(path, 0o660)
        listener.listen(MAXIMUM_PEERS)
    except OSError as error:
        listener.close()
        raise HandoffError(f"control socket {path}: {error.strerror}; choose another --run-dir") from None
    return listener
