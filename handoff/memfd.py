"""Sealed memfds: bytes too long for a datagram, which nobody can change any more once they are sent."""

from __future__ import annotations

import contextlib
import fcntl
import os

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class MemfdBroken(Exception):
    """The fd is no sealed memfd of that size."""


def sealed_memfd(name: str, data: bytes) -> int:
    """The caller owns the fd. Raises OSError."""
    memfd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(memfd, "wb", closefd=False) as file:
            file.write(data)
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(memfd)
        raise
    return memfd


def read_memfd(memfd: int, size: int, limit_bytes: int) -> bytes:
    """All of it. Borrows the fd. Raises MemfdBroken."""
    if not 0 < size <= limit_bytes:
        raise MemfdBroken(f"a message of {size} bytes; at most {limit_bytes}")
    try:
        seals = fcntl.fcntl(memfd, fcntl.F_GET_SEALS)
    except OSError:
        raise MemfdBroken("a long message came in something else than a memfd") from None
    if seals & _SEALS != _SEALS:
        raise MemfdBroken("a long message came in a memfd that is not sealed")
    data = os.pread(memfd, size, 0)
    if len(data) != size:
        raise MemfdBroken(f"a memfd holds {len(data)} bytes, its envelope says {size}")
    return data
