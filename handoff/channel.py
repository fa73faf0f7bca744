"""The channel between master and worker: a SOCK_SEQPACKET pair, one datagram for one message.

A datagram is never empty (that would look like EOF). A wrong number of fds, a message that is too long, or one that
cannot be read closes all fds that came and raises ChannelBroken: that peer is finished, and nobody else.
"""

from __future__ import annotations

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
from handoff.memfd import MemfdBroken, read_memfd, sealed_memfd
from handoff.rights import receive_datagram, send_datagram

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
            send_datagram(self.socket, data, fds)
            return
        memfd = sealed_memfd("handoff-message", data)
        try:
            envelope = self._encoder.encode(InMemfd(size=len(data), fds=1 + len(fds)))
            send_datagram(self.socket, envelope, [memfd, *fds])
        finally:
            os.close(memfd)

    def receive(self) -> tuple[M, list[int]]:
        """Take the next message and its fds, which the caller then owns.

        Raises BlockingIOError when there is none yet, ChannelClosed at the end, ChannelBroken for garbage.
        """
        data, fds, was_cut = receive_datagram(self.socket, MAXIMUM_INLINE_BYTES + 1)
        if not data and not fds:
            raise ChannelClosed
        try:
            if was_cut or len(data) > MAXIMUM_INLINE_BYTES:
                raise ChannelBroken("a datagram was cut short")
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
            message = self._decode(read_memfd(memfd, envelope.size, MAXIMUM_MESSAGE_BYTES))
        except MemfdBroken as error:
            raise ChannelBroken(str(error)) from None
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
