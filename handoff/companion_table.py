"""The tables `[companion.NAME]` of `handoff.toml`: single processes beside the workers."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from handoff.addresses import NO_BINDS
from handoff.errors import UsageError
from handoff.option_table import (
    MAX_LIST_LENGTH,
    ONLY_FOR_APPLICATIONS,
    ONLY_FOR_COMMANDS,
    Option,
    is_service_name,
    shown_value,
)
from handoff.settings import CompanionSettings

KEYS = (
    *("app", "command", "factory", "bind", "interface", "loop", "threads", "dialect", "ready_after", "watchdog"),
    *("drain_signal", "boot_timeout", "stop_timeout"),
)


def companions_option(options: Mapping[str, Option]) -> Option:
    """The option `companion`; `options` are those of the service, of which a companion takes some."""
    return Option(
        key="companion",
        field="companions",
        read=lambda value: {name: _read(options, name, table) for name, table in _tables(value).items()},
        check=_check_number,
    )


def _tables(value: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict) or not all(isinstance(table, dict) for table in value.values()):
        raise ValueError("expected tables [companion.NAME]")
    for name in value:
        if not is_service_name(name):
            raise ValueError(f"name {shown_value(name)}: expected letters, digits and _ . -")
    return value


def _read(options: Mapping[str, Option], name: str, table: dict[str, Any]) -> CompanionSettings:
    values: dict[str, Any] = {}
    for written, value in table.items():
        key = written.replace("-", "_")
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f'did you mean "{near[0]}"?' if near else "leave it out"
            raise UsageError(f"{name}: unknown key {shown_value(written)}; {hint}")
        values[options[key].field] = _value(options[key], name, value)
    _check_what_runs(name, values)
    return CompanionSettings(**values)


def _value(option: Option, name: str, value: Any) -> Any:
    try:
        converted = option.read(value)
        option.check(converted)
    except ValueError as error:
        raise UsageError(f"{name}: {option.key} = {shown_value(value)}: {error}") from None
    except UsageError as error:
        raise UsageError(f"{name}: {option.key}: {error.message}") from None
    return converted


def _check_what_runs(name: str, values: dict[str, Any]) -> None:
    if ("app" in values) == ("command" in values):
        raise UsageError(f"{name}: a companion runs either an app or a command; give one of the two")
    useless, kind = (ONLY_FOR_APPLICATIONS, "commands") if "command" in values else (ONLY_FOR_COMMANDS, "an app")
    for field in useless:
        if field in values:
            raise UsageError(f"{name}: {field.removesuffix('_seconds')}: means nothing for {kind}; leave it out")
    if values.get("binds") == (NO_BINDS,):
        values["binds"] = ()
    if values.get("app", "").endswith("()"):
        values |= {"app": values["app"].removesuffix("()"), "factory": True}


def _check_number(value: Mapping[str, CompanionSettings]) -> None:
    if len(value) > MAX_LIST_LENGTH:
        raise ValueError(f"has {len(value)} companions; expected at most {MAX_LIST_LENGTH}")
