"""The settings of a service, merged: defaults < environment (two variables) < handoff.toml < command line."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from typing import Any

import msgspec

from handoff.companion_table import companions_option
from handoff.durations import format_duration
from handoff.env_file import read_small_file
from handoff.errors import UsageError
from handoff.option_table import (
    MAX_NAME_LENGTH,
    ONLY_FOR_APPLICATIONS,
    ONLY_FOR_COMMANDS,
    ONLY_ON_COMMAND_LINE,
    Option,
    one_line,
    shown_value,
)
from handoff.option_table import (
    OPTIONS as SERVICE_OPTIONS,
)
from handoff.settings import Launch, Settings

CONFIG_FILE = "handoff.toml"
DESCRIPTION = "description"
"""How what --describe printed is called in messages."""
OPTIONS = SERVICE_OPTIONS | {"companion": companions_option(SERVICE_OPTIONS)}
OPTIONS_BY_FIELD = {option.field: option for option in OPTIONS.values()}
_NOT_OF_A_NAME = re.compile(r"[^A-Za-z0-9._-]+")
_TOML_POSITION = re.compile(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", re.DOTALL)


class ServiceOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What belongs to the service as a whole and not to a generation; paths are absolute."""

    run_dir: str | None = None
    pidfile: str | None = None
    status_file: str | None = None
    control_group: str | None = None
    metrics: str | None = None
    """An address, a relative path of a unix socket as typed."""


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration file as read: keys with underscores, values not yet checked."""

    shown: str
    """The file as it is called in messages."""
    values: dict[str, Any] = {}


def load_settings(launch: Launch, directory: str, environment: Mapping[str, str]) -> Settings:
    """One generation's settings: the file's, WEB_CONCURRENCY and FORWARDED_ALLOW_IPS, the command line's, merged.

    `directory` is the resolved one: handoff.toml is looked for there. Raises UsageError, one line.
    """
    return merge_settings(read_config(launch, directory), launch, directory, environment)


def load_service_options(launch: Launch, directory: str) -> ServiceOptions:
    """The service's options from the file and the command line. Only these keys of the file are looked at.

    Relative paths are taken from the directory as typed, so that they stay the same over releases. Raises UsageError.
    """
    config = read_config(launch, directory)
    values: dict[str, Any] = {}
    for key in ServiceOptions.__struct_fields__:
        value = _value_of(config, launch, key)
        if value is not None and key in ("run_dir", "pidfile", "status_file"):
            value = os.path.join(launch.directory, value)
        values[key] = value
    return ServiceOptions(**values)


def service_name(launch: Launch, directory: str) -> str:
    """The service's name: the command line's, else the file's, else the directory's as typed. Raises UsageError."""
    return _name_of(read_config(launch, directory), launch)


def env_file_path(config: Config, launch: Launch, directory: str) -> str | None:
    """The environment file: the command line's, else the file's, relative to `directory`. Raises UsageError."""
    if launch.env_file is not None:
        return launch.env_file
    value = _file_value(config, OPTIONS["env_file"])
    return None if value is None else os.path.join(directory, value)


def read_config(launch: Launch, directory: str) -> Config:
    """What --describe printed, or the file given with --config, else handoff.toml in `directory`, if it is there.

    Raises UsageError.
    """
    if launch.described is not None:
        return _with_underscores(DESCRIPTION, launch.described)
    path = launch.config
    shown = CONFIG_FILE if path is None else path
    if path is None:
        path = os.path.join(directory, CONFIG_FILE)
        if not os.path.lexists(path):
            return Config(shown=shown)
    text = read_small_file(path, shown)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{shown}: {_toml_problem(str(error), text)}") from None
    except RecursionError:
        raise UsageError(f"{shown}: is nested too deeply; make it flat") from None
    return _with_underscores(shown, table)


def _with_underscores(shown: str, table: Mapping[str, Any]) -> Config:
    values: dict[str, Any] = {}
    for written, value in table.items():
        key = written.replace("-", "_")
        if key in values:
            raise UsageError(f"{shown}: key {shown_value(key)} is there twice, with - and with _; leave one out")
        values[key] = value
    return Config(shown=shown, values=values)


def merge_settings(config: Config, launch: Launch, directory: str, environment: Mapping[str, str]) -> Settings:
    """Like `load_settings`, of a file that was read already."""
    for key in config.values:
        _refuse_unknown(config, key)
    values = {}
    for option in OPTIONS.values():
        if option.key in config.values:
            values[option.field] = _file_value(config, option)
    given = {field: _checked_override(field, value) for field, value in launch.overrides.items()}
    typed = {*values, *given}
    for field, value in _environment_values(environment, {*values, *given}).items():
        values[field] = value
    values |= given
    values["name"] = _name_of(config, launch)
    for field in ("env_file", *ServiceOptions.__struct_fields__):
        values.pop(field, None)
    _check_what_runs(values, given, typed, config)
    if values.get("app", "").endswith("()"):
        values |= {"app": values["app"].removesuffix("()"), "factory": True}
    for field in ("log_config", "tls_cert", "tls_key", "tls_ca"):
        if values.get(field) is not None:
            values[field] = os.path.join(directory, values[field])
    _check_tls(values)
    return Settings(**values)


def _check_what_runs(values: dict[str, Any], given: Mapping[str, Any], typed: set[str], config: Config) -> None:
    """Either an application or a command; what the command line says takes the place of the file's."""
    for one, other in (("app", "command"), ("command", "app")):
        if one in given and other not in given:
            values.pop(other, None)
    if "app" in values and "command" in values:
        raise UsageError("app and command: a service runs one of the two; leave one out")
    if "command" in values:
        useless = next((field for field in ONLY_FOR_APPLICATIONS if field in typed), None)
        if useless is not None:
            raise UsageError(f"{OPTIONS_BY_FIELD[useless].key}: is for applications and not for commands; leave it out")
        return
    if "app" not in values:
        raise UsageError(
            "no app is given; write handoff run module:attribute, or handoff run -- COMMAND, "
            f'or app = "…" in {config.shown}'
        )
    useless = next((field for field in ONLY_FOR_COMMANDS if field in typed), None)
    if useless is not None:
        raise UsageError(f"{OPTIONS_BY_FIELD[useless].key}: is for commands; leave it out for an application")


def _check_tls(values: Mapping[str, Any]) -> None:
    for one, other in (("tls_cert", "tls_key"), ("tls_key", "tls_cert"), ("tls_ca", "tls_cert")):
        if values.get(one) is not None and values.get(other) is None:
            raise UsageError(f"{one}: needs {other}, which is not given; give both")


def _toml_problem(message: str, text: str) -> str:
    """`Invalid value (at line 3, column 5)` as `line 3: invalid value (column 5)`."""
    found = _TOML_POSITION.fullmatch(message)
    if found is None:
        return one_line(message)
    problem = one_line(found.group(1)[:1].lower() + found.group(1)[1:])
    if found.group(2) is None:
        last = text.rstrip("\n").count("\n") + 1
        return f"line {last}: {problem} (at the end of the file)"
    return f"line {found.group(2)}: {problem} (column {found.group(3)})"


def _refuse_unknown(config: Config, key: str) -> None:
    if key in ONLY_ON_COMMAND_LINE:
        raise UsageError(f"{config.shown}: {key}: cannot be set in the file; {ONLY_ON_COMMAND_LINE[key]}")
    if key in OPTIONS:
        return
    near = difflib.get_close_matches(key, OPTIONS, n=1)
    hint = f'did you mean "{near[0]}"?' if near else "leave it out (settings of uvicorn go into the table [uvicorn])"
    raise UsageError(f"{config.shown}: unknown key {shown_value(key)}; {hint}")


def _value_of(config: Config, launch: Launch, key: str) -> Any:
    """The checked value of one option, the command line's before the file's; None if neither has it."""
    option = OPTIONS[key]
    if option.field in launch.overrides:
        return _checked_override(option.field, launch.overrides[option.field])
    return _file_value(config, option)


def _file_value(config: Config, option: Option) -> Any:
    if option.key not in config.values:
        return None
    value = config.values[option.key]
    try:
        converted = option.read(value)
        if converted is not None:
            option.check(converted)
    except ValueError as error:
        raise UsageError(f"{config.shown}: {option.key} = {shown_value(value)}: {error}") from None
    except UsageError as error:
        raise UsageError(f"{config.shown}: {option.key}: {error.message}") from None
    return converted


def _checked_override(field: str, value: Any) -> Any:
    option = OPTIONS_BY_FIELD[field]
    if value is None:
        return value
    try:
        option.check(value)
    except ValueError as error:
        subject = "application" if field == "app" else f"--{option.key.replace('_', '-')}"
        raise UsageError(f"{subject} {_typed(field, value)}: {error}") from None
    return value


def _environment_values(environment: Mapping[str, str], has: set[str]) -> dict[str, Any]:
    """What the two variables say that other servers honour, too, for the fields that are not set otherwise."""
    values: dict[str, Any] = {}
    workers = environment.get("WEB_CONCURRENCY", "")
    if workers and "workers" not in has:
        try:
            values["workers"] = int(workers) if re.fullmatch(r"[0-9]{1,9}", workers) else 0
            OPTIONS["workers"].check(values["workers"])
        except ValueError as error:
            raise UsageError(f"WEB_CONCURRENCY={one_line(workers)}: {error}") from None
    if "FORWARDED_ALLOW_IPS" in environment and "forwarded_allow_ips" not in has:
        values["forwarded_allow_ips"] = environment["FORWARDED_ALLOW_IPS"]
    return values


def _name_of(config: Config, launch: Launch) -> str:
    name = _value_of(config, launch, "name")
    if name is not None:
        return str(name)
    typed = os.path.basename(os.path.normpath(launch.directory))
    return _NOT_OF_A_NAME.sub("-", typed).lstrip("-.")[:MAX_NAME_LENGTH] or "app"


def _typed(field: str, value: Any) -> str:
    """A value as it was typed on the command line, about."""
    if field.endswith("_seconds"):
        return format_duration(value)
    if isinstance(value, tuple):
        return one_line(", ".join(item if isinstance(item, str) else ":".join(item) for item in value))
    return one_line(str(value)) if value != "" else "''"
