"""The control socket: who may connect, and lines of JSON in and out, without ever waiting for a peer."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import msgspec

from handoff.core.control import MAXIMUM_REQUEST_BYTES, AnyAnswer, AnyRequest
from handoff.errors import HandoffError
from handoff.master.log import MasterLog
from handoff.master.loop import Loop, Order
from handoff.master.processes import peer_groups

MAXIMUM_PEERS = 64
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
        loop.watch(self._listener, Order.CONTROL, self._accept)

    def answer(self, number: int, answer: AnyAnswer) -> None:
        """Send the answer and then close. A peer that has gone away is nobody's loss."""
        peer = self._peers.get(number)
        if peer is None or peer.is_finished:
            return
        peer.to_send += msgspec.json.encode(answer) + b"\n"
        peer.is_finished = True
        self._write(peer)

    def close(self) -> None:
        """Unlinks the socket first; what is still to be sent is tried once."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        self._loop.forget(self._listener)
        self._listener.close()
        for peer in list(self._peers.values()):
            self._drop(peer)

    # --- peers ------------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it went away again, or we are out of fds: the next turn tries again
            return
        connection.setblocking(False)
        if len(self._peers) >= MAXIMUM_PEERS or not self._is_allowed(connection):
            connection.close()
            return
        peer = ControlPeer(connection, self._next_number)
        self._next_number += 1
        self._peers[peer.number] = peer
        self._loop.watch(connection, Order.CONTROL, lambda: self._serve(peer))

    def _is_allowed(self, connection: socket.socket) -> bool:
        """root, our own user, and with a control group its members (unix(7), SO_PEERCRED)."""
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, uid, gid = struct.unpack("3i", credentials)
        if uid in (0, os.geteuid()):
            return True
        if self._group_id is not None and self._group_id in (gid, *peer_groups(connection)):
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
            data = b""
        if not data:
            self._drop(peer)
            return
        if peer.is_finished:
            return
        peer.received += data
        if b"\n" in peer.received:
            line, peer.received = peer.received.split(b"\n", 1)
            self._request(peer, line)
        elif len(peer.received) > MAXIMUM_REQUEST_BYTES:
            self._refuse(peer, "a request longer than the limit")

    def _request(self, peer: ControlPeer, line: bytes) -> None:
        try:
            request = _DECODER.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self._refuse(peer, str(error))
            return
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
            self._loop.watch(peer.connection, Order.CONTROL, lambda: self._serve(peer), writable=True)
        elif peer.is_finished:
            self._drop(peer)

    def _drop(self, peer: ControlPeer) -> None:
        if self._peers.pop(peer.number, None) is not None:
            self._loop.forget(peer.connection)
            peer.connection.close()


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
