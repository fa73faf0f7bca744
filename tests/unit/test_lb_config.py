"""`lb.toml`: all of what it can say, and each mistake with its line."""

from __future__ import annotations

import pytest

from handoff.errors import UsageError
from lb.config import parse_config
from lb.core.model import Backend, Balancer, Check, Service, Timeouts
from lb.positions import Positions

FULL = """
[balancer]
name = "edge"
relays = 2
admin = "127.0.0.1:8404"

[[service]]
name = "shop"
listen = ["127.0.0.1:8080", "[::1]:8080", "unix:/run/shop.sock", "fd://3"]
algorithm = "leastconn"
active = "blue"
send_proxy = "v2"
[service.timeouts]
connect = "5s"
first_byte = "30s"
idle = "none"
[service.pool.blue]
backends = ["10.0.0.1:8000", { name = "b2", address = "10.0.0.2:8000", weight = 2, maxconn = 100, backup = true }]
[service.pool.green]
backends = []
[service.check]
type = "http"
path = "/health"
host = "shop.example"
status = [200, 204]
interval = "2s"
rise = 1
fall = 5

[[service]]
name = "db"
listen = "127.0.0.1:5433"
[service.pool.main]
backends = ["unix:/run/postgresql/.s.PGSQL.5432"]
"""


def test_everything_that_the_file_can_say() -> None:
    blue = (
        Backend(name="10.0.0.1:8000", address="10.0.0.1:8000"),
        Backend(name="b2", address="10.0.0.2:8000", weight=2, maxconn=100, backup=True),
    )
    check = Check(type="http", path="/health", host="shop.example", status=(200, 204), rise=1, fall=5)
    socket = "unix:/run/postgresql/.s.PGSQL.5432"
    assert parse_config(FULL, "lb.toml") == Balancer(
        name="edge",
        relays=2,
        admin="127.0.0.1:8404",
        services=(
            Service(
                name="shop",
                listen=("127.0.0.1:8080", "[::1]:8080", "unix:/run/shop.sock", "fd://3"),
                algorithm="leastconn",
                active="blue",
                send_proxy="v2",
                timeouts=Timeouts(connect_seconds=5, first_byte_seconds=30, idle_seconds=None),
                pools={"blue": blue, "green": ()},
                check=check,
            ),
            Service(
                name="db",
                listen=("127.0.0.1:5433",),
                active="main",
                pools={"main": (Backend(name=socket, address=socket),)},
            ),
        ),
    )


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("relays = 2", "relays = 0", "line 4: relays: 0: expected a whole number from 1 to 64"),
        ("relays = 2", "relay = 2", 'line 4: "relay" is no key that is known here; did you mean "relays"?'),
        ("[balancer]", "[balanser]", 'line 2: "balanser" is no key that is known here; did you mean "balancer"?'),
        ('"leastconn"', '"best"', 'line 10: algorithm: "best": expected "roundrobin" or "leastconn"'),
        ('active = "blue"', 'active = "red"', "line 11: active: there is no pool red; there are blue, green"),
        ('connect = "5s"', 'connect = "5"', "line 14: connect: duration 5: has no unit"),
        ('connect = "5s"', "connect = 5", 'line 14: connect: 5: expected a duration such as "5s"'),
        ("[service.timeouts]", "[service.timeout]", 'line 13: "timeout" is no key that is known here; did you mean'),
        ('["10.0.0.1:8000", {', '["10.0.0.1", {', "line 18: address: bind 10.0.0.1: has no port; write 10.0.0.1:8000"),
        ("weight = 2", "wieght = 2", 'line 18: "wieght" is no key that is known here; did you mean "weight"?'),
        ("weight = 2", "weight = 257", "line 18: weight: 257: expected a whole number from 0 to 256"),
        ('name = "b2"', 'name = "10.0.0.1:8000"', 'line 18: name: "10.0.0.1:8000": expected up to 64 letters'),
        ("[service.pool.green]", '[service.pool."a b"]', 'line 19: "a b" is no name of a pool'),
        ('path = "/health"', 'path = "health"', 'line 23: path: "health": expected a path that begins with /'),
        ("status = [200, 204]", "status = [204, 200]", "line 25: status: [204, 200]: expected the lowest first"),
        ("10.0.0.2:8000", "127.0.0.1:5433", "line 18: 127.0.0.1:5433 is an address that this balancer listens on"),
        ("10.0.0.2:8000", "127.0.0.1:8404", "line 18: 127.0.0.1:8404 is an address that this balancer listens on"),
        ('"127.0.0.1:5433"', '"udp:127.0.0.1:53"', 'line 32: listen: "udp:127.0.0.1:53": expected addresses of TCP'),
        ('name = "db"', 'name = "shop"', "line 31: shop is there twice; give each a name of its own"),
        ('listen = "127.0.0.1:5433"\n', "", "line 30: listen is missing"),
        ("[service.pool.main]\n", "", 'line 33: "backends" is no key that is known here'),
    ],
)
def test_each_mistake_is_told_with_its_line(old: str, new: str, problem: str) -> None:
    assert old in FULL
    with pytest.raises(UsageError) as caught:
        parse_config(FULL.replace(old, new, 1), "lb.toml")
    assert caught.value.message.startswith(f"lb.toml: {problem}")
    assert caught.value.message.isprintable()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "lb.toml: service: expected tables [[service]], at least one"),
        ("[service]\nname = 3", "lb.toml: line 1: service: expected tables [[service]], at least one"),
        ("service = [3]", "lb.toml: line 1: 0: expected a table"),
        (
            '[[service]]\nname = "a"\nlisten = ":80"\n',
            "lb.toml: line 1: pool: expected at least one [service.pool.NAME]",
        ),
        ("[[service", "lb.toml: "),
    ],
)
def test_what_is_no_configuration_at_all_is_one_line_too(text: str, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_config(text, "lb.toml")
    assert caught.value.message.startswith(problem)


def test_positions_know_arrays_of_tables_and_quoted_keys() -> None:
    positions = Positions('[[a]]\nx = 1\n[a."b.c"]\ny = 2\n[[a]]\n[a."b.c"]\n"y" = 3\nz.q = 4')
    assert positions.line(("a", 0, "x")) == 2
    assert positions.line(("a", 0, "b.c", "y")) == 4
    assert positions.line(("a", 1, "b.c", "y")) == 7
    assert positions.line(("a", 1, "b.c", "z")) == 8
    assert positions.line(("a", 1, "gone")) == 5
    assert positions.line(("gone",)) is None
