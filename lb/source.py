"""Where a balancer's configuration comes from: a file, or the options of `handoff lb run`; read at each reload."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from typing import Any, TypeVar

import click
import msgspec

from handoff.env_file import read_small_file
from handoff.errors import UsageError
from handoff.option_table import is_service_name, shown_value
from lb.config import parse_config, read_table
from lb.core.algorithms import ALGORITHMS
from lb.core.model import TYPED, Balancer

DEFAULT_FILE = "lb.toml"
DEFAULT_NAME = "lb"
DEFAULT_POOL = "main"

F = TypeVar("F", bound=Callable[..., Any])


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """What was typed: `file`, or `listen`, `backend` and what goes with them. The first ones win over the file."""

    file: str | None = None
    name: str | None = None
    relays: int | None = None
    admin: str | None = None
    state: str | None = None
    listen: tuple[str, ...] = ()
    backend: tuple[str, ...] = ()
    """`[NAME=]ADDRESS`."""
    algorithm: str | None = None
    check: str | None = None
    """A path, or `tcp`."""
    send_proxy: str | None = None


_SAY_NAME = "repair it, or say with --name which balancer is meant"
_OVERRIDES = ("name", "relays", "admin", "state")
_INSTEAD_OF_A_FILE = ("listen", "backend", "algorithm", "check", "send_proxy")


def source_options(command: F) -> F:
    """The argument and the options that make a Source, under the names of its fields."""
    for add in reversed(
        (
            click.argument("file", required=False),
            click.option("--name", help="Name of the service; default: the file's, or lb."),
            click.option("--relays", type=int, help="Number of relay workers. Default: the file's, or 1."),
            click.option("--admin", metavar="ADDR", help="The admin API, HOST:PORT. Default: the file's, or none."),
            click.option("--state", metavar="DIR", help="What must survive a reboot. Default: see docs."),
            click.option("--listen", multiple=True, metavar="ADDR", help="Without FILE: where clients connect to."),
            click.option("--backend", multiple=True, metavar="[NAME=]ADDR", help="Without FILE; repeatable."),
            click.option("--algorithm", type=click.Choice(ALGORITHMS), help="Without FILE. Default roundrobin."),
            click.option("--check", metavar="PATH|tcp", help="Without FILE: ask for this over HTTP, or only connect."),
            click.option("--send-proxy", type=click.Choice(["off", "v1", "v2"]), help="Without FILE. Default off."),
        )
    ):
        command = add(command)
    return command


def load(source: Source, shown: str | None = None) -> Balancer:
    """Reads the file. `shown` is what it is called in messages. May look up a name. Raises UsageError, one line."""
    given = {key: getattr(source, key) for key in _OVERRIDES if getattr(source, key) is not None}
    typed = [key for key in _INSTEAD_OF_A_FILE if getattr(source, key)]
    near = os.path.dirname(os.path.abspath(source.file)) if source.file is not None else os.getcwd()
    if source.file is None:
        return read_table(_typed_table(source, given), TYPED, near=near)
    if typed:
        raise UsageError(
            f"--{typed[0].replace('_', '-')}: is for a balancer without a file; write it into {source.file}"
        )
    shown = shown or source.file
    if given:  # judged by themselves first: a mistake in them is not the file's
        service = {"name": "typed", "listen": "fd://3", "pool": {DEFAULT_POOL: {}}}
        read_table({"balancer": given, "service": [service]}, TYPED, is_whole=False)
    balancer = parse_config(read_small_file(source.file, shown), shown, given, near, looks_up=True)
    return msgspec.structs.replace(balancer, typed=tuple(given))


def name_of(file: str) -> str:
    """Of the balancer that a file describes, whatever else in it is wrong. Raises UsageError, one line."""
    try:
        table = tomllib.loads(read_small_file(file, file))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{file}: {str(error)[:1].lower()}{str(error)[1:]}; {_SAY_NAME}") from None
    except UsageError as error:
        raise UsageError(f"{error.message}; {_SAY_NAME}") from None
    own = table.get("balancer", {})
    name = own.get("name", DEFAULT_NAME) if isinstance(own, dict) else None
    if not isinstance(name, str) or not is_service_name(name):
        raise UsageError(f"{file}: {shown_value(own if name is None else name)} is no name of a balancer; {_SAY_NAME}")
    return name


def words(source: Source) -> list[str]:
    """The command line that makes the same source."""
    found = [] if source.file is None else [source.file]
    for key in (*_OVERRIDES, *_INSTEAD_OF_A_FILE):
        value = getattr(source, key)
        for one in value if isinstance(value, tuple) else () if value is None else (value,):
            found.append(f"--{key.replace('_', '-')}={one}")
    return found


def _typed_table(source: Source, given: dict[str, Any]) -> dict[str, Any]:
    """What lb.toml would say."""
    if not source.listen or not source.backend:
        raise UsageError("no configuration is given; write handoff lb run lb.toml, or --listen ADDR --backend ADDR")
    service: dict[str, Any] = {"name": DEFAULT_NAME, "listen": list(source.listen)}
    for key in ("algorithm", "send_proxy"):
        if getattr(source, key) is not None:
            service[key] = getattr(source, key)
    if source.check is not None:
        service["check"] = {"type": "tcp"} if source.check == "tcp" else {"type": "http", "path": source.check}
    service["pool"] = {DEFAULT_POOL: {"backends": [split_backend(one) for one in source.backend]}}
    return {"balancer": given, "service": [service]}


def split_backend(text: str) -> dict[str, str]:
    """What a table of lb.toml would say of `[NAME=]ADDRESS`; without a name the address will be the name."""
    name, equals, address = text.partition("=")
    if not equals or name.startswith("unix:"):  # the path of a socket may hold "="
        return {"address": text}
    return {"name": name, "address": address}
