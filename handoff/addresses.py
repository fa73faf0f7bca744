"""What a service binds, as typed on the command line or in the configuration: `[NAME=]ADDRESS`."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Literal

import msgspec

from handoff.errors import UsageError

# unix(7): sun_path has 108 bytes, one of them for the terminating NUL.
MAX_UNIX_PATH_BYTES = 107
MAX_NAME_LENGTH = 64
DEFAULT_NAME = "default"
DEFAULT_UNIX_MODE = 0o600

_NAME = re.compile(rf"[A-Za-z0-9_.-]{{1,{MAX_NAME_LENGTH}}}")
_HOST = re.compile(r"[A-Za-z0-9_.-]{1,253}")
_NUMERIC_HOST = re.compile(r"[0-9.]+")
_MODE = re.compile(r"mode=(0?[0-7]{3})")
_SCHEME = re.compile(r"(?:[^=]*=)?([A-Za-z][A-Za-z0-9+.-]*)://")
_DIGITS = re.compile(r"[0-9]{1,10}")
NO_BINDS = "none"
"""Typed instead of an address: a service without any listener, for workers that fetch their work."""


class Bind(msgspec.Struct, frozen=True, kw_only=True):
    """One address to listen on. Which of the fields count follows from `kind`.

    `tcp`, `udp`: host, port (0: any free one); `unix`: path, mode; `fd`: fd.
    """

    name: str | None = None
    kind: Literal["tcp", "udp", "unix", "fd"]
    host: str = ""
    port: int = 0
    path: str = ""
    fd: int = -1
    mode: int = DEFAULT_UNIX_MODE
    is_free: bool = False
    """The machine need not have the address, yet: ip(7), IP_FREEBIND."""

    @property
    def is_any_port(self) -> bool:
        """The kernel chooses a port, another one for each such bind."""
        return self.kind in ("tcp", "udp") and self.port == 0

    @property
    def key(self) -> str:
        """The identity by which a reload recognises the same listener: neither the name nor the mode is part of it."""
        return f"tcp:{self}" if self.kind == "tcp" else str(self)

    def __str__(self) -> str:
        """The address as shown to a person."""
        match self.kind:
            case "tcp" | "udp":
                scheme = "udp:" if self.kind == "udp" else ""
                return f"{scheme}[{self.host}]:{self.port}" if ":" in self.host else f"{scheme}{self.host}:{self.port}"
            case "unix":
                return f"unix:{self.path}"
            case "fd":
                return f"fd://{self.fd}"


def parse_bind(text: str) -> Bind:
    """The bind that `[NAME=]HOST:PORT`, `[V6]:PORT`, `:PORT`, `udp:HOST:PORT`, `unix:PATH[?mode=0660]`, `fd://N` means.

    A relative path of a unix socket stays relative (see `absolute_bind`). Raises UsageError, one line.
    """
    if not text or not text.isprintable():
        raise UsageError(f"bind {text!r}: is not an address; write HOST:PORT, unix:PATH or fd://N")
    name, address = _split_name(text)
    if address.startswith("unix:"):
        return _parse_unix(text, name, address.removeprefix("unix:"))
    if address.startswith("fd:"):
        return _parse_fd(text, name, address)
    kind: Literal["tcp", "udp"] = "udp" if address.startswith("udp:") else "tcp"
    host, port = _split_port(text, address.removeprefix("udp:").removeprefix("//") if kind == "udp" else address)
    return Bind(name=name, kind=kind, host=_canonical_host(text, host), port=port)


def absolute_bind(bind: Bind, directory: str) -> Bind:
    """The bind with the path of a unix socket made absolute; other binds come back as they are. Raises UsageError."""
    if bind.kind != "unix" or bind.path.startswith("/"):
        return bind
    path = f"{directory.rstrip('/')}/{bind.path.removeprefix('./')}"
    _check_unix_path(f"unix:{path}", path)
    return msgspec.structs.replace(bind, path=path)


def check_binds(binds: Sequence[Bind]) -> None:
    """Refuse, with UsageError, a name or an address that is there twice; port 0 is another port each time."""
    names: set[str] = set()
    keys: set[str] = set()
    for bind in binds:
        if bind.name is not None and bind.name in names:
            raise UsageError(
                f"bind {bind.name}={bind}: name {bind.name} is there twice; give each bind a name of its own"
            )
        if bind.key in keys:
            raise UsageError(f"bind {bind}: is there twice; leave one out")
        if bind.name is not None:
            names.add(bind.name)
        if not bind.is_any_port:
            keys.add(bind.key)


def listener_names(binds: Sequence[Bind]) -> list[str]:
    """One name for each bind: its own, else `default` for the first without one, then `default-2` and so on."""
    taken = {bind.name for bind in binds if bind.name is not None}
    names = []
    for bind in binds:
        name = bind.name
        if name is None:
            name = free_name(DEFAULT_NAME, taken)
            taken.add(name)
        names.append(name)
    return names


def free_name(name: str, taken: set[str]) -> str:
    """The name itself, or where that is taken the first free one of `name-2`, `name-3`, …"""
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def _split_name(text: str) -> tuple[str | None, str]:
    scheme = _SCHEME.match(text)
    if scheme is not None and scheme.group(1) not in ("unix", "fd", "udp"):
        raise UsageError(
            f"bind {text}: unknown scheme {scheme.group(1)}; write HOST:PORT, udp:HOST:PORT, unix:PATH or fd://N"
        )
    # The path of a unix socket may hold "=", a TCP address never does.
    if text.startswith(("unix:", "fd:")) or "=" not in text:
        return None, text
    name, _, address = text.partition("=")
    if not name:
        raise UsageError(f"bind {text}: the name before = is empty; write web{text} or leave = out")
    if len(name) > MAX_NAME_LENGTH:
        raise UsageError(f"bind {text}: the name has {len(name)} characters; at most {MAX_NAME_LENGTH} are taken")
    if not _NAME.fullmatch(name):
        raise UsageError(f"bind {text}: name {name} has other characters than A-Z a-z 0-9 _ . -; leave them out")
    return name, address


def _parse_unix(text: str, name: str | None, rest: str) -> Bind:
    path, has_query, query = rest.partition("?")
    mode = DEFAULT_UNIX_MODE
    if has_query:
        found = _MODE.fullmatch(query)
        if found is None:
            raise UsageError(f"bind {text}: {query or 'nothing'} after ? is not a mode; write ?mode=0660")
        mode = int(found.group(1), 8)
    if path.startswith("//"):  # unix:///run/web.sock, as other servers spell it
        path = "/" + path.lstrip("/")
    _check_unix_path(text, path)
    return Bind(name=name, kind="unix", path=path, mode=mode)


def _check_unix_path(text: str, path: str) -> None:
    if not path or path.endswith("/"):
        raise UsageError(f"bind {text}: has no path of a socket; write unix:/run/web.sock")
    size_bytes = len(path.encode("utf-8", "surrogateescape"))
    if size_bytes > MAX_UNIX_PATH_BYTES:
        raise UsageError(
            f"bind {text}: path has {size_bytes} bytes; at most {MAX_UNIX_PATH_BYTES} fit, choose a shorter one"
        )


def _parse_fd(text: str, name: str | None, address: str) -> Bind:
    number = address.removeprefix("fd://")
    if not _DIGITS.fullmatch(number):
        raise UsageError(f"bind {text}: fd is not a number; write fd://3")
    fd = int(number)
    if fd < 3:
        raise UsageError(f"bind {text}: fd {fd} is standard input or output; the first that can be passed is fd://3")
    if fd > 0x7FFFFFFF:
        raise UsageError(f"bind {text}: fd {fd} is no fd of any process; write fd://3")
    return Bind(name=name, kind="fd", fd=fd)


def _split_port(text: str, address: str) -> tuple[str, int]:
    if address.startswith("["):
        host, bracket, rest = address.partition("]")
        if not bracket:
            raise UsageError(f"bind {text}: bracket [ is not closed; write [::1]:8000")
        if rest and not rest.startswith(":"):
            raise UsageError(f"bind {text}: {rest} follows the bracket; write {host}]:8000")
        host, port = host + "]", rest[1:]
    else:
        host, _, port = address.rpartition(":")
        if ":" in host:
            raise UsageError(_too_many_colons(text, address, host, port))
        if ":" not in address:
            host, port = address, ""
    if not port:
        raise UsageError(f"bind {text}: has no port; write {text.rstrip(':')}:8000")
    if not _DIGITS.fullmatch(port):
        raise UsageError(f"bind {text}: port {port} is not a number; write 0 to 65535")
    if int(port) > 65535:
        raise UsageError(f"bind {text}: port {port} is out of range; write 0 to 65535")
    return host, int(port)


def _too_many_colons(text: str, address: str, host: str, port: str) -> str:
    if _is_ipv6(host) and port:
        return f"bind {text}: IPv6 address without brackets; write [{host}]:{port}"
    if _is_ipv6(address):
        return f"bind {text}: IPv6 address without brackets; write [{address}]:8000"
    return f"bind {text}: more than one colon; write HOST:PORT or [V6]:PORT"


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _canonical_host(text: str, host: str) -> str:
    """The host in the one spelling that stands for it, so that equal addresses have equal keys."""
    if not host:
        return "0.0.0.0"
    if host.startswith("["):
        if not _is_ipv6(host[1:-1]):
            raise UsageError(f"bind {text}: {host[1:-1]} is not an IPv6 address; write [::1]:8000")
        address = ipaddress.IPv6Address(host[1:-1])
        # A socket for IPv6 only, as ours are, cannot be bound to a mapped address.
        return str(address.ipv4_mapped or address)
    if _NUMERIC_HOST.fullmatch(host):
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            raise UsageError(f"bind {text}: {host} is not an IPv4 address; write 127.0.0.1:8000") from None
    if not _HOST.fullmatch(host):
        raise UsageError(f"bind {text}: host {host} has other characters than A-Z a-z 0-9 _ . -; leave them out")
    return host.lower()
