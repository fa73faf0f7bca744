"""The settings of a service, merged: defaults < environment (two variables) < handoff.toml < command line."""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from handoff.addresses import check_binds, parse_bind
from handoff.durations import MAX_DURATION_SECONDS, format_duration, parse_duration
from handoff.env_file import read_small_file
from handoff.errors import UsageError
from handoff.settings import Launch, Settings

CONFIG_FILE = "handoff.toml"
MAX_WORKERS = 256
MAX_NAME_LENGTH = 64
MAX_LIST_LENGTH = 64
_MAX_SHOWN_LENGTH = 80

_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{MAX_NAME_LENGTH - 1}}}")
_NOT_OF_A_NAME = re.compile(r"[^A-Za-z0-9._-]+")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 §5.6.2, token
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")  # RFC 9110 §5.5, field-value
_CHECK = re.compile(r"/[!-~]*|http://[!-.0-~][!-~]*")
_TOML_POSITION = re.compile(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", re.DOTALL)


class ServiceOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What belongs to the service as a whole and not to a generation; paths are absolute."""

    run_dir: str | None = None
    pidfile: str | None = None
    control_group: str | None = None
    metrics: str | None = None
    """An address, a relative path of a unix socket as typed."""


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration file as read: keys with underscores, values not yet checked."""

    shown: str
    """The file as it is called in messages."""
    values: dict[str, Any] = {}


class _Option(msgspec.Struct, frozen=True, kw_only=True):
    """One key of the file. `read` makes the field's value of TOML's; `check` judges it, wherever it comes from.

    Both raise ValueError that says what is expected, or a UsageError that tells its subject itself.
    """

    key: str
    field: str
    read: Callable[[Any], Any]
    check: Callable[[Any], None]


def is_service_name(text: str) -> bool:
    """Whether the text can name a service, or be the label of a version."""
    return _NAME.fullmatch(text) is not None


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
        if value is not None and key in ("run_dir", "pidfile"):
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
    value = _file_value(config, _OPTIONS["env_file"])
    return None if value is None else os.path.join(directory, value)


def read_config(launch: Launch, directory: str) -> Config:
    """The file given with --config, else handoff.toml in `directory`, which need not be there. Raises UsageError."""
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
    values: dict[str, Any] = {}
    for written, value in table.items():
        key = written.replace("-", "_")
        if key in values:
            raise UsageError(f"{shown}: key {_shown(key)} is there twice, with - and with _; leave one out")
        values[key] = value
    return Config(shown=shown, values=values)


def merge_settings(config: Config, launch: Launch, directory: str, environment: Mapping[str, str]) -> Settings:
    """Like `load_settings`, of a file that was read already."""
    for key in config.values:
        _refuse_unknown(config, key)
    values = {}
    for option in _OPTIONS.values():
        if option.key in config.values:
            values[option.field] = _file_value(config, option)
    given = {field: _checked_override(field, value) for field, value in launch.overrides.items()}
    for field, value in _environment_values(environment, {*values, *given}).items():
        values[field] = value
    values |= given
    values["name"] = _name_of(config, launch)
    for field in ("env_file", *ServiceOptions.__struct_fields__):
        values.pop(field, None)
    if "app" not in values:
        raise UsageError(f'no app is given; write handoff run module:attribute, or app = "…" in {config.shown}')
    if values["app"].endswith("()"):
        values |= {"app": values["app"].removesuffix("()"), "factory": True}
    if values.get("log_config") is not None:
        values["log_config"] = os.path.join(directory, values["log_config"])
    return Settings(**values)


def _toml_problem(message: str, text: str) -> str:
    """`Invalid value (at line 3, column 5)` as `line 3: invalid value (column 5)`."""
    found = _TOML_POSITION.fullmatch(message)
    if found is None:
        return _one_line(message)
    problem = _one_line(found.group(1)[:1].lower() + found.group(1)[1:])
    if found.group(2) is None:
        last = text.rstrip("\n").count("\n") + 1
        return f"line {last}: {problem} (at the end of the file)"
    return f"line {found.group(2)}: {problem} (column {found.group(3)})"


def _one_line(text: str) -> str:
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _refuse_unknown(config: Config, key: str) -> None:
    if key in _ONLY_ON_COMMAND_LINE:
        raise UsageError(f"{config.shown}: {key}: cannot be set in the file; {_ONLY_ON_COMMAND_LINE[key]}")
    if key in _OPTIONS:
        return
    near = difflib.get_close_matches(key, _OPTIONS, n=1)
    hint = f'did you mean "{near[0]}"?' if near else "leave it out (settings of uvicorn go into the table [uvicorn])"
    raise UsageError(f"{config.shown}: unknown key {_shown(key)}; {hint}")


def _value_of(config: Config, launch: Launch, key: str) -> Any:
    """The checked value of one option, the command line's before the file's; None if neither has it."""
    option = _OPTIONS[key]
    if option.field in launch.overrides:
        return _checked_override(option.field, launch.overrides[option.field])
    return _file_value(config, option)


def _file_value(config: Config, option: _Option) -> Any:
    if option.key not in config.values:
        return None
    value = config.values[option.key]
    try:
        converted = option.read(value)
        if converted is not None:
            option.check(converted)
    except ValueError as error:
        raise UsageError(f"{config.shown}: {option.key} = {_shown(value)}: {error}") from None
    except UsageError as error:
        raise UsageError(f"{config.shown}: {option.key}: {error.message}") from None
    return converted


def _checked_override(field: str, value: Any) -> Any:
    option = _OPTIONS_BY_FIELD[field]
    if value is None:
        return value
    try:
        option.check(value)
    except ValueError as error:
        raise UsageError(f"--{option.key.replace('_', '-')} {_typed(field, value)}: {error}") from None
    return value


def _environment_values(environment: Mapping[str, str], has: set[str]) -> dict[str, Any]:
    """What the two variables say that other servers honour, too, for the fields that are not set otherwise."""
    values: dict[str, Any] = {}
    workers = environment.get("WEB_CONCURRENCY", "")
    if workers and "workers" not in has:
        try:
            values["workers"] = int(workers) if re.fullmatch(r"[0-9]{1,9}", workers) else 0
            _OPTIONS["workers"].check(values["workers"])
        except ValueError as error:
            raise UsageError(f"WEB_CONCURRENCY={_one_line(workers)}: {error}") from None
    if "FORWARDED_ALLOW_IPS" in environment and "forwarded_allow_ips" not in has:
        values["forwarded_allow_ips"] = environment["FORWARDED_ALLOW_IPS"]
    return values


def _name_of(config: Config, launch: Launch) -> str:
    name = _value_of(config, launch, "name")
    if name is not None:
        return str(name)
    typed = os.path.basename(os.path.normpath(launch.directory))
    return _NOT_OF_A_NAME.sub("-", typed).lstrip("-.")[:MAX_NAME_LENGTH] or "app"


def _shown(value: object) -> str:
    """A value of the file as it is written there, about, and on one line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = _one_line(text)
    return text if len(text) <= _MAX_SHOWN_LENGTH else text[:_MAX_SHOWN_LENGTH] + "…"


def _typed(field: str, value: Any) -> str:
    """A value as it was typed on the command line, about."""
    if field.endswith("_seconds"):
        return format_duration(value)
    if isinstance(value, tuple):
        return _one_line(", ".join(item if isinstance(item, str) else ":".join(item) for item in value))
    return _one_line(str(value))


# How values are read from TOML


def _text(expected: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError(f"expected {expected}")
        return value

    return read


def _texts(expected: str) -> Callable[[Any], tuple[str, ...]]:
    def read(value: Any) -> tuple[str, ...]:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise ValueError(f"expected {expected}")
        return tuple(items)

    return read


def _read_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def _read_duration(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError('expected a duration such as "30s"')
    return parse_duration(str(value))


def _read_surge(value: Any) -> int | None:
    if value == "all":
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(_SURGE)
    return value


def _read_binds(value: Any) -> tuple[str, ...]:
    expected = "an address, a list of addresses, or a table of names and addresses"
    if isinstance(value, dict):
        _texts(expected)(list(value.values()))
        for name, address in value.items():
            if not name or "=" in name or ":" in name:
                raise ValueError(f"name {_shown(name)}: expected letters, digits and _ . -")
            parse_bind(f"{name}={address}")
        return tuple(f"{name}={address}" for name, address in value.items())
    return _texts(expected)(value)


def _read_headers(value: Any) -> tuple[tuple[str, str], ...]:
    expected = 'a table of names and values, or a list of "NAME: VALUE"'
    if isinstance(value, dict):
        _texts(expected)(list(value.values()))
        return tuple(value.items())
    lines = _texts(expected)(value)
    if not all(":" in line for line in lines):
        raise ValueError(f"expected {expected}")
    return tuple((name.strip(), text.strip()) for name, _, text in (line.partition(":") for line in lines))


def _read_forwarded(value: Any) -> str:
    return ",".join(_texts('an address, a list of addresses, or "*"')(value))


def _read_table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("expected a table")
    return value


# How values are checked, wherever they come from


def _check_nothing(value: Any) -> None:
    """For values of which every one that can be read is good."""


def _matches(is_good: Callable[[str], object], expected: str) -> Callable[[str], None]:
    def check(value: str) -> None:
        if not is_good(value):
            raise ValueError(f"expected {expected}")

    return check


def _is_app(value: str) -> bool:
    module, colon, attribute = value.removesuffix("()").partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), *attribute.split(".")))


def _is_path(value: str) -> bool:
    return bool(value) and value.isprintable()


def _check_binds(value: tuple[str, ...]) -> None:
    _check_length(value)
    check_binds([parse_bind(text) for text in value])


def _check_warm_up(value: tuple[str, ...]) -> None:
    _check_length(value)
    if not all(_CHECK.fullmatch(path) for path in value):
        raise ValueError(f"expected {_A_CHECK}")


def _check_headers(value: tuple[tuple[str, str], ...]) -> None:
    _check_length(value)
    for name, text in value:
        if not _HEADER_NAME.fullmatch(name):
            raise ValueError(f"{_shown(name)} is not the name of a header; expected letters, digits and -")
        if not _HEADER_VALUE.fullmatch(text):
            raise ValueError(f"header {name} has a character that no header can; expected printable Latin-1")


def _check_length(value: tuple[Any, ...]) -> None:
    if len(value) > MAX_LIST_LENGTH:
        raise ValueError(f"has {len(value)} entries; expected at most {MAX_LIST_LENGTH}")


def _check_uvicorn(value: dict[str, Any]) -> None:
    for key, item in value.items():
        instead = "reload" if key.startswith("reload") else key
        if instead in _OWNED_BY_HANDOFF:
            raise UsageError(f"{_one_line(key)}: is not passed to uvicorn; {_OWNED_BY_HANDOFF[instead]}")
        if not _is_plain(item):
            raise UsageError(f"{_one_line(key)} = {_shown(item)}: expected text, a number, true or false, or a list")


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    return isinstance(value, str | int | bool) or (isinstance(value, float) and abs(value) < float("inf"))


# The options

_SURGE = f'expected a whole number from 1 to {MAX_WORKERS}, or "all"'
_A_CHECK = "a path that begins with /, or a URL that begins with http://"


def _named(key: str, read: Callable[[Any], Any], check: Callable[[Any], None], field: str | None = None) -> _Option:
    return _Option(key=key, field=field or key, read=read, check=check)


def _matching(key: str, is_good: Callable[[str], object], expected: str) -> _Option:
    return _named(key, _text(expected), _matches(is_good, expected))


def _choice(key: str, *choices: str) -> _Option:
    return _matching(key, choices.__contains__, " or ".join(f'"{choice}"' for choice in choices))


def _flag(key: str) -> _Option:
    return _named(key, _read_flag, _check_nothing)


def _number(key: str, low: int, high: int) -> _Option:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"expected a whole number from {low} to {high}")
        return value

    def check(value: int) -> None:
        if not low <= value <= high:
            raise ValueError(f"expected a whole number from {low} to {high}")

    return _named(key, read, check)


def _duration(key: str, *, is_zero_good: bool) -> _Option:
    def check(seconds: float) -> None:
        if not (seconds > 0 or (is_zero_good and seconds == 0)):
            raise ValueError(f"expected a duration {'of 0s or more' if is_zero_good else 'above 0s'}")
        if seconds > MAX_DURATION_SECONDS:
            raise ValueError("expected a duration of at most 168h")

    return _named(key, _read_duration, check, f"{key}_seconds")


def _check_surge(value: int) -> None:
    if not 1 <= value <= MAX_WORKERS:
        raise ValueError(_SURGE)


_A_METRICS_ADDRESS = "HOST:PORT, [V6]:PORT or unix:PATH"


def _check_metrics(value: str) -> None:
    try:
        bind = parse_bind(value)
    except UsageError:
        bind = None
    if bind is None or bind.kind == "fd" or bind.name is not None:
        raise ValueError(f"expected {_A_METRICS_ADDRESS}")


_NAME_EXPECTED = f"up to {MAX_NAME_LENGTH} letters, digits and . _ -, the first no . or -"

_OPTIONS = {
    option.key: option
    for option in (
        _matching("app", _is_app, "module:attribute"),
        _flag("factory"),
        _named("bind", _read_binds, _check_binds, "binds"),
        _number("backlog", 1, 65535),
        _number("workers", 1, MAX_WORKERS),
        _number("threads", 1, 1000),
        _choice("interface", "auto", "asgi", "wsgi", "handoff"),
        _choice("loop", "uvloop", "asyncio"),
        _matching("name", is_service_name, _NAME_EXPECTED),
        _matching("label", is_service_name, _NAME_EXPECTED),
        _matching("check", _CHECK.fullmatch, _A_CHECK),
        _duration("check_timeout", is_zero_good=False),
        _named("warm_up", _texts(f"{_A_CHECK}, or a list of them"), _check_warm_up),
        _duration("boot_timeout", is_zero_good=False),
        _duration("probation", is_zero_good=True),
        _named("surge", _read_surge, _check_surge),
        _duration("drain_timeout", is_zero_good=True),
        _duration("stop_timeout", is_zero_good=True),
        _number("max_generations", 2, 100),
        _duration("keep_alive", is_zero_good=True),
        _duration("request_timeout", is_zero_good=False),
        _number("limit_concurrency", 1, 1_000_000),
        _named("forwarded_allow_ips", _read_forwarded, _matches(str.isprintable, "printable text")),
        _matching("root_path", lambda path: re.fullmatch(r"(?:/[!-~]*)?", path), "a path that begins with /"),
        _named("header", _read_headers, _check_headers, "headers"),
        _flag("access_log"),
        _choice("websockets", "hand-over", "close"),
        _choice("log_format", "text", "json"),
        _matching("log_config", _is_path, "the path of a file"),
        _flag("generation_header"),
        _named("uvicorn", _read_table, _check_uvicorn),
        _matching("env_file", _is_path, "the path of a file"),
        _matching("run_dir", _is_path, "the path of a directory"),
        _matching("pidfile", _is_path, "the path of a file"),
        _matching("control_group", _is_path, "the name of a group"),
        _named("metrics", _text(_A_METRICS_ADDRESS), _check_metrics),
    )
}
_OPTIONS_BY_FIELD = {option.field: option for option in _OPTIONS.values()}

_ONLY_ON_COMMAND_LINE = {
    "chdir": "the file is found by the directory, use --chdir",
    "config": "this is that file, use --config",
    "python": "use --python",
}

_HANDOFF_SETS_IT = "handoff sets it, leave it out"
_OWNED_BY_HANDOFF = {
    "app": "use app",
    "app_dir": "use --chdir",
    "host": "use bind",
    "port": "use bind",
    "uds": "use bind",
    "fd": "use bind",
    "backlog": "use backlog",
    "workers": "use workers",
    "reload": "use handoff reload",
    "loop": "use loop",
    "http": _HANDOFF_SETS_IT,
    "ws": _HANDOFF_SETS_IT,
    "log_config": "use log_config",
    "access_log": "use access_log",
    "headers": "use header",
    "root_path": "use root_path",
    "factory": "use factory",
    "interface": "use interface",
    "limit_concurrency": "use limit_concurrency",
    "timeout_keep_alive": "use keep_alive",
    "timeout_graceful_shutdown": "use drain_timeout",
    "env_file": "use env_file",
    "forwarded_allow_ips": "use forwarded_allow_ips",
}
