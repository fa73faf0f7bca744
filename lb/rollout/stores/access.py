"""Where an etcd is and how it is spoken to: `etcd://HOST[:PORT],…[?KEY=VALUE&…]` and two variables."""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import parse_qsl

from handoff.errors import UsageError

DEFAULT_PORT = 2379
DEFAULT_PREFIX = "handoff/"
MAXIMUM_ENDPOINTS = 16
USER_VARIABLE = "HANDOFF_ETCD_USER"
PASSWORD_VARIABLE = "HANDOFF_ETCD_PASSWORD"

_OPTIONS = ("tls", "ca", "cert", "key", "prefix")
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]+(%[\w.-]+)?\]", re.ASCII)
_PREFIX = re.compile(r"[A-Za-z0-9._/-]{1,100}/", re.ASCII)


class Endpoint(NamedTuple):
    host: str
    """Without the brackets of IPv6."""
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Access(NamedTuple):
    """`prefix`: of all keys there. `user`: empty for none."""

    endpoints: tuple[Endpoint, ...]
    prefix: str = DEFAULT_PREFIX
    tls: ssl.SSLContext | None = None
    user: str = ""
    password: str = ""

    def __repr__(self) -> str:
        return f"Access({self})"  # no password in anything that prints it

    def __str__(self) -> str:
        return "etcd " + ",".join(str(one) for one in self.endpoints)


def access_from(url: str, near: str, environ: Mapping[str, str]) -> Access:
    """Files are relative to the directory `near`. Raises UsageError."""
    places, _, query = url.removeprefix("etcd://").partition("?")
    if "@" in places:
        text = f"store etcd://…@…: a password in it is read by others; set {USER_VARIABLE} and {PASSWORD_VARIABLE}"
        raise UsageError(text)
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name in options:
        if name not in _OPTIONS:
            raise UsageError(f"store {url}: unknown option {name!r}; there are {', '.join(_OPTIONS)}")
    texts = places.rstrip("/").split(",")
    if len(texts) > MAXIMUM_ENDPOINTS:
        raise UsageError(f"store {url}: {len(texts)} endpoints; {MAXIMUM_ENDPOINTS} are taken")
    endpoints = tuple(_endpoint(url, text) for text in texts)
    prefix = options.get("prefix", DEFAULT_PREFIX)
    if _PREFIX.fullmatch(prefix) is None:
        raise UsageError(f"store {url}: prefix {prefix!r}: expected letters, digits and . _ / -, with / at its end")
    access = Access(
        endpoints,
        prefix,
        _context(url, near, options),
        environ.get(USER_VARIABLE, ""),
        environ.get(PASSWORD_VARIABLE, ""),
    )
    if access.user and access.tls is None and not all(_is_loopback(one.host) for one in endpoints):
        raise UsageError(f"store {url}: the password of {USER_VARIABLE} would be sent unencrypted; add ?tls=true")
    return access


def _endpoint(url: str, text: str) -> Endpoint:
    host, port = text, str(DEFAULT_PORT)
    if not text.endswith("]") and ":" in text:
        host, _, port = text.rpartition(":")
    if _HOST.fullmatch(host) is None or not port.isascii() or not port.isdigit() or not 0 < int(port[:6]) < 65536:
        raise UsageError(f"store {url}: endpoint {text!r}: expected HOST or HOST:PORT, an IPv6 address in []")
    return Endpoint(host.strip("[]"), int(port))


def _context(url: str, near: str, options: Mapping[str, str]) -> ssl.SSLContext | None:
    """Raises UsageError."""
    wanted = options.get("tls", "true" if any(name in options for name in ("ca", "cert", "key")) else "false")
    if wanted not in ("true", "false"):
        raise UsageError(f"store {url}: tls={wanted}: expected true or false")
    files = {name: os.path.join(near, options[name]) for name in ("ca", "cert", "key") if name in options}
    if wanted == "false":
        if files:
            raise UsageError(f"store {url}: {', '.join(files)} without tls; leave them or tls=false out")
        return None
    if "key" in files and "cert" not in files:
        raise UsageError(f"store {url}: a key without its cert; add cert=FILE")
    try:
        context = ssl.create_default_context(cafile=files.get("ca"))
        if "cert" in files:
            # A key with a passphrase is refused: nobody may be there to type it.
            context.load_cert_chain(files["cert"], files.get("key"), password=lambda: b"")
    except (OSError, ssl.SSLError, ValueError) as error:
        what = ", ".join(f"{name} {file}" for name, file in files.items())
        raise UsageError(f"store {url}: {what}: cannot be used ({error}); expected PEM files") from None
    return context


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"
