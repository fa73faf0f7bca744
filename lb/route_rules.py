"""What a route by SNI and ALPN may say, in `[[service.route]]`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from handoff.option_table import is_service_name
from lb.core.client_hello import ClientHello, plain_name
from lb.core.hello_routes import HelloRoutes
from lb.core.model import ANY_NAME, HelloRoute
from lb.tables import MAXIMUM_WORDS, Read, text

MAXIMUM_ROUTES = 256
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_SNI = re.compile(rf"\*|(?:\*\.)?{_LABEL}(?:\.{_LABEL})*")
_ADDRESS = re.compile(r"[0-9.]+")
_ALPN = re.compile(r"[!-~]{1,255}")


def _names(read_one: Callable[[str], str], expected: str) -> Read:
    def read(value: Any) -> tuple[str, ...]:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not 1 <= len(items) <= MAXIMUM_WORDS:
            raise ValueError(f"expected {expected}, or a list of them, 1 to {MAXIMUM_WORDS}")
        return tuple(dict.fromkeys(read_one(one) for one in items))

    return read


def _sni(value: Any) -> str:
    if isinstance(value, str) and not value.isascii():
        raise ValueError("expected a name as it is in DNS, in ASCII; write what is not as xn--…")
    name = plain_name(value) if isinstance(value, str) else ""
    if len(name) > 253 or _SNI.fullmatch(name) is None or _ADDRESS.fullmatch(name) is not None:
        raise ValueError('expected names such as api.example.com, *.example.com for all below it, or "*" for any')
    return name


def _alpn(value: Any) -> str:
    if not isinstance(value, str) or _ALPN.fullmatch(value) is None:
        raise ValueError('expected protocols such as "h2", of 1 to 255 printable characters')
    return value


ROUTE: dict[str, tuple[str, Read]] = {
    "sni": ("sni", _names(_sni, "a name")),
    "alpn": ("alpn", _names(_alpn, "a protocol")),
    "pool": ("pool", text(is_service_name, "the name of a pool")),
}


def useless(routes: Sequence[HelloRoute]) -> tuple[int, str] | None:
    """A route, by its number, and a name of it that never gets there: earlier routes take all of its connections. None:
    there is none."""
    found = HelloRoutes(routes)
    for number, route in enumerate(routes):
        for name in route.sni or (ANY_NAME,):
            sni = None if name == ANY_NAME else name.replace(ANY_NAME, "?")  # a label that no route has
            hellos = [ClientHello(sni, (one,)) for one in route.alpn] or [ClientHello(sni)]
            if all(found.number_of(hello) != number for hello in hellos):
                return number, name
    return None
