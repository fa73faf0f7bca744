"""`[[service.route]]` in lb.toml, and which pool a ClientHello gets by it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handoff.errors import UsageError
from lb.config import parse_config
from lb.core.client_hello import ClientHello
from lb.core.hello_routes import HelloRoutes
from lb.core.model import HelloRoute
from lb.core.reloading import taken_in_place

TEXT = """
[[service]]
name = "other"
listen = ":1"
pool.main.backends = []
[[service.route]]
sni = "x.example"
pool = "main"

[[service]]
name = "edge"
listen = ":443"
active = "web"
tls = "require"
[service.timeouts]
client_hello = "2s"
[service.pool.web]
[service.pool.api]
[service.pool.rest]
[[service.route]]
sni = ["API.example.com.", "api.example.org"]
alpn = "h2"
pool = "api"
[[service.route]]
sni = "*.example.com"
pool = "rest"
[[service.route]]
alpn = ["acme-tls/1"]
pool = "api"
"""


def test_what_a_route_can_say() -> None:
    other, edge = parse_config(TEXT, "lb.toml").services
    assert other.routes == (HelloRoute(sni=("x.example",), pool="main"),)
    assert (other.tls, other.timeouts.client_hello_seconds) == ("accept", 5.0)
    assert edge.routes == (
        HelloRoute(sni=("api.example.com", "api.example.org"), alpn=("h2",), pool="api"),
        HelloRoute(sni=("*.example.com",), pool="rest"),
        HelloRoute(alpn=("acme-tls/1",), pool="api"),
    )
    assert (edge.tls, edge.timeouts.client_hello_seconds) == ("require", 2.0)
    assert edge.routed_pools == {"api", "rest"}


NAMES = 'expected names such as api.example.com, *.example.com for all below it, or "*" for any'


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('pool = "rest"', 'pool = "rset"', "line 26: pool: there is no pool rset; there are web, api, rest"),
        ('pool = "rest"', "", "line 24: pool is missing"),
        (
            'sni = "*.example.com"',
            "",
            'line 24: route: has neither sni nor alpn; for every TLS connection write sni = "*"',
        ),
        ('sni = "*.example.com"', 'snj = "a.b"', 'line 25: "snj" is no key that is known here; did you mean "sni"?'),
        ('"*.example.com"', '"*"', "line 27: * is taken by earlier routes; put this one ahead of them"),
        ('"*.example.com"', '"a.*.com"', f'line 25: sni: "a.*.com": {NAMES}'),
        ('"*.example.com"', '"*example.com"', f'line 25: sni: "*example.com": {NAMES}'),
        ('"*.example.com"', '"https://a"', f'line 25: sni: "https://a": {NAMES}'),
        ('"*.example.com"', '"a:443"', f'line 25: sni: "a:443": {NAMES}'),
        ('"*.example.com"', '"10.0.0.1"', f'line 25: sni: "10.0.0.1": {NAMES}'),
        ('"*.example.com"', '""', f'line 25: sni: "": {NAMES}'),
        ('"*.example.com"', "3", "line 25: sni: 3: expected a name, or a list of them, 1 to 64"),
        ('"*.example.com"', "[]", "line 25: sni: []: expected a name, or a list of them, 1 to 64"),
        ('"*.example.com"', "[3]", f"line 25: sni: [3]: {NAMES}"),
        ('"*.example.com"', '"bücher.example"', "line 25: sni: "),
        ('alpn = "h2"', 'alpn = "h 2"', 'line 22: alpn: "h 2": expected protocols such as "h2", of 1 to 255'),
        ('alpn = "h2"', "alpn = true", "line 22: alpn: true: expected a protocol, or a list of them, 1 to 64"),
        (
            "[[service.route]]\nalpn",
            "[[service.rout]]\nalpn",
            'line 27: "rout" is no key that is known here; did you mean',
        ),
        ('tls = "require"', 'tls = "off"', 'line 14: tls: "off": expected "accept" or "require"'),
        ('client_hello = "2s"', 'client_hello = "none"', "line 16: client_hello: duration none: "),
        (
            '[[service.route]]\nsni = "x',
            '[service.route]\nsni = "x',
            "line 6: route: expected tables [[service.route]]",
        ),
    ],
)
def test_each_mistake_in_a_route_is_told_with_its_line(old: str, new: str, problem: str) -> None:
    assert old in TEXT
    with pytest.raises(UsageError) as caught:
        parse_config(TEXT.replace(old, new, 1), "lb.toml")
    assert caught.value.message.startswith(f"lb.toml: {problem}")
    assert caught.value.message.isprintable()


def refused(*routes: str) -> str:
    text = "[[service]]\nname = 'a'\nlisten = ':1'\npool.p.backends = []\nroute = [{0}]\n"
    try:
        parse_config(text.format(", ".join(f"{{ {one}, pool = 'p' }}" for one in routes)), "lb.toml")
    except UsageError as error:
        return error.message
    return ""


def test_a_name_that_never_gets_to_its_route_is_refused() -> None:
    taken = "is taken by earlier routes; put this one ahead of them"
    assert refused("sni = 'a.b'", "sni = ['c.d', 'a.b']") == f"lb.toml: line 5: a.b {taken}"
    assert refused("sni = '*.b'", "sni = 'x.a.b'") == f"lb.toml: line 5: x.a.b {taken}"
    assert refused("sni = '*.b'", "sni = '*.a.b'") == f"lb.toml: line 5: *.a.b {taken}"
    assert refused("sni = '*'", "sni = 'a.b', alpn = 'h2'") == f"lb.toml: line 5: a.b {taken}"
    assert refused("alpn = ['h2', 'h3']", "sni = 'a.b', alpn = 'h2'") == f"lb.toml: line 5: a.b {taken}"
    assert refused("sni = 'x.a.b'", "sni = '*.a.b'", "sni = '*.b'", "sni = 'b'", "sni = '*'") == ""
    assert refused("sni = 'a.b', alpn = 'h2'", "sni = 'a.b', alpn = ['h2', 'h3']", "sni = 'a.b'", "alpn = 'h2'") == ""


def test_there_are_so_many_routes_at_most() -> None:
    many = [f"sni = 'n{number}.example'" for number in range(257)]
    assert refused(*many[:256]) == ""
    assert refused(*many) == "lb.toml: line 5: route: expected tables [[service.route]], at most 256"


def test_changed_routes_need_no_reload() -> None:
    present = parse_config(TEXT, "lb.toml")
    wanted = parse_config(
        TEXT.replace('"*.example.com"', '"*.example.net"').replace('"require"', '"accept"'), "lb.toml"
    )
    assert taken_in_place(present, wanted) == (wanted, ())


# --- matching -------------------------------------------------------------------------------------------------------

EDGE = HelloRoutes(parse_config(TEXT, "lb.toml").services[1].routes)


@pytest.mark.parametrize(
    ("sni", "alpn", "pool"),
    [
        ("api.example.com", ("h2",), "api"),
        ("api.example.com", ("http/1.1", "h2"), "api"),
        ("api.example.com", ("http/1.1",), "rest"),
        ("api.example.com", (), "rest"),
        ("api.example.org", (), None),
        ("www.example.com", (), "rest"),
        ("a.b.c.example.com", ("acme-tls/1",), "rest"),
        ("example.com", (), None),
        ("badexample.com", (), None),
        ("example.com.evil", (), None),
        ("?.example.com", (), "rest"),
        ("com", ("acme-tls/1",), "api"),
        (None, ("acme-tls/1",), "api"),
        (None, ("h2",), None),
        (None, (), None),
    ],
)
def test_the_first_route_that_matches_counts(sni: str | None, alpn: tuple[str, ...], pool: str | None) -> None:
    assert EDGE.pool_of(ClientHello(sni, alpn)) == pool


def test_a_star_takes_what_has_no_name_too() -> None:
    routes = HelloRoutes([HelloRoute(sni=("*",), pool="tls")])
    assert {routes.pool_of(ClientHello(sni)) for sni in (None, "a", "a.b")} == {"tls"}


LABELS = st.lists(st.sampled_from("ab"), min_size=1, max_size=3).map(".".join)
PROTOCOLS = st.lists(st.sampled_from(["h2", "h3"]), max_size=2).map(tuple)
ROUTE = st.builds(
    HelloRoute,
    sni=st.lists(st.one_of(LABELS, LABELS.map("*.{}".format), st.just("*")), max_size=3).map(tuple),
    alpn=PROTOCOLS,
    pool=st.sampled_from("pqrs"),
)


@given(st.lists(ROUTE, max_size=6), st.one_of(st.none(), LABELS), PROTOCOLS)
def test_looking_up_finds_what_comparing_one_by_one_does(
    routes: list[HelloRoute], sni: str | None, alpn: tuple[str, ...]
) -> None:
    def is_match(route: HelloRoute) -> bool:
        names = any(
            one == "*" or (sni is not None and (sni == one or (one.startswith("*.") and sni.endswith(one[1:]))))
            for one in route.sni
        )
        return (names or not route.sni) and (not route.alpn or bool(set(route.alpn) & set(alpn)))

    expected = next((route.pool for route in routes if is_match(route)), None)
    assert HelloRoutes(routes).pool_of(ClientHello(sni, alpn)) == expected
