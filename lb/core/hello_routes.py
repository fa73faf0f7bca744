"""Which pool a TLS connection is for, by what its ClientHello asks for. No I/O."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lb.core.client_hello import ClientHello
from lb.core.model import ANY_NAME, HelloRoute


class HelloRoutes:
    """Of one service. A name is looked up, not compared with all there are."""

    def __init__(self, routes: Sequence[HelloRoute]) -> None:
        self._routes = tuple(routes)
        self._by_name: dict[str, list[int]] = {}
        """Routes in their order, by `api.example.com`, `.example.com` for what is below it, `` for everything."""
        for number, route in enumerate(self._routes):
            for name in route.sni or (ANY_NAME,):
                self._by_name.setdefault(name.removeprefix(ANY_NAME), []).append(number)

    def pool_of(self, hello: ClientHello) -> str | None:
        """Of the first route that matches; None: of none of them."""
        found = self.number_of(hello)
        return None if found is None else self._routes[found].pool

    def number_of(self, hello: ClientHello) -> int | None:
        """In the order of the routes, from 0."""
        return min(self._matching(hello), default=None)

    def _matching(self, hello: ClientHello) -> Iterator[int]:
        """The first one for each form of the name."""
        for key in _keys(hello.sni or ""):
            for number in self._by_name.get(key, ()):
                alpn = self._routes[number].alpn
                if not alpn or any(one in alpn for one in hello.alpn):
                    yield number
                    break


def _keys(name: str) -> Iterator[str]:
    """`a.b.c`, `.b.c`, `.c` and the empty one."""
    yield name
    at = name.find(".", 1)
    while at >= 0:
        yield name[at:]
        at = name.find(".", at + 1)
    if name:
        yield ""
