"""How a command of any language is told of its listeners, and how it says that it is ready.

sd_listen_fds(3) and sd_notify(3) of systemd; `Server::Starter` (Perl, start_server(1)). Words only, no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

FIRST_FD = 3
MAXIMUM_NOTIFICATION_BYTES = 4096
READY_AFTER_SECONDS = 1.0
"""Where a dialect has no word for it, or the command may not know it; as Server::Starter's --interval."""
_MAXIMUM_STATUS_CHARACTERS = 200


def listener_variables(dialect: str, names: Sequence[str], addresses: Sequence[str], generation: int) -> dict[str, str]:
    """For listeners that the command finds as fds 3, 4, … LISTEN_PID is for who executes the command to add."""
    found: dict[str, str] = {}
    if dialect in ("auto", "systemd"):
        found |= {"LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names)}
    if dialect in ("auto", "server-starter"):
        ports = (f"{address.removeprefix('unix:')}={FIRST_FD + index}" for index, address in enumerate(addresses))
        ports = (port for port in ports if not port.startswith("udp:"))  # it knows of streams only
        found |= {"SERVER_STARTER_PORT": ";".join(ports), "SERVER_STARTER_GENERATION": str(generation)}
    return found


def listens_for_words(dialect: str) -> bool:
    """The command gets a NOTIFY_SOCKET."""
    return dialect in ("auto", "systemd")


def ready_after_seconds(dialect: str, chosen: float | None) -> float | None:
    """After how long a command that lives is ready without a word; None: only by its word."""
    if chosen is None and dialect != "systemd":
        return READY_AFTER_SECONDS
    return chosen


class Notification(NamedTuple):
    """What a command said: sd_notify(3)."""

    is_ready: bool = False
    is_stopping: bool = False
    status: str | None = None


def read_notification(data: bytes) -> Notification:
    """Unknown words are left out, as systemd does."""
    words = dict(line.split("=", 1) for line in data.decode(errors="replace").splitlines() if "=" in line)
    status = words.get("STATUS")
    if status is not None:
        status = "".join(character for character in status if character.isprintable())[:_MAXIMUM_STATUS_CHARACTERS]
    return Notification(
        is_ready=words.get("READY") == "1", is_stopping=words.get("STOPPING") == "1", status=status or None
    )
