"""The options of a service: the keys of `handoff.toml`, how each is read, and what is a good value of it."""

from __future__ import annotations

import ipaddress
import json
import re
import shlex
import signal
from collections.abc import Callable
from typing import Any

import msgspec

from handoff.addresses import NO_BINDS, check_binds, parse_bind
from handoff.durations import MAX_DURATION_SECONDS, parse_duration
from handoff.errors import UsageError

MAX_WORKERS = 256
MAX_NAME_LENGTH = 64
MAX_LIST_LENGTH = 64
MAX_ARGUMENTS_BYTES = 1024 * 1024
_MAX_SHOWN_LENGTH = 80

_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{MAX_NAME_LENGTH - 1}}}")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 §5.6.2, token
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")  # RFC 9110 §5.5, field-value
_CHECK = re.compile(r"/[!-~]*|http://[!-.0-~][!-~]*")


class Option(msgspec.Struct, frozen=True, kw_only=True):
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


def one_line(text: str) -> str:
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def shown_value(value: object) -> str:
    """A value of the file as it is written there, about, and on one line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = one_line(text)
    return text if len(text) <= _MAX_SHOWN_LENGTH else text[:_MAX_SHOWN_LENGTH] + "…"


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
                raise ValueError(f"name {shown_value(name)}: expected letters, digits and _ . -")
            parse_bind(f"{name}={address}")
        return tuple(f"{name}={address}" for name, address in value.items())
    return _texts(expected)(value) or (NO_BINDS,)


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


def _read_command(value: Any) -> tuple[str, ...]:
    """A list of words, or one text, taken apart as a shell does it; no shell is started."""
    if isinstance(value, str):
        try:
            value = shlex.split(value)
        except ValueError as error:
            raise ValueError(f"expected a command ({str(error).lower()})") from None
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise ValueError("expected a command, as text or as a list of words")
    return tuple(value)


def _check_command(value: tuple[str, ...]) -> None:
    if not value or not value[0]:
        raise ValueError("expected a command and its arguments")
    if any("\0" in word for word in value):
        raise ValueError("expected words without NUL bytes")


def _is_drain_signal(value: str) -> bool:
    name = f"SIG{value.removeprefix('SIG')}"
    return name in signal.Signals.__members__ and name not in ("SIGKILL", "SIGSTOP")


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
    if value == (NO_BINDS,):
        return
    if NO_BINDS in value:
        raise ValueError(f"{NO_BINDS} is no address; expected it alone, for a service without any listener")
    check_binds([parse_bind(text) for text in value])


def _check_warm_up(value: tuple[str, ...]) -> None:
    _check_length(value)
    if not all(_CHECK.fullmatch(path) for path in value):
        raise ValueError(f"expected {_A_CHECK}")


def _check_headers(value: tuple[tuple[str, str], ...]) -> None:
    _check_length(value)
    for name, text in value:
        if not _HEADER_NAME.fullmatch(name):
            raise ValueError(f"{shown_value(name)} is not the name of a header; expected letters, digits and -")
        if not _HEADER_VALUE.fullmatch(text):
            raise ValueError(f"header {name} has a character that no header can; expected printable Latin-1")


def _check_proxy_from(value: tuple[str, ...]) -> None:
    _check_length(value)
    for one in value:
        try:
            good = one == "unix" or ipaddress.ip_network(one)
        except ValueError as error:
            raise ValueError(f"{shown_value(one)} is no network ({error}); expected {_A_NETWORK}") from None
        assert good


def _check_length(value: tuple[Any, ...]) -> None:
    if len(value) > MAX_LIST_LENGTH:
        raise ValueError(f"has {len(value)} entries; expected at most {MAX_LIST_LENGTH}")


def _check_arguments(value: dict[str, Any]) -> None:
    try:
        size = len(msgspec.json.encode(value))
    except (TypeError, RecursionError) as error:
        raise ValueError(f"expected plain data ({one_line(str(error))})") from None
    if size > MAX_ARGUMENTS_BYTES:
        raise ValueError(f"has {size} bytes as JSON; expected at most {MAX_ARGUMENTS_BYTES}")


def _check_uvicorn(value: dict[str, Any]) -> None:
    for key, item in value.items():
        instead = "reload" if key.startswith("reload") else key
        if instead in _OWNED_BY_HANDOFF:
            raise UsageError(f"{one_line(key)}: is not passed to uvicorn; {_OWNED_BY_HANDOFF[instead]}")
        if not _is_plain(item):
            raise UsageError(
                f"{one_line(key)} = {shown_value(item)}: expected text, a number, true or false, or a list"
            )


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    return isinstance(value, str | int | bool) or (isinstance(value, float) and abs(value) < float("inf"))


# The options

_SURGE = f'expected a whole number from 1 to {MAX_WORKERS}, or "all"'
_A_NETWORK = 'an address, a network such as 10.0.0.0/8, or "unix"'
_A_CHECK = "a path that begins with /, or a URL that begins with http://"


def _named(key: str, read: Callable[[Any], Any], check: Callable[[Any], None], field: str | None = None) -> Option:
    return Option(key=key, field=field or key, read=read, check=check)


def _matching(key: str, is_good: Callable[[str], object], expected: str) -> Option:
    return _named(key, _text(expected), _matches(is_good, expected))


def _choice(key: str, *choices: str) -> Option:
    return _matching(key, choices.__contains__, " or ".join(f'"{choice}"' for choice in choices))


def _flag(key: str) -> Option:
    return _named(key, _read_flag, _check_nothing)


def _number(key: str, low: int, high: int) -> Option:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"expected a whole number from {low} to {high}")
        return value

    def check(value: int) -> None:
        if not low <= value <= high:
            raise ValueError(f"expected a whole number from {low} to {high}")

    return _named(key, read, check)


def _duration(key: str, *, is_zero_good: bool) -> Option:
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
    if bind is None or bind.kind not in ("tcp", "unix") or bind.name is not None:
        raise ValueError(f"expected {_A_METRICS_ADDRESS}")


_NAME_EXPECTED = f"up to {MAX_NAME_LENGTH} letters, digits and . _ -, the first no . or -"

OPTIONS = {
    option.key: option
    for option in (
        _matching("app", _is_app, "module:attribute, for example main:app"),
        _named("command", _read_command, _check_command),
        _choice("dialect", "auto", "systemd", "server-starter", "einhorn"),
        _duration("ready_after", is_zero_good=True),
        _duration("watchdog", is_zero_good=False),
        _matching("drain_signal", _is_drain_signal, "the name of a signal, such as TERM, QUIT or USR2"),
        _flag("factory"),
        _named("bind", _read_binds, _check_binds, "binds"),
        _number("backlog", 1, 65535),
        _choice("listen_mode", "shared", "reuseport"),
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
        _number("limit_concurrency", 2, 1_000_000),
        _named("forwarded_allow_ips", _read_forwarded, _matches(str.isprintable, "printable text")),
        _choice("proxy_protocol", "off", "accept", "require"),
        _named("proxy_from", _texts(f"{_A_NETWORK}, or a list of them"), _check_proxy_from),
        *(_matching(f"tls_{file}", _is_path, "the path of a file") for file in ("cert", "key", "ca")),
        _matching("root_path", lambda path: re.fullmatch(r"(?:/[!-~]*)?", path), "a path that begins with /"),
        _named("header", _read_headers, _check_headers, "headers"),
        _flag("access_log"),
        _flag("freebind"),
        _choice("websockets", "hand-over", "close"),
        _choice("log_format", "text", "json"),
        _matching("log_config", _is_path, "the path of a file"),
        _flag("generation_header"),
        _named("uvicorn", _read_table, _check_uvicorn),
        _named("arguments", _read_table, _check_arguments),
        _matching("env_file", _is_path, "the path of a file"),
        _matching("run_dir", _is_path, "the path of a directory"),
        _matching("pidfile", _is_path, "the path of a file"),
        _matching("status_file", _is_path, "the path of a file"),
        _matching("control_group", _is_path, "the name of a group"),
        _named("metrics", _text(_A_METRICS_ADDRESS), _check_metrics),
    )
}
ONLY_FOR_COMMANDS = ("dialect", "ready_after_seconds", "watchdog_seconds", "drain_signal")
ONLY_FOR_APPLICATIONS = (
    *(
        "listen_mode",
        "factory",
        "threads",
        "interface",
        "loop",
        "warm_up",
        "keep_alive_seconds",
        "request_timeout_seconds",
    ),
    *("limit_concurrency", "forwarded_allow_ips", "root_path", "headers", "access_log", "websockets", "log_config"),
    *("generation_header", "uvicorn", "arguments", "proxy_protocol", "proxy_from", "tls_cert", "tls_key", "tls_ca"),
)
ONLY_ON_COMMAND_LINE = {
    "describe": "it stands in for the file, use --describe",
    "chdir": "the file is found by the directory, use --chdir",
    "config": "this is that file, use --config",
    "python": "use --python",
}

_KEYS_FOR = {
    "app": "app",
    "host": "bind",
    "port": "bind",
    "uds": "bind",
    "fd": "bind",
    "backlog": "backlog",
    "workers": "workers",
    "loop": "loop",
    "log_config": "log_config",
    "access_log": "access_log",
    "headers": "header",
    "root_path": "root_path",
    "factory": "factory",
    "interface": "interface",
    "limit_concurrency": "limit_concurrency",
    "timeout_keep_alive": "keep_alive",
    "timeout_graceful_shutdown": "drain_timeout",
    "env_file": "env_file",
    "forwarded_allow_ips": "forwarded_allow_ips",
}
"""What handoff has a key of its own for, by uvicorn's names."""
_HANDOFF_SETS_IT = "handoff sets it, leave it out"
_OWNED_BY_HANDOFF = {
    "app_dir": "use --chdir",
    "reload": "use handoff reload",
    "http": _HANDOFF_SETS_IT,
    "ws": _HANDOFF_SETS_IT,
} | {name: f"use the key {key} outside [uvicorn]" for name, key in _KEYS_FOR.items()}
