"""`python -P -m lb.describe FILE`: what handoff.toml would say of the service that a balancer is, as JSON.

The master runs it at the start and at each reload. An error is one line on standard error, the exit code 2.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import msgspec

from handoff.errors import HandoffError
from lb.check_files import refuse_missing
from lb.core.model import TYPED, Balancer
from lb.rollout.stores.access import access_from
from lb.rollout.stores.base import StoreError
from lb.source import Source, load, source_options

RELAY_APP = "lb.relay.worker:main"
CONTROLLER_APP = "lb.control.main:main"
DRAIN_TIMEOUT = "1h"
"""Of relay workers that a reload replaced: they live on with their connections, which may be long."""
MAXIMUM_GENERATIONS = 10
"""At once; beyond that the oldest is ended before its time."""


def description(balancer: Balancer, shown: str, state: str) -> dict[str, Any]:
    """What handoff.toml would say. `shown`: the file; `state`: its directory of what is kept, absolute."""
    controller: dict[str, Any] = {"app": CONTROLLER_APP, "interface": "handoff"}
    if balancer.admin is not None:
        controller["bind"] = {"admin": balancer.admin}
    return {
        "name": balancer.name,
        "app": RELAY_APP,
        "interface": "handoff",
        "workers": balancer.relays,
        "bind": listeners(balancer),
        "freebind": balancer.freebind,
        "drain_timeout": DRAIN_TIMEOUT,
        "max_generations": MAXIMUM_GENERATIONS,
        "arguments": {"balancer": msgspec.to_builtins(balancer), "shown": shown, "state": state},
        "companion": {"controller": controller},
    }


def listeners(balancer: Balancer) -> dict[str, str]:
    """Addresses by the names that relay workers find them under: `SERVICE.N`, N from 0."""
    return {
        f"{service.name}.{number}": address
        for service in balancer.services
        for number, address in enumerate(service.listen)
    }


def state_directory(balancer: Balancer, near: str, environ: Mapping[str, str], uid: int) -> str:
    """The file's or the option's, from the directory `near` if relative; else $STATE_DIRECTORY (systemd.exec(5)), else
    the machine's or the user's. Absolute."""
    if balancer.state is not None:
        return os.path.join(near, balancer.state)
    given = environ.get("STATE_DIRECTORY", "").partition(":")[0]
    if given:
        return given
    if uid == 0:
        return f"/var/lib/handoff/{balancer.name}"
    root = environ.get("XDG_STATE_HOME", "")
    if not root.startswith("/"):  # as its specification has it: a relative one counts for nothing
        root = os.path.expanduser("~/.local/state")
    return os.path.join(root, "handoff", balancer.name)


def describe(source: Source) -> dict[str, Any]:
    """The description of what was typed. Raises HandoffError."""
    balancer = load(source)
    path = os.path.abspath(source.file or ".")
    near = path if source.file is None else os.path.dirname(path)
    shown = TYPED if source.file is None else path
    refuse_missing(balancer, shown, near)
    if balancer.desired is not None:
        access_from(balancer.desired, near, os.environ)
    return description(balancer, shown, state_directory(balancer, near, os.environ, os.geteuid()))


def _look(arguments: dict[str, Any]) -> None:
    """Where connections are to go by now, before anything accepts. Without an answer it starts with what it knows."""
    url, shown = arguments["balancer"]["desired"], arguments["shown"]
    if url is not None:
        from lb.control.desired import look, near_of

        with contextlib.suppress(StoreError):  # the controller goes on asking, and tells
            look(url, near_of(shown), Path(arguments["state"]))


@click.command()
@source_options
def main(**options: Any) -> None:
    """Print the description."""
    try:
        found = describe(Source(**options))
        _look(found["arguments"])
    except HandoffError as error:
        sys.stderr.write(f"{' '.join(error.message.split())}\n")
        raise SystemExit(error.exit_code) from None
    sys.stdout.buffer.write(msgspec.json.encode(found) + b"\n")


if __name__ == "__main__":
    main()
