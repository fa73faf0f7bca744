"""How a command of any language is told of its listeners, and how it says that it is ready.

sd_listen_fds(3) and sd_notify(3) of systemd; `Server::Starter` (Perl, start_server(1)); einhorn (Ruby, its README and
lib/einhorn/client.rb). Words only, no I/O.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from handoff.durations import MAX_DURATION_SECONDS

FIRST_FD = 3
MAXIMUM_NOTIFICATION_BYTES = 4096
MAXIMUM_ACK_BYTES = 1024
DEFAULT_FD_NAME = "stored"
READY_AFTER_SECONDS = 1.0
"""Where a dialect has no word for it, or the command may not know it; as Server::Starter's --interval and einhorn's
timer ack."""
MINIMUM_WATCHDOG_SECONDS = 0.01
"""A shorter interval is not taken from a command: it would keep the master busy."""
_MAXIMUM_STATUS_CHARACTERS = 200
_FD_NAME = re.compile(r"[ -9;-~]{1,255}")
"""sd_notify(3): ASCII, no control characters, no colon."""
_MICROSECONDS = re.compile(r"[0-9]{1,15}")
_PERCENT = re.compile(r"%([0-9A-Fa-f]{2})")
_YAML_PAIR = re.compile(r"""["']?([a-z_]{1,32})["']?:[ ]+["']?([A-Za-z0-9:_.-]{1,64})["']?""")


class CheckStatus(enum.IntEnum):
    """How the process that checks a command exits."""

    GOOD = 0
    BAD = 1
    NOT_REACHED = 3


class Inherited(NamedTuple):
    """A listener of a command: what it is called, where it listens, and its family as einhorn spells it (AF_INET)."""

    name: str
    address: str
    family: str


def listener_variables(
    dialect: str, listeners: Sequence[Inherited], generation: int, stored: Sequence[str] = ()
) -> dict[str, str]:
    """For listeners that the command finds as fds 3, 4, … LISTEN_PID is for who executes the command to add.

    `stored`: the names of the fds that follow the listeners.
    """
    found: dict[str, str] = {}
    if takes_stored_fds(dialect):
        names = [*(one.name for one in listeners), *stored]
        found |= {"LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names)}
    if dialect in ("auto", "server-starter"):
        streams = ((at, one.address) for at, one in enumerate(listeners) if not one.address.startswith("udp:"))
        ports = (f"{address.removeprefix('unix:')}={FIRST_FD + at}" for at, address in streams)
        found |= {"SERVER_STARTER_PORT": ";".join(ports), "SERVER_STARTER_GENERATION": str(generation)}
    if takes_acks(dialect):
        found["EINHORN_FD_COUNT"] = str(len(listeners))
        for at, one in enumerate(listeners):
            found |= {f"EINHORN_FD_{at}": str(FIRST_FD + at), f"EINHORN_FD_FAMILY_{at}": one.family}
    return found


def einhorn_variables(dialect: str, slot: int, master_pid: int, ack_path: str) -> dict[str, str]:
    """Who the worker is, and where it acks; Einhorn::Worker compares the pid with its parent's."""
    if not takes_acks(dialect):
        return {}
    found = {"EINHORN_MASTER_PID": str(master_pid), "EINHORN_CHILD_INDEX": str(slot)}
    return found | ({"EINHORN_SOCK_PATH": ack_path} if ack_path else {})


def listens_for_words(dialect: str, watchdog_seconds: float | None = None) -> bool:
    """The command gets a NOTIFY_SOCKET."""
    return dialect in ("auto", "systemd") or watchdog_seconds is not None


def takes_stored_fds(dialect: str) -> bool:
    """The command gets LISTEN_FDS, and in it what its predecessor left."""
    return dialect in ("auto", "systemd")


def takes_acks(dialect: str) -> bool:
    """The command gets an EINHORN_SOCK_PATH."""
    return dialect in ("auto", "einhorn")


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
    is_alive: bool = False
    is_broken: bool = False
    """WATCHDOG=trigger."""
    watchdog_seconds: float | None = None
    stores_fds: bool = False
    removes_fds: bool = False
    fd_name: str | None = None
    """None: it says none, or one that cannot be in LISTEN_FDNAMES."""
    polls_fds: bool = True


def read_notification(data: bytes) -> Notification:
    """Unknown words are left out, as systemd does."""
    words = dict(line.split("=", 1) for line in data.decode(errors="replace").split("\n") if "=" in line)
    status = words.get("STATUS")
    if status is not None:
        status = "".join(character for character in status if character.isprintable())[:_MAXIMUM_STATUS_CHARACTERS]
    return Notification(
        is_ready=words.get("READY") == "1",
        is_stopping=words.get("STOPPING") == "1",
        status=status or None,
        is_alive=words.get("WATCHDOG") == "1",
        is_broken=words.get("WATCHDOG") == "trigger",
        watchdog_seconds=_watchdog_seconds(words.get("WATCHDOG_USEC", "")),
        stores_fds=words.get("FDSTORE") == "1",
        removes_fds=words.get("FDSTOREREMOVE") == "1",
        fd_name=words["FDNAME"] if _FD_NAME.fullmatch(words.get("FDNAME", "")) else None,
        polls_fds=words.get("FDPOLL") != "0",
    )


def watchdog_variables(seconds: float | None) -> dict[str, str]:
    """WATCHDOG_PID is for who executes the command to add."""
    return {} if seconds is None else {"WATCHDOG_USEC": str(round(seconds * 1_000_000))}


def _watchdog_seconds(text: str) -> float | None:
    seconds = int(text) / 1_000_000 if _MICROSECONDS.fullmatch(text) else 0.0
    return seconds if MINIMUM_WATCHDOG_SECONDS <= seconds <= MAX_DURATION_SECONDS else None


class EinhornCommand(msgspec.Struct, frozen=True):
    """What a worker sends to einhorn's command socket; other keys (`id`, `request_id`) are not looked at."""

    command: str
    pid: int


def read_einhorn_command(line: bytes) -> EinhornCommand | None:
    """One line without its newline, percent-escaped: JSON, or the YAML that Ruby dumps of a flat hash of such values.

    Ruby: `---%0Acommand: worker:ack%0Apid: 7%0A`; node-einhorn escapes blanks too; einhorn's README sends JSON.
    None: anything else. No objects are ever built, whatever the YAML says.
    """
    try:
        text = _PERCENT.sub(lambda found: chr(int(found.group(1), 16)), line.decode("ascii")).strip()
        if text.startswith("{"):
            return msgspec.json.decode(text, type=EinhornCommand)
        return msgspec.convert(dict(_yaml_pairs(text)), EinhornCommand, strict=False)
    except (UnicodeDecodeError, msgspec.MsgspecError, RecursionError, ValueError):
        return None


def _yaml_pairs(text: str) -> Iterator[tuple[str, str]]:
    """Raises ValueError for whatever is no plain `key: value`."""
    first, *lines = text.splitlines() or [""]
    if first.strip() != "---":
        raise ValueError("is no YAML document")
    for line in lines:
        pair = _YAML_PAIR.fullmatch(line.rstrip())
        if pair is None:
            raise ValueError("is no plain pair")
        yield pair.group(1), pair.group(2)
