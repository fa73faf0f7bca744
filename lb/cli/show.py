"""`handoff lb status`."""

from __future__ import annotations

import json
from collections.abc import Iterator

import click
import msgspec

from handoff.durations import format_duration
from handoff.errors import ExitCode
from lb.cli.client import ask_status
from lb.cli.options import balancer_options, find_balancer
from lb.core.admin import BackendStatus, NameStatus, PoolStatus, ServiceStatus, Status
from lb.core.model import HelloRoute

MINIMUM_WIDTH = 140
HEADINGS = ("service", "pool", "%", "backend", "address", "state", "health", "weight", "conns", "total", "failed")
_RIGHT = ("%", "weight", "conns", "total", "failed")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
@balancer_options
def status(as_json: bool, name: str | None, run_dir: str | None) -> int:
    """Show services, pools and servers: state, health, connections, overrides."""
    found = ask_status(find_balancer(name, run_dir))
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(found), indent=2))
    else:
        _print(found)
    return ExitCode.DONE


def _print(found: Status) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    if console.width < MINIMUM_WIDTH:  # a pipe has no width, and a narrow terminal wraps lines by itself
        console = Console(highlight=False, width=MINIMUM_WIDTH)
    for line in _heading(found):
        console.print(line, markup=False)
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading in _RIGHT else "left", no_wrap=True)
    table.add_column("last check")
    table.add_column("override")
    for name, service in found.services.items():
        for cells in _rows(name, service):
            table.add_row(*map(escape, cells))
    console.print(table)


def _heading(found: Status) -> Iterator[str]:
    kept = "" if found.is_durable else ", changes are NOT durable"
    yield f"{found.name}: generation {found.generation}, table {found.revision}{kept}"
    for peer in found.unheard_peers:
        yield f"peer {peer}: has not answered since the start; it may know a newer revision"
    for relay in found.relays:
        late = "" if relay.taken == found.revision else f", has table {relay.taken}"
        draining = ", draining" if relay.is_draining else ""
        yield f"relay worker {relay.slot} of generation {relay.generation}: pid {relay.pid}{late}{draining}"
    for name, service in found.services.items():
        listen = ", ".join(service.listen)
        tls = "" if service.tls == "accept" else f", tls {service.tls}"
        yield f"service {name}: {listen}, {service.algorithm}, revision {service.revision}{tls}"
        for route in service.routes:
            yield f"  {_route(route)} -> {route.pool}"
    for typed, one in found.names.items():
        yield _name(typed, one)


def _route(route: HelloRoute) -> str:
    said = [f"{key} {', '.join(names)}" for key, names in (("sni", route.sni), ("alpn", route.alpn)) if names]
    return " and ".join(said)


def _name(typed: str, one: NameStatus) -> str:
    age = "" if one.age_seconds is None else f", as of {format_duration(round(one.age_seconds))} ago"
    problem = f"; looking it up fails: {one.error}" if one.error else ""
    return f"name {typed}: {', '.join(one.addresses) or 'no address yet'}{age}{problem}"


def _rows(name: str, service: ServiceStatus) -> Iterator[tuple[str, ...]]:
    for pool_name, pool in service.pools.items():
        if not pool.backends:
            yield (name, pool_name, _share(pool), "-")
        for one in pool.backends.values():
            yield (name, pool_name, _share(pool), *_cells(one))


def _share(pool: PoolStatus) -> str:
    if not pool.is_routed:
        return str(pool.percent)
    return f"{pool.percent} + routes" if pool.percent else "routes"


def _cells(one: BackendStatus) -> tuple[str, ...]:
    limit = "" if one.maxconn is None else f"/{one.maxconn}"
    health = "ejected" if one.is_ejected else one.health
    return (
        f"{one.name} (backup)" if one.backup else one.name,
        one.address,
        one.administrative,
        f"{health} for {format_duration(round(one.since_seconds))}",
        f"{one.weight:g}",
        f"{one.connections}{limit}",
        str(one.total),
        str(one.failed),
        "; ".join(said for said in (one.last_check, f"agent: {one.agent}" if one.agent else "") if said),
        one.override,
    )
