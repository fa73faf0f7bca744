"""Telling the parent how the service does, where it asked for it with NOTIFY_SOCKET: sd_notify(3)."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections import deque
from collections.abc import MutableMapping

from handoff.errors import UsageError
from handoff.master.log import MasterLog

RETRY_SECONDS = 0.1
MAXIMUM_UNSENT = 16
_MAXIMUM_STATUS_CHARACTERS = 500
_LATER = {errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM}


def take_notify_address(environ: MutableMapping[str, str]) -> str | None:
    """Removes NOTIFY_SOCKET from `environ`: no child of ours may speak for us. Raises UsageError."""
    address = environ.pop("NOTIFY_SOCKET", "")
    if not address:
        return None
    if address[0] not in "/@" or len(os.fsencode(address)) > 107:  # unix(7): sun_path
        raise UsageError(
            f"NOTIFY_SOCKET={address!r}: is no address of a unix socket; let the parent set it, or unset it"
        )
    return address


class Parent:
    """Who started us and listens, or nobody. Never blocks: what cannot be sent now is sent later, the oldest first."""

    def __init__(self, address: str | None, log: MasterLog) -> None:
        self._address = address if address is None or address[0] != "@" else "\0" + address[1:]
        self._log = log
        self._unsent: deque[str] = deque(maxlen=MAXIMUM_UNSENT)
        self._retry_at: float | None = None
        self._socket = None if address is None else socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        if self._socket is not None:
            self._socket.setblocking(False)

    def ready(self, status: str) -> None:
        self._send(f"READY=1\nMAINPID={os.getpid()}\n{_status(status)}")

    def status(self, status: str) -> None:
        self._send(_status(status))

    def stopping(self) -> None:
        self._send(f"STOPPING=1\n{_status('stopping')}")

    def next_deadline(self) -> float | None:
        return self._retry_at

    def check(self, now: float) -> None:
        if self._retry_at is not None and self._retry_at <= now:
            self._flush()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, text: str) -> None:
        self._unsent.append(text)
        self._flush()

    def _flush(self) -> None:
        self._retry_at = None
        while self._socket is not None and self._unsent:
            try:
                self._socket.sendto(self._unsent[0].encode(), self._address or "")
            except OSError as error:
                if error.errno in _LATER:
                    self._retry_at = time.monotonic() + RETRY_SECONDS
                    return
                self._log.warning("the parent cannot be told anything more", reason=error.strerror or str(error))
                self.close()
            else:
                self._unsent.popleft()


def _status(text: str) -> str:
    line = "".join(character if character.isprintable() else " " for character in text)
    return f"STATUS={line[:_MAXIMUM_STATUS_CHARACTERS]}\n"
