"""The channel between master and worker: a SOCK_SEQPACKET pair, one datagram for one message.

A datagram is never empty (that would look like EOF). A wrong number of fds, a message that is too long, or one that
cannot be read closes all fds that came and raises ChannelBroken: that peer is finished, and nobody else.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
from collections.abc import Sequence
from typing import Generic, TypeVar

import msgspec

from handoff.core.messages import (
    MAXIMUM_INLINE_BYTES,
    MAXIMUM_MESSAGE_BYTES,
    InMemfd,
    MasterMessage,
    Message,
    WorkerMessage,
)

MAXIMUM_FDS = 253
"""unix(7): SCM_MAX_FD."""
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_FD_BYTES = array.array("i").itemsize
_ANCILLARY_BYTES = socket.CMSG_SPACE(MAXIMUM_FDS * _FD_BYTES)

M = TypeVar("M", bound=Message)


class ChannelBroken(Exception):
    """The peer sent what is not of the protocol."""


class ChannelClosed(Exception):
    """The peer is gone, and everything that it sent was read."""


class Channel(Generic[M]):
    """One end. Takes ownership of the socket, which must be a non-blocking SEQPACKET. `M`: what is received."""

    def __init__(self, end: socket.socket, receives: type[M]) -> None:
        end.setblocking(False)
        self.socket = end
        self._decoder: msgspec.json.Decoder[M | InMemfd] = msgspec.json.Decoder(receives | InMemfd)
        self._encoder = msgspec.json.Encoder()

    def fileno(self) -> int:
        return self.socket.fileno()

    def close(self) -> None:
        self.socket.close()

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send one message. Borrows the fds.

        Raises BlockingIOError when the peer does not read, and OSError when it is gone.
        """
        assert message.fds == len(fds), "a message declares its fds"
        data = self._encoder.encode(message)
        if len(data) <= MAXIMUM_INLINE_BYTES:
            _send_datagram(self.socket, data, fds)
            return
        memfd = _sealed_memfd(data)
        try:
            envelope = self._encoder.encode(InMemfd(size=len(data), fds=1 + len(fds)))
            _send_datagram(self.socket, envelope, [memfd, *fds])
        finally:
            os.close(memfd)

    def receive(self) -> tuple[M, list[int]]:
        """Take the next message and its fds, which the caller then owns.

        Raises BlockingIOError when there is none yet, ChannelClosed at the end, ChannelBroken for garbage.
        """
        data, fds = _receive_datagram(self.socket)
        try:
            message = self._decode(data)
            if len(fds) != message.fds:
                raise ChannelBroken(f"{type(message).__name__} came with {len(fds)} fds, declares {message.fds}")
            if isinstance(message, InMemfd):
                return self._open_envelope(message, fds), fds
            return message, fds
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    def _open_envelope(self, envelope: InMemfd, fds: list[int]) -> M:
        if not fds:
            raise ChannelBroken("an envelope came without its memfd")
        memfd = fds.pop(0)
        try:
            message = self._decode(_read_memfd(memfd, envelope.size))
        finally:
            os.close(memfd)
        if isinstance(message, InMemfd) or len(fds) != message.fds:
            raise ChannelBroken("a memfd holds something else than its envelope says")
        return message

    def _decode(self, data: bytes) -> M | InMemfd:
        try:
            return self._decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ChannelBroken(f"not a message of this protocol: {error}") from None


def master_end(end: socket.socket) -> Channel[WorkerMessage]:
    return Channel(end, WorkerMessage)  # type: ignore[arg-type]


def worker_end(end: socket.socket) -> Channel[MasterMessage]:
    return Channel(end, MasterMessage)  # type: ignore[arg-type]


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """Both ends are close-on-exec; the caller owns them."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _send_datagram(end: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    end.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)


def _receive_datagram(end: socket.socket) -> tuple[bytes, list[int]]:
    while True:
        try:
            # MSG_CMSG_CLOEXEC: socket.recv_fds would leave the fds inheritable.
            data, ancillary, flags, _ = end.recvmsg(MAXIMUM_INLINE_BYTES + 1, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
            break
        except ConnectionResetError:
            # unix(7): a peer that died with unread input gives ECONNRESET once, *before* its last messages.
            continue
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % _FD_BYTES])
    received = list(fds)
    if not data and not received:
        raise ChannelClosed
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC) or len(data) > MAXIMUM_INLINE_BYTES:
        for fd in received:
            os.close(fd)
        raise ChannelBroken("a datagram was cut short")
    return data, received


def _sealed_memfd(data: bytes) -> int:
    memfd = os.memfd_create("handoff-message", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(memfd, "wb", closefd=False) as file:
            file.write(data)
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(memfd)
        raise
    return memfd


def _read_memfd(memfd: int, size: int) -> bytes:
    if not 0 < size <= MAXIMUM_MESSAGE_BYTES:
        raise ChannelBroken(f"a message of {size} bytes; at most {MAXIMUM_MESSAGE_BYTES}")
    try:
        seals = fcntl.fcntl(memfd, fcntl.F_GET_SEALS)
    except OSError:
        raise ChannelBroken("a long message came in something else than a memfd") from None
    if seals & _SEALS != _SEALS:
        raise ChannelBroken("a long message came in a memfd that is not sealed")
    data = os.pread(memfd, size, 0)
    if len(data) != size:
        raise ChannelBroken(f"a memfd holds {len(data)} bytes, its envelope says {size}")
    return data
