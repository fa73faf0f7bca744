"""Reading `lb.toml`: every key is checked, and what is wrong is told with its line and the nearest known key."""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Collection, Mapping
from typing import Any

from handoff.addresses import parse_bind
from handoff.errors import HandoffError, UsageError
from handoff.option_table import is_service_name, shown_value
from lb.check_rules import OF_TYPE, refusal
from lb.core.algorithms import ALGORITHMS
from lb.core.choice import MAXIMUM_WEIGHT
from lb.core.model import Backend, Balancer, Check, Ejection, HelloRoute, Service, Timeouts
from lb.own_addresses import IS_OWN, is_exposed, is_same_address, own_addresses, resolved
from lb.positions import Path, Positions
from lb.route_rules import MAXIMUM_ROUTES, ROUTE, useless
from lb.tables import Read, TableReader
from lb.tables import choice as _choice
from lb.tables import duration as _duration
from lb.tables import duration_or_none as _duration_or_none
from lb.tables import list_of as _list_of
from lb.tables import number as _number
from lb.tables import read_flag as _read_flag
from lb.tables import text as _text
from lb.token_file import NEEDS_TOKEN, read_token

MAXIMUM_RELAYS = 64
MAXIMUM_BACKENDS = 1000
MAXIMUM_SERVICES = 256
MAXIMUM_WORDS = 64
"""Of a command; and requests of a warm-up."""
_TOKEN = re.compile(r"[A-Z]{1,16}")
_HTTP_PATH = re.compile(r"/[!-~]*")
_HOST = re.compile(r"[A-Za-z0-9_.:\[\]-]{1,253}")
_NAME = "up to 64 letters, digits and . _ -"


def parse_config(
    text: str,
    shown: str,
    typed: Mapping[str, Any] | None = None,
    near: str | None = None,
    looks_up: bool = False,
    bound: Collection[str] = (),
) -> Balancer:
    """The balancer that the text describes; `shown` is the file as it is called in messages. Raises UsageError.

    `typed` are keys of [balancer] that somebody gave otherwise, which win over the file's. `near`: the directory of
    relative paths; without it files are not looked at. `looks_up`: the name that the admin API listens on, too, which
    may block. `bound`: where the listeners of the running balancer really are.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{shown}: {str(error)[:1].lower()}{str(error)[1:]}") from None
    own = table.get("balancer", {})
    if typed and isinstance(own, dict):
        table["balancer"] = {**own, **typed}
    return _Reader(shown, Positions(text), near, looks_up, bound).whole(table)


def read_table(table: dict[str, Any], shown: str, is_whole: bool = True, near: str | None = None) -> Balancer:
    """The same of what no file says; `shown`: where it comes from. `is_whole`: there is no more. Raises UsageError."""
    reader = _Reader(shown, Positions(""), near, looks_up=True)
    return reader.whole(table) if is_whole else reader.balancer(table)


class _Reader(TableReader):
    """Takes the tables of a balancer apart."""

    def __init__(
        self, shown: str, positions: Positions, near: str | None, looks_up: bool, bound: Collection[str] = ()
    ) -> None:
        super().__init__(shown, positions)
        self._near, self._looks_up, self._bound = near, looks_up, bound
        self._shared: dict[str, Check] = {}
        """By name, [check.NAME]."""

    def whole(self, table: dict[str, Any]) -> Balancer:
        """All that is said anywhere."""
        balancer = self.balancer(table)
        admin, file = balancer.admin, balancer.admin_token_file
        if admin is not None and file is None and is_exposed(parse_bind(admin), self._looks_up):
            self._fail(("balancer", "admin"), f"admin {admin}", NEEDS_TOKEN)
        if file is not None and self._near is not None:
            self._refuse_bad_token(os.path.join(self._near, file))
        return balancer

    def _refuse_bad_token(self, file: str) -> None:
        try:
            read_token(file)
        except HandoffError as error:
            raise UsageError(f"{self._where(('balancer', 'admin_token_file'))}: {error.message}") from None

    def balancer(self, table: dict[str, Any]) -> Balancer:
        self._refuse_unknown((), table, {"balancer", "service", "check"})
        own = self._fields(("balancer",), table.get("balancer", {}), _BALANCER)
        listed = table.get("service", [])
        if not isinstance(listed, list) or not listed:
            self._fail(("service",), "service", "expected tables [[service]], at least one")
        if len(listed) > MAXIMUM_SERVICES:
            self._fail(("service",), "service", f"there are {len(listed)}; expected at most {MAXIMUM_SERVICES}")
        self._shared = self._shared_checks(table.get("check", {}))
        services = tuple(self._service(("service", index), one) for index, one in enumerate(listed))
        self._refuse_twice([(("service", index, "name"), one.name) for index, one in enumerate(services)])
        self._refuse_two_listeners(services, own.get("admin"))
        self._refuse_loops(services, own.get("admin"))
        return Balancer(name=own.pop("name", "lb"), services=services, **own)

    def _service(self, path: Path, table: Any) -> Service:
        self._expect_table(path, table)
        self._refuse_unknown(path, table, {*_SERVICE, *_TABLES_OF_SERVICE})
        inner = {key: value for key, value in table.items() if key in _TABLES_OF_SERVICE}
        own = self._fields(path, {key: value for key, value in table.items() if key not in inner}, _SERVICE)
        for key in ("name", "listen"):
            if key not in own:
                self._fail(path, key, "is missing")
        pools = self._pools((*path, "pool"), inner.get("pool", {}))
        active = own.pop("active", next(iter(pools)))
        if active not in pools:
            self._fail((*path, "active"), "active", f"there is no pool {active}; there are {', '.join(pools)}")
        timeouts = Timeouts(**self._fields((*path, "timeouts"), inner.get("timeouts", {}), _TIMEOUTS))
        check, agent = self._service_checks(path, inner, pools)
        ejection = Ejection(**self._fields((*path, "ejection"), inner.get("ejection", {}), _EJECTION))
        own |= {"routes": self._routes((*path, "route"), inner.get("route", []), pools)}
        return Service(
            pools=pools, active=active, timeouts=timeouts, check=check, agent=agent, ejection=ejection, **own
        )

    def _routes(self, path: Path, listed: Any, pools: Mapping[str, object]) -> tuple[HelloRoute, ...]:
        if not isinstance(listed, list) or len(listed) > MAXIMUM_ROUTES:
            self._fail(path, "route", f"expected tables [[service.route]], at most {MAXIMUM_ROUTES}")
        found: list[HelloRoute] = []
        for index, table in enumerate(listed):
            inside = (*path, index)
            self._expect_table(inside, table, "route")
            values = self._fields(inside, table, ROUTE)
            if "pool" not in values:
                self._fail(inside, "pool", "is missing")
            if not values.keys() & {"sni", "alpn"}:
                self._fail(inside, "route", 'has neither sni nor alpn; for every TLS connection write sni = "*"')
            one = HelloRoute(**values)
            if one.pool not in pools:
                self._fail((*inside, "pool"), "pool", f"there is no pool {one.pool}; there are {', '.join(pools)}")
            found.append(one)
        if (wrong := useless(found)) is not None:
            self._fail((*path, wrong[0], "sni"), wrong[1], "is taken by earlier routes; put this one ahead of them")
        return tuple(found)

    def _shared_checks(self, table: Any) -> dict[str, Check]:
        self._expect_table(("check",), table)
        for name in table:
            if not is_service_name(name):
                self._fail(("check", name), shown_value(name), f"is no name of a check; expected {_NAME}")
        return {name: self._check(("check", name), one) for name, one in table.items()}

    def _service_checks(
        self, path: Path, inner: dict[str, Any], pools: dict[str, tuple[Backend, ...]]
    ) -> tuple[Check | None, Check | None]:
        """The check and the agent of a service: a table of its own, or the name of a shared one."""
        check = self._check((*path, "check"), inner["check"]) if "check" in inner else None
        agent = self._check((*path, "agent"), inner["agent"], "agent") if "agent" in inner else None
        if agent is not None and agent.type != "agent":
            self._fail((*path, "agent"), "agent", f'is of type "{agent.type}"; expected "agent"')
        if agent is not None and check is not None and check.type == "agent":
            self._fail((*path, "agent"), "agent", "is there twice: the check is an agent, too")
        asked = agent or (check if check is not None and check.type == "agent" else None)
        if asked is not None and asked.address is None:
            for name, pool in pools.items():
                for backend in pool:
                    if parse_bind(backend.address).kind == "unix":
                        where = (*path, "pool", name, "backends")
                        self._fail(where, backend.address, "has no agent, which is asked over TCP; set its address")
        return check, agent

    def _check(self, path: Path, said: Any, kind: str | None = None) -> Check:
        """`kind`: the type where the table need not say it."""
        if isinstance(said, str):
            if said not in self._shared:
                near = difflib.get_close_matches(said, self._shared, n=1)
                there = f"did you mean {near[0]}?" if near else f"there are: {', '.join(self._shared) or 'none'}"
                self._fail(path, str(path[-1]), f"there is no [check.{said}]; {there}")
            return self._shared[said]
        self._expect_table(path, said)
        table = said if kind is None else {"type": kind, **said}
        values = self._fields(path, table, _CHECK if kind is None else _AGENT)
        wrong = refusal(tuple(table), table)
        if wrong is not None:
            self._fail((*path, wrong[0]), *wrong)
        return Check(**values)

    def _pools(self, path: Path, table: Any) -> dict[str, tuple[Backend, ...]]:
        self._expect_table(path, table)
        if not table:
            self._fail(path, "pool", "expected at least one [service.pool.NAME]")
        pools = {}
        for name, pool in table.items():
            inside = (*path, name)
            if not is_service_name(name):
                self._fail(inside, shown_value(name), f"is no name of a pool; expected {_NAME}")
            self._expect_table(inside, pool)
            self._refuse_unknown(inside, pool, {"backends"})
            pools[name] = self._backends((*inside, "backends"), pool.get("backends", []))
        return pools

    def _backends(self, path: Path, listed: Any) -> tuple[Backend, ...]:
        if not isinstance(listed, list):
            self._fail(path, "backends", "expected a list of addresses, or of tables")
        if len(listed) > MAXIMUM_BACKENDS:
            self._fail(path, "backends", f"there are {len(listed)}; expected at most {MAXIMUM_BACKENDS}")
        found = []
        for one in listed:
            values = self._fields(path, {"address": one} if isinstance(one, str) else one, _BACKEND)
            if "address" not in values:
                self._fail(path, "address", "is missing")
            found.append(Backend(**{"name": values["address"], **values}))
        self._refuse_twice([(path, one.name) for one in found])
        return tuple(found)

    def _refuse_two_listeners(self, services: tuple[Service, ...], admin: str | None) -> None:
        """Only one of them can be bound."""
        taken: dict[str, str] = {}
        for index, service in enumerate(services):
            for address in service.listen:
                self._take_place(taken, ("service", index, "listen"), address, service.name)
        if admin is not None:
            self._take_place(taken, ("balancer", "admin"), admin, "")

    def _take_place(self, taken: dict[str, str], path: Path, address: str, service: str) -> None:
        """`taken`: the services that listen, by the key of where they do. `service`: empty for the admin API."""
        bind = resolved(parse_bind(address), self._near)
        if bind.is_any_port:
            return
        subject, other = f"{path[-1]} {address}", taken.get(bind.key)
        if other == service:
            self._fail(path, subject, f"is there twice in service {service}; leave one out")
        if other is not None:
            self._fail(path, subject, f"is what service {other} listens on; give each an address of its own")
        taken[bind.key] = service

    def _refuse_loops(self, services: tuple[Service, ...], admin: str | None) -> None:
        """A listener of ours as a backend would relay to itself until nothing is left."""
        own = own_addresses(services, admin, self._near, self._bound)
        for index, service in enumerate(services):
            for name, pool in service.pools.items():
                for backend in pool:
                    bind = resolved(parse_bind(backend.address), self._near)
                    if any(is_same_address(bind, one) for one in own):
                        path = ("service", index, "pool", name, "backends")
                        self._fail(path, backend.address, IS_OWN)


# --- how values are read --------------------------------------------------------------------------------------------


def _read_listen(value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not items or not all(isinstance(one, str) for one in items):
        raise ValueError("expected an address, or a list of them")
    for one in items:
        if parse_bind(one).kind == "udp":
            raise ValueError("expected addresses of TCP, unix: or fd://")
    return tuple(items)


def _read_address(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("expected HOST:PORT, [V6]:PORT or unix:PATH")
    bind = parse_bind(value)
    if bind.kind not in ("tcp", "unix") or bind.is_any_port or bind.name is not None:
        raise ValueError("expected HOST:PORT, [V6]:PORT or unix:PATH")
    return value


def _is_path(text: str) -> bool:
    return bool(text) and "\0" not in text


def _read_networks(value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(one, str) for one in items):
        raise ValueError("expected a list of addresses, networks and unix")
    for one in items:
        if one != "unix":
            ipaddress.ip_network(one, strict=False)  # ValueError: says which and why
    return tuple(items)


def _read_status(value: Any) -> tuple[int, int]:
    pair = [value, value] if isinstance(value, int) and not isinstance(value, bool) else value
    read = _number(100, 599)
    if not isinstance(pair, list) or len(pair) != 2:
        raise ValueError("expected a status, or a list of the lowest and the highest")
    low, high = read(pair[0]), read(pair[1])
    if low > high:
        raise ValueError("expected the lowest first")
    return low, high


def _read_numeric(value: Any) -> str:
    try:
        return str(ipaddress.ip_address(value if isinstance(value, str) else ""))
    except ValueError:
        raise ValueError("expected an IP address, without a port") from None


def _read_peers(value: Any) -> tuple[str, ...]:
    from lb.rollout.balancers import check_address  # which few need: each reload reads the file anew

    found: tuple[str, ...] = _list_of(bool, "balancers")(value)
    for one in found:
        check_address(one)
    return found


def _is_sent(text: str) -> bool:
    return len(text) <= 1024 and "\0" not in text


def _is_word(text: str) -> bool:
    return "\0" not in text


def _read_command(value: Any) -> tuple[str, ...]:
    found: tuple[str, ...] = _list_of(_is_word, "a program and its arguments")(value)
    if not found[0]:
        raise ValueError("expected a list of a program and its arguments")
    return found


_BALANCER: dict[str, tuple[str, Read]] = {
    "name": ("name", _text(is_service_name, _NAME)),
    "relays": ("relays", _number(1, MAXIMUM_RELAYS)),
    "admin": ("admin", _read_address),
    "admin_token_file": ("admin_token_file", _text(_is_path, "the path of a file")),
    "state": ("state", _text(_is_path, "the path of a directory")),
    "unready": ("unready_seconds", _duration),
    "freebind": ("freebind", _read_flag),
    "access_log": ("access_log", _read_flag),
    "resolve_interval": ("resolve_interval_seconds", _duration),
    "resolve_family": ("resolve_family", _choice("ipv4", "ipv6", "both")),
    "peers": ("peers", _read_peers),
    "desired": ("desired", _text(lambda one: one.startswith("etcd://") and one.isprintable(), "etcd://HOST:PORT,…")),
}
_SERVICE: dict[str, tuple[str, Read]] = {
    "name": ("name", _text(is_service_name, _NAME)),
    "listen": ("listen", _read_listen),
    "algorithm": ("algorithm", _choice(*ALGORITHMS)),
    "active": ("active", _text(is_service_name, "the name of a pool")),
    "send_proxy": ("send_proxy", _choice("off", "v1", "v2")),
    "accept_proxy": ("accept_proxy", _choice("off", "accept", "require")),
    "proxy_from": ("proxy_from", _read_networks),
    "tls": ("tls", _choice("accept", "require")),
    "maximum_queue": ("maximum_queue", _number(0, 1_000_000)),
    "per_source": ("per_source", _number(1, 1_000_000)),
    "slow_start": ("slow_start_seconds", _duration),
    "panic_percent": ("panic_percent", _number(0, 100)),
}
_TABLES_OF_SERVICE = ("pool", "route", "timeouts", "check", "agent", "ejection")
_BACKEND: dict[str, tuple[str, Read]] = {
    "name": ("name", _text(is_service_name, _NAME)),
    "address": ("address", _read_address),
    "weight": ("weight", _number(0, MAXIMUM_WEIGHT)),
    "maxconn": ("maxconn", _number(1, 1_000_000)),
    "backup": ("backup", _read_flag),
}
_TIMEOUTS: dict[str, tuple[str, Read]] = {
    "connect": ("connect_seconds", _duration),
    "first_byte": ("first_byte_seconds", _duration_or_none),
    "idle": ("idle_seconds", _duration_or_none),
    "fin": ("fin_seconds", _duration_or_none),
    "queue": ("queue_seconds", _duration),
    "tunnel": ("tunnel_seconds", _duration_or_none),
    "drain": ("drain_seconds", _duration_or_none),
    "spread": ("spread_seconds", _duration),
    "client_hello": ("client_hello_seconds", _duration),
    "silent": ("silent_seconds", _duration_or_none),
}
_EJECTION: dict[str, tuple[str, Read]] = {
    "failures": ("failures", _number(0, 1000)),
    "base": ("base_seconds", _duration),
    "maximum": ("maximum_seconds", _duration),
    "maximum_percent": ("maximum_percent", _number(0, 100)),
}
_CHECK: dict[str, tuple[str, Read]] = {
    "type": ("type", _choice(*OF_TYPE)),
    "method": ("method", _text(_TOKEN.fullmatch, "a method such as GET")),
    "path": ("path", _text(_HTTP_PATH.fullmatch, "a path that begins with /")),
    "host": ("host", _text(_HOST.fullmatch, "a host name")),
    "status": ("status", _read_status),
    "body": ("body", _text(str.isprintable, "printable text")),
    "address": ("address", _read_numeric),
    "port": ("port", _number(1, 65535)),
    "tls": ("tls", _read_flag),
    "verify": ("verify", _read_flag),
    "ca": ("ca", _text(_is_path, "the path of a file")),
    "sni": ("sni", _text(_HOST.fullmatch, "a host name")),
    "send": ("send", _text(_is_sent, "text of at most 1024 characters")),
    "command": ("command", _read_command),
    "warm_up": ("warm_up", _list_of(_HTTP_PATH.fullmatch, "paths that begin with /")),
    "warm_up_timeout": ("warm_up_timeout_seconds", _duration),
    "interval": ("interval_seconds", _duration),
    "fast_interval": ("fast_interval_seconds", _duration),
    "timeout": ("timeout_seconds", _duration),
    "rise": ("rise", _number(1, 100)),
    "fall": ("fall", _number(1, 100)),
}
_AGENT: dict[str, tuple[str, Read]] = {key: _CHECK[key] for key in _CHECK if key in OF_TYPE["agent"]}
