"""Sockets that the parent process passed to us, as systemd does: sd_listen_fds(3)."""

from __future__ import annotations

import itertools
import os
from collections.abc import MutableMapping, Sequence

import msgspec

from handoff.addresses import NO_BINDS, Bind, absolute_bind, check_binds, free_name, parse_bind
from handoff.errors import UsageError

FIRST_FD = 3  # SD_LISTEN_FDS_START
DEFAULT_BIND = "127.0.0.1:8000"
_MAX_DIGITS = 9
_UNKNOWN = "unknown"  # what systemd writes for a socket without a name


class InheritedSocket(msgspec.Struct, frozen=True):
    """One socket that the parent passed, under the name that the parent gave it."""

    name: str
    fd: int


def take_inherited(environ: MutableMapping[str, str], pid: int) -> list[InheritedSocket]:
    """The sockets meant for process `pid`; they become close-on-exec, and the caller owns them from here on.

    Removes LISTEN_* from `environ`, whomever they are for, so that no child takes the sockets for its own.
    Raises UsageError for a count that is none, or an fd that is not open.
    """
    listen = {key: environ.pop(key) for key in list(environ) if key.startswith("LISTEN_")}
    if listen.get("LISTEN_PID") != str(pid):
        return []
    text = listen.get("LISTEN_FDS", "0")
    if not (text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS):
        raise UsageError(f"LISTEN_FDS={text!r}: is not a number of sockets; let the parent set it, or unset it")
    given = listen.get("LISTEN_FDNAMES", "").split(":")
    taken: set[str] = set()
    sockets = []
    for index in range(int(text)):
        fd = FIRST_FD + index
        _close_on_exec(text, fd)
        name = _unique_name(given[index] if index < len(given) else "", taken)
        taken.add(name)
        sockets.append(InheritedSocket(name, fd))
    return sockets


def effective_binds(texts: Sequence[str], inherited: Sequence[InheritedSocket], directory: str) -> list[Bind]:
    """What is to be bound: what was asked for, else the sockets that were passed, else 127.0.0.1:8000; or `none`.

    Relative paths of unix sockets are taken from `directory`: give the resolved one of the generation, so that a new
    release gets a socket of its own. Raises UsageError for an address that cannot be read, or is there twice.
    """
    if tuple(texts) == (NO_BINDS,):
        return []
    if texts:
        binds = [absolute_bind(parse_bind(text), directory) for text in texts]
        check_binds(binds)
        return binds
    if inherited:
        return [Bind(name=socket.name, kind="fd", fd=socket.fd) for socket in inherited]
    return [parse_bind(DEFAULT_BIND)]


def _close_on_exec(count: str, fd: int) -> None:
    try:
        os.set_inheritable(fd, False)
    except (OSError, OverflowError):
        raise UsageError(
            f"LISTEN_FDS={count}: fd {fd} is not open; let the parent pass it, or unset LISTEN_FDS"
        ) from None


def _unique_name(name: str, taken: set[str]) -> str:
    """The name as given; a second one of that name, and each without one, gets a number."""
    if name in ("", _UNKNOWN):
        return next(numbered for number in itertools.count(1) if (numbered := f"{_UNKNOWN}-{number}") not in taken)
    return free_name(name, taken)
