"""Which keys of a check go with which type, and which go together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

_ALWAYS = {"type", "interval", "timeout"}
_COUNTED = {"fast_interval", "rise", "fall"}
_WHOM = {"address", "port"}
_TLS = {"verify", "ca", "sni"}
OF_TYPE: dict[str, set[str]] = {
    "tcp": _ALWAYS | _COUNTED | _WHOM,
    "http": _ALWAYS
    | _COUNTED
    | _WHOM
    | {"method", "path", "host", "status", "body", "tls", "warm_up", "warm_up_timeout"}
    | _TLS,
    "tls": _ALWAYS | _COUNTED | _WHOM | _TLS,
    "agent": _ALWAYS | _WHOM | {"send"},
    "command": _ALWAYS | _COUNTED | _WHOM | {"command"},
}
NEEDED = {"agent": ("port",), "command": ("command",)}


def refusal(keys: Collection[str], table: Mapping[str, Any]) -> tuple[str, str] | None:
    """The key that is wrong, and why; None: all is well. `table`: what the file says, each value good by itself."""
    kind = table.get("type", "tcp")
    for key in keys:
        if key not in OF_TYPE[kind]:
            types = " or ".join(f'"{one}"' for one, its in OF_TYPE.items() if key in its)
            return key, f'goes with type = {types}; this check is of type "{kind}"'
        if kind == "http" and key in _TLS and not table.get("tls", False):
            return key, "goes with tls = true"
    if "ca" in keys and not table.get("verify", True):
        return "ca", "is of no use with verify = false"
    if "warm_up_timeout" in keys and not table.get("warm_up"):
        return "warm_up_timeout", "goes with warm_up"
    for key in NEEDED.get(kind, ()):
        if key not in keys:
            return key, f'is missing; a check of type "{kind}" needs it'
    return None
