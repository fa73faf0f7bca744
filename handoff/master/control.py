"""The control socket: who may connect, and lines of JSON in and out, without ever waiting for a peer."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from handoff.core.control import MAXIMUM_REQUEST_BYTES, AnyAnswer, AnyRequest
from handoff.errors import HandoffError
from handoff.master.log import MasterLog
from handoff.master.loop import Loop
from handoff.master.peers import MAXIMUM_PEERS, Peer, Peers
from handoff.master.processes import peer_groups

_DECODER = msgspec.json.Decoder(AnyRequest)


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
        self._log = log
        self._on_request = on_request
        listener = _listen(path, group_id)
        self._peers = Peers(listener, loop, log, "control", MAXIMUM_REQUEST_BYTES, self._received, self._is_allowed)
        self.next_deadline = self._peers.next_deadline
        self.check = self._peers.check

    def answer(self, number: int, answer: AnyAnswer) -> None:
        """Send the answer and then close. A peer that has gone away is nobody's loss."""
        self._peers.finish(number, _encoded(answer) + b"\n")

    def close(self) -> None:
        """Unlinks the socket first."""
        with contextlib.suppress(OSError):  # somebody removed the directory
            self._path.unlink()
        self._peers.close()

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

    def _received(self, peer: Peer) -> None:
        if b"\n" not in peer.received:
            return
        line, peer.received = peer.received.split(b"\n", 1)
        try:
            request = _DECODER.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self._peers.refuse(peer, str(error))
            return
        peer.has_asked = True
        self._on_request(peer.number, request)


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
