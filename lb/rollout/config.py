"""Reading `deploy.toml`: every key is checked, and what is wrong is told with its line and the nearest known key."""

from __future__ import annotations

import re
import tomllib
from typing import Any
from urllib.parse import urlsplit

import msgspec

from handoff.errors import UsageError
from handoff.option_table import is_service_name, shown_value
from lb.core.rollout.model import Deploy, Gate, Host
from lb.core.rollout.plan import filled, values_of
from lb.positions import Path, Positions
from lb.tables import Read, TableReader, choice, duration, number, read_flag, text

MAXIMUM_HOSTS = 1000
_NAME = "up to 64 letters, digits and . _ -"
_BATCH = re.compile(r"([1-9][0-9]{0,3}|[1-9][0-9]?%|100%)")
_VARIABLE = re.compile(r"[a-z][a-z0-9_]{0,31}")
_SERVER = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+){1,2}")
_RESERVED = frozenset({"version", "host", "pool"})
HOST_COMMANDS = ("stage", "activate", "reload", "once", "discard", "retire", "current")
OWN_COMMANDS = ("before", "after")


def parse_deploy(written: str, shown: str) -> Deploy:
    """The rollout that the text describes; `shown` is the file as it is called in messages. Raises UsageError."""
    try:
        table = tomllib.loads(written)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{shown}: {str(error)[:1].lower()}{str(error)[1:]}") from None
    return _Reader(shown, Positions(written)).deploy(table)


class _Reader(TableReader):
    """Takes the tables of a rollout apart."""

    def deploy(self, table: dict[str, Any]) -> Deploy:
        self._refuse_unknown((), table, {"deploy", "host", "gate"})
        own = self._fields(("deploy",), table.get("deploy", {}), _DEPLOY)
        if "service" not in own:
            self._fail(("deploy",), "service", "is missing")
        gate = Gate(**self._fields(("gate",), table.get("gate", {}), _GATE))
        listed = table.get("host", [])
        if not isinstance(listed, list) or not 1 <= len(listed) <= MAXIMUM_HOSTS:
            self._fail(("host",), "host", f"expected tables [[host]], 1 to {MAXIMUM_HOSTS}")
        hosts = tuple(self._host(("host", index), one, own["service"]) for index, one in enumerate(listed))
        self._refuse_twice([(("host", index, "name"), one.name) for index, one in enumerate(hosts)])
        self._refuse_twice([(("host", i, "server"), one.server) for i, one in enumerate(hosts) if one.server])
        deploy = Deploy(hosts=hosts, gate=gate, **own)
        self._check_commands(deploy)
        self.check_whole(deploy)
        return deploy

    def _host(self, path: Path, table: Any, service: str) -> Host:
        self._expect_table(path, table)
        inner = table.get("variables", {})
        self._expect_table((*path, "variables"), inner)
        for key, value in inner.items():
            if not _VARIABLE.fullmatch(key) or key in _RESERVED or not isinstance(value, str) or "\0" in value:
                where = (*path, "variables", key)
                self._fail(where, shown_value(key), "expected a name of small letters, and text as its value")
        fields = self._fields(path, {key: value for key, value in table.items() if key != "variables"}, _HOST)
        if "name" not in fields:
            self._fail(path, "name", "is missing")
        server = fields.get("server")
        if server is not None and server.partition("/")[0] != service:
            self._fail((*path, "server"), server, f"is of another service than {service}")
        return Host(variables=inner, **fields)

    def _check_commands(self, deploy: Deploy) -> None:
        if not (deploy.stage or deploy.activate or deploy.reload):
            self._fail(("deploy",), "stage, activate, reload", "expected at least one of them")
        for key in (*HOST_COMMANDS, *OWN_COMMANDS):
            template = getattr(deploy, key)
            if template is None:
                continue
            hosts = deploy.hosts if key in HOST_COMMANDS else ()
            for values in [values_of(one, "v") for one in hosts] or [{"version": "v"}]:
                try:
                    filled(template, values)
                except ValueError as error:
                    self._fail(("deploy", key), key, str(error))

    def check_whole(self, deploy: Deploy) -> None:
        """What no key is wrong in by itself. Raises UsageError."""
        own = ("deploy",)
        if deploy.batch.isdigit() and int(deploy.batch) > deploy.max_unavailable:
            where = (*own, "batch")
            self._fail(
                where, "batch", f"{deploy.batch} at once are more than max_unavailable = {deploy.max_unavailable}"
            )
        if deploy.strategy == "rolling":
            if deploy.drain and not deploy.balancers:
                self._fail((*own, "drain"), "drain", "needs a balancer that hosts are taken out of; set balancers")
            return
        if not deploy.balancers:
            self._fail((*own, "strategy"), deploy.strategy, "needs a balancer that switches; set balancers")
        for index, one in enumerate(deploy.hosts):
            if one.pool is None:
                self._fail(("host", index), one.name, "is in no pool; expected server = SERVICE/POOL/SERVER")
        if len(deploy.pools) != 2:
            found = ", ".join(deploy.pools) or "none"
            self._fail(("host",), deploy.strategy, f"needs hosts in two pools; there are: {found}")


def with_strategy(deploy: Deploy, strategy: str | None) -> Deploy:
    """As the command line has it. Raises UsageError."""
    if strategy is None:
        return deploy
    changed = msgspec.structs.replace(deploy, strategy=strategy)
    _Reader("--strategy", Positions("")).check_whole(changed)
    return changed


# --- how values are read --------------------------------------------------------------------------------------------


def _command(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value or len(value) > 8192:
        raise ValueError("expected a line for the shell")
    return value


def _batch(value: Any) -> str:
    shown = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(shown, str) or not _BATCH.fullmatch(shown):
        raise ValueError('expected a number of hosts, or a percentage such as "25%"')
    return shown


def _balancers(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) and one.isprintable() and one for one in value):
        raise ValueError("expected a list of ssh://, http(s)://, unix: or local")
    if len(set(value)) < len(value):
        raise ValueError("expected each of them once")
    return tuple(value)


def _steps(value: Any) -> tuple[int, ...]:
    read = number(1, 99)
    if not isinstance(value, list) or not value:
        raise ValueError("expected a list of percentages")
    steps = tuple(read(one) for one in value)
    if list(steps) != sorted(set(steps)):
        raise ValueError("expected ascending percentages")
    return steps


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1000:
        raise ValueError("expected a number from 0 to 1000")
    return float(value)


def _percentage(value: Any) -> float:
    if _positive(value) > 100:
        raise ValueError("expected a number from 0 to 100")
    return float(value)


def _duration_or_zero(value: Any) -> float:
    return 0.0 if value == "0s" else float(duration(value))


def _url(value: Any) -> str:
    if not isinstance(value, str) or urlsplit(value).scheme not in ("http", "https") or not urlsplit(value).hostname:
        raise ValueError("expected http://… or https://…")
    return value


_word = text(lambda one: one.isprintable() and bool(one) and not one.startswith("-"), "text that does not begin with -")
_DEPLOY: dict[str, tuple[str, Read]] = {
    "service": ("service", text(is_service_name, _NAME)),
    "strategy": ("strategy", choice("rolling", "blue-green", "canary")),
    "balancers": ("balancers", _balancers),
    "store": ("store", _word),
    "batch": ("batch", _batch),
    "max_unavailable": ("max_unavailable", number(1, MAXIMUM_HOSTS)),
    "drain": ("drain", read_flag),
    "drain_timeout": ("drain_timeout_seconds", duration),
    "check_timeout": ("check_timeout_seconds", duration),
    "step_timeout": ("step_timeout_seconds", duration),
    "bake": ("bake_seconds", _duration_or_zero),
    "keep": ("keep_seconds", _duration_or_zero),
    "steps": ("steps", _steps),
    "parallel": ("parallel", number(1, 100)),
    "lock_timeout": ("lock_seconds", duration),
    "on_failure": ("on_failure", choice("rollback", "stop")),
    **{key: (key, _command) for key in (*HOST_COMMANDS, *OWN_COMMANDS)},
}
_HOST: dict[str, tuple[str, Read]] = {
    "name": ("name", text(is_service_name, _NAME)),
    "ssh": ("ssh", _word),
    "server": ("server", text(_SERVER.fullmatch, "SERVICE/SERVER or SERVICE/POOL/SERVER")),
    "handoff": ("handoff", _word),
}
_GATE: dict[str, tuple[str, Read]] = {
    "failed_percent": ("failed_percent", _percentage),
    "reset_percent": ("reset_percent", _percentage),
    "connect_ratio": ("connect_ratio", _positive),
    "minimum_connections": ("minimum_connections", number(1, 1_000_000)),
    "command": ("command", _command),
    "probe": ("probe", _url),
}
