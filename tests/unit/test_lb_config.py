"""`lb.toml`: all of what it can say, and each mistake with its line."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from handoff.addresses import parse_bind
from handoff.errors import HandoffError, UsageError
from lb.check_files import refuse_missing
from lb.config import parse_config
from lb.core.model import Backend, Balancer, Check, Service, Timeouts
from lb.own_addresses import bound_addresses, is_same_address, refuse_own_backends
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
        (
            "127.0.0.1:8404",
            "10.0.0.9:8404",
            "line 5: admin 10.0.0.9:8404: can be reached from other machines; set admin",
        ),
        ("127.0.0.1:8404", "[::]:8404", "line 5: admin [::]:8404: can be reached from other machines; set admin_token"),
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
    ("listen", "backend"),
    [
        ("127.0.0.1:80", "127.0.0.1:80"),
        ("127.0.0.1:80", "localhost:80"),
        ("127.0.0.1:80", "0.0.0.0:80"),
        ("127.0.0.1:80", "[::ffff:127.0.0.1]:80"),
        ("[::1]:80", "[0::0:1]:80"),
        ("0.0.0.0:80", "127.0.0.2:80"),
        (":80", "0.0.0.0:80"),
        ("[::]:80", "127.0.0.1:80"),
        ("[::]:80", "localhost:80"),
        ("unix:a.sock?mode=0660", "unix:./a.sock"),
    ],
)
def test_an_own_listener_is_no_backend_however_it_is_written(listen: str, backend: str) -> None:
    text = f'[[service]]\nname = "a"\nlisten = "{listen}"\n[service.pool.b]\nbackends = ["{backend}"]\n'
    with pytest.raises(UsageError, match=r"line 5: .* is an address that this balancer listens on itself"):
        parse_config(text, "lb.toml")
    for other in (backend.replace(":80", ":81").replace("a.sock", "b.sock"), "198.51.100.1:80", "app.internal:80"):
        parse_config(text.replace(f'["{backend}"]', f'["{other}"]'), "lb.toml")


@pytest.mark.parametrize(
    ("listen", "backend"),
    [
        ("unix:a.sock", "unix:DIRECTORY/a.sock"),
        ("unix:DIRECTORY/a.sock", "unix:a.sock"),
        ("unix:DIRECTORY/a.sock", "unix:DIRECTORY/x/../a.sock"),
        ("unix:current/a.sock", "unix:release/a.sock"),
    ],
)
def test_an_own_unix_socket_is_no_backend_by_whatever_path(tmp_path: Path, listen: str, backend: str) -> None:
    (tmp_path / "release").mkdir()
    (tmp_path / "current").symlink_to("release")
    text = f'[[service]]\nname = "a"\nlisten = "{listen}"\n[service.pool.b]\nbackends = ["{backend}"]\n'
    text = text.replace("DIRECTORY", str(tmp_path))
    with pytest.raises(UsageError, match=r"line 5: unix:.* is an address that this balancer listens on itself"):
        parse_config(text, "lb.toml", near=str(tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"[::1]:8080"', '"127.0.0.1:8080"', "line 9: listen 127.0.0.1:8080 is there twice in service shop; leave one"),
        ('"[::1]:8080"', '"fd://3"', "line 9: listen fd://3 is there twice in service shop; leave one out"),
        ('"unix:/run/shop.sock"', '"unix:a", "unix:/d/a"', "line 9: listen unix:/d/a is there twice in service shop"),
        ("127.0.0.1:5433", "[0::1]:8080", "line 32: listen [0::1]:8080 is what service shop listens on; give each an"),
        ("127.0.0.1:8404", "127.0.0.1:5433", "line 5: admin 127.0.0.1:5433 is what service db listens on; give each"),
    ],
)
def test_nothing_is_listened_on_twice(old: str, new: str, problem: str) -> None:
    assert old in FULL
    with pytest.raises(UsageError) as caught:
        parse_config(FULL.replace(old, new, 1), "lb.toml", near="/d")
    assert caught.value.message.startswith(f"lb.toml: {problem}")


def test_a_port_that_the_kernel_chooses_is_another_one_each_time() -> None:
    text = FULL.replace('"127.0.0.1:8080", "[::1]:8080"', '"127.0.0.1:0", "127.0.0.1:0"')
    assert len(parse_config(text, "lb.toml").services[0].listen) == 4


@pytest.mark.parametrize(
    ("addresses", "is_refused"),
    [(["127.0.1.1"], False), (["127.0.0.1", "::1"], False), (["198.51.100.9"], True), (["::1", "2001:db8::9"], True)],
)
def test_an_admin_address_that_is_a_name_others_reach_needs_a_token_file(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str], is_refused: bool
) -> None:
    text = FULL.replace("127.0.0.1:8404", "outside:8404")
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    parse_config(text, "lb.toml")
    if is_refused:
        with pytest.raises(UsageError, match=r"^lb.toml: line 5: admin outside:8404: can be reached"):
            parse_config(text, "lb.toml", looks_up=True)
    else:
        parse_config(text, "lb.toml", looks_up=True)


def test_an_admin_address_whose_name_is_unknown_is_left_to_who_binds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    parse_config(FULL.replace("127.0.0.1:8404", "outside:8404"), "lb.toml", looks_up=True)


def test_bound_listeners_tell_where_they_really_are(tmp_path: Path) -> None:
    path = str(tmp_path / "own.sock")
    with socket.create_server(("127.0.0.1", 0)) as inet, socket.create_server(("::1", 0), family=socket.AF_INET6) as v6:
        ports = inet.getsockname()[1], v6.getsockname()[1]
        with socket.socket(socket.AF_UNIX) as unix, socket.socket(socket.AF_UNIX) as nameless:
            unix.bind(path)
            nameless.bind("")
            bound = bound_addresses([inet, v6, unix, nameless])
    assert bound == (f"127.0.0.1:{ports[0]}", f"[::1]:{ports[1]}", f"unix:{path}")
    for address in bound:
        own = Service(
            name="shop", listen=("fd://3",), pools={"main": (Backend(name="x", address=address),)}, active="main"
        )
        with pytest.raises(HandoffError, match=r"service shop: .* is an address that this balancer listens on itself"):
            refuse_own_backends(Balancer(name="edge", services=(own,)), ".", bound)


def test_behind_a_listener_on_all_addresses_none_of_this_machine_is_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    listener, own = parse_bind("0.0.0.0:80"), parse_bind("198.51.100.9:80")
    assert not is_same_address(own, listener)
    taken: list[object] = []
    monkeypatch.setattr(socket.socket, "bind", lambda _, address: taken.append(address))
    assert is_same_address(own, listener)
    assert taken == [("198.51.100.9", 0)]
    monkeypatch.setattr(Path, "read_text", lambda _: "1\n")
    assert not is_same_address(own, listener), "where any address can be bound, that says nothing"


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


CHECKS = """
[check.web]
type = "http"
tls = true
ca = "ca.pem"
sni = "shop.example"
warm_up = ["/", "/cart"]
[check.words]
type = "agent"
port = 9000
send = "b1\\n"
[[service]]
name = "shop"
listen = "127.0.0.1:8080"
check = "web"
agent = "words"
[service.pool.main]
backends = ["app.internal:8000"]
[[service]]
name = "api"
listen = "127.0.0.1:8081"
check = "web"
[service.agent]
port = 9001
address = "127.0.0.1"
[service.pool.main]
backends = ["unix:/run/api.sock"]
[[service]]
name = "db"
listen = "127.0.0.1:5432"
[service.check]
type = "command"
command = ["check-db", "--fast"]
[service.pool.main]
backends = []
[[service]]
name = "own"
listen = "127.0.0.1:5433"
[service.check]
type = "agent"
port = 9002
[service.pool.main]
backends = []
"""


def test_checks_are_shared_by_name_and_agents_stand_beside_them() -> None:
    shop, api, db, own = parse_config(CHECKS, "lb.toml").services
    web = Check(type="http", tls=True, ca="ca.pem", sni="shop.example", warm_up=("/", "/cart"))
    words = Check(type="agent", port=9000, send="b1\n")
    assert (shop.check, shop.agent, api.check) == (web, words, web)
    assert api.agent == Check(type="agent", port=9001, address="127.0.0.1")
    assert db.check == Check(type="command", command=("check-db", "--fast"))
    assert (own.health_check, own.agent_check) == (None, Check(type="agent", port=9002))
    assert (shop.health_check, shop.agent_check) == (web, words)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("[check.web]", "[check.wep]", "line 15: check: there is no [check.web]; did you mean wep?"),
        ("[check.web]", '[check."a b"]', 'line 2: "a b" is no name of a check'),
        ("[check.web]", "[chek.web]", 'line 2: "chek" is no key that is known here; did you mean "check"?'),
        ("tls = true\n", "", "line 4: ca: goes with tls = true"),
        ('sni = "shop.example"', "verify = false", "line 5: ca is of no use with verify = false"),
        ('sni = "shop.example"', "rise = 0", "line 6: rise: 0: expected a whole number from 1 to 100"),
        ('["/", "/cart"]', '["/", "cart"]', 'line 7: warm_up: ["/", "cart"]: expected a list of paths'),
        ('["/", "/cart"]', "[]", "line 7: warm_up: []: expected a list of paths that begin with /, 1 to 64"),
        ('warm_up = ["/", "/cart"]', 'warm_up_timeout = "1s"', "line 7: warm_up_timeout: goes with warm_up"),
        ("port = 9000\n", "", 'line 8: port is missing; a check of type "agent" needs it'),
        ('send = "b1\\n"', "rise = 2", "line 11: rise: goes with type = "),
        ('agent = "words"', 'agent = "web"', 'line 16: agent is of type "http"; expected "agent"'),
        ('address = "127.0.0.1"', 'address = "localhost"', 'line 25: address: "localhost": expected an IP address'),
        ('address = "127.0.0.1"\n', "", "line 26: unix:/run/api.sock: has no agent, which is asked over TCP"),
        ('address = "127.0.0.1"', 'path = "/"', 'line 25: "path" is no key that is known here'),
        ('type = "command"\n', "", 'line 32: command: goes with type = "command"; this check is of type "tcp"'),
        ('["check-db", "--fast"]', '"check-db --fast"', 'line 33: command: "check-db --fast": expected a list of a'),
        ('["check-db", "--fast"]', '[""]', 'line 33: command: [""]: expected a list of a program'),
        ("port = 9002", "port = 9002\n[service.agent]\nport = 1", "line 42: agent is there twice: the check is an"),
        ('type = "http"', 'type = "https"', 'line 3: type: "https": expected "tcp" or "http" or "tls" or "agent"'),
    ],
)
def test_each_mistake_in_a_check_is_told_with_its_line(old: str, new: str, problem: str) -> None:
    assert old in CHECKS
    with pytest.raises(UsageError) as caught:
        parse_config(CHECKS.replace(old, new, 1), "lb.toml")
    assert caught.value.message.startswith(f"lb.toml: {problem}"), caught.value.message
    assert caught.value.message.isprintable()


@pytest.mark.parametrize(
    ("text", "mode", "problem"),
    [
        (None, 0, "cannot be read (No such file or directory)"),
        (" \n", 0o600, "holds no token; write one line of 1 to 4096 characters"),
        ("secret\n", 0o644, "can be read by everybody; chmod 600 it"),
        ("secret\n", 0o600, ""),
    ],
)
def test_a_token_file_that_is_no_use_is_said_before_anything_runs(
    tmp_path: Path, text: str | None, mode: int, problem: str
) -> None:
    config = FULL.replace('"127.0.0.1:8404"', '"0.0.0.0:8404"\nadmin_token_file = "token"')
    if text is not None:
        (tmp_path / "token").write_text(text)
        (tmp_path / "token").chmod(mode)
    if problem:
        with pytest.raises(UsageError) as caught:
            parse_config(config, "lb.toml", near=str(tmp_path))
        assert caught.value.message == f"lb.toml: line 6: admin_token_file {tmp_path}/token: {problem}"
    else:
        parse_config(config, "lb.toml", near=str(tmp_path))


def test_files_that_checks_need_are_looked_for(tmp_path: Path) -> None:
    program = tmp_path / "check"
    program.write_text("#!/bin/sh\n")
    (tmp_path / "bad.pem").write_text("no certificate")

    def problem_of(check: Check) -> str:
        service = Service(name="shop", listen=(":80",), pools={"main": ()}, active="main", check=check)
        try:
            refuse_missing(Balancer(name="edge", services=(service,)), "lb.toml", str(tmp_path))
        except UsageError as error:
            return error.message
        return ""

    def tls(ca: str) -> Check:
        return Check(type="tls", ca=ca)

    def command(name: str) -> Check:
        return Check(type="command", command=(name, "x"))

    assert problem_of(tls("ca.pem")).startswith("lb.toml: service shop: ca ca.pem: No such file or directory; give")
    assert problem_of(tls("bad.pem")).startswith("lb.toml: service shop: ca bad.pem: holds no certificate; give")
    assert problem_of(command("./check")).startswith("lb.toml: service shop: command ./check: there is no such program")
    assert "command no-such-program-anywhere: there is no" in problem_of(command("no-such-program-anywhere"))
    program.chmod(0o755)
    assert problem_of(command("./check")) == problem_of(command("sh")) == ""
