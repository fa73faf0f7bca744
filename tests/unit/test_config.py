"""Configuration: every key, every refusal, and who wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from handoff.config import (
    ServiceOptions,
    env_file_path,
    load_service_options,
    load_settings,
    read_config,
    service_name,
)
from handoff.errors import ExitCode, UsageError
from handoff.settings import Launch, Settings


def _launch(directory: Path | str, **overrides: Any) -> Launch:
    return Launch(
        overrides=overrides,
        directory=str(directory),
        python="/usr/bin/python3",
        config=None,
        env_file=None,
        environment={},
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "shop"
    made.mkdir()
    return made


def _write(directory: Path, text: str) -> None:
    (directory / "handoff.toml").write_text(text, encoding="utf-8")


def _load(directory: Path, text: str = "", environment: dict[str, str] | None = None, **overrides: Any) -> Settings:
    _write(directory, text)
    return load_settings(_launch(directory, **{"app": "m:app", **overrides}), str(directory), environment or {})


def _refusal(directory: Path, text: str = "", environment: dict[str, str] | None = None, **overrides: Any) -> str:
    with pytest.raises(UsageError) as caught:
        _load(directory, text, environment, **overrides)
    assert caught.value.exit_code is ExitCode.USAGE
    assert caught.value.message.isprintable()
    return caught.value.message


def test_without_a_file_there_are_the_defaults(directory: Path) -> None:
    settings = load_settings(_launch(directory, app="m:app"), str(directory), {})
    assert settings == Settings(app="m:app", name="shop")


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ('app = "shop.web:app"', "app", "shop.web:app"),
        ("factory = true", "factory", True),
        ('bind = "127.0.0.1:80"', "binds", ("127.0.0.1:80",)),
        ('bind = ["web=:80", "unix:/a?mode=0660"]', "binds", ("web=:80", "unix:/a?mode=0660")),
        ('bind = {web = ":80", api = "unix:/a=b"}', "binds", ("web=:80", "api=unix:/a=b")),
        ("bind = []", "binds", ("none",)),
        ('bind = "none"', "binds", ("none",)),
        ("backlog = 65535", "backlog", 65535),
        ("workers = 256", "workers", 256),
        ("threads = 1000", "threads", 1000),
        ("freebind = true", "freebind", True),
        ("arguments = { a = [1, { b = 2 }] }", "arguments", {"a": [1, {"b": 2}]}),
        ('interface = "wsgi"', "interface", "wsgi"),
        ('loop = "asyncio"', "loop", "asyncio"),
        ('name = "web_1.2-b"', "name", "web_1.2-b"),
        ('label = "v1.2"', "label", "v1.2"),
        ('check = "/health?deep=1"', "check", "/health?deep=1"),
        ('check = "http://shop.example/health"', "check", "http://shop.example/health"),
        ('check_timeout = "5s"', "check_timeout_seconds", 5.0),
        ('warm_up = "/"', "warm_up", ("/",)),
        ('warm-up = ["/a", "/b"]', "warm_up", ("/a", "/b")),
        ('boot_timeout = "2m"', "boot_timeout_seconds", 120.0),
        ('probation = "0s"', "probation_seconds", 0.0),
        ("surge = 2", "surge", 2),
        ('surge = "all"', "surge", None),
        ('drain_timeout = "200ms"', "drain_timeout_seconds", 0.2),
        ('stop-timeout = "10s"', "stop_timeout_seconds", 10.0),
        ("max_generations = 2", "max_generations", 2),
        ('keep_alive = "5s"', "keep_alive_seconds", 5.0),
        ('request_timeout = "1h"', "request_timeout_seconds", 3600.0),
        ("limit_concurrency = 100", "limit_concurrency", 100),
        ('forwarded_allow_ips = "*"', "forwarded_allow_ips", "*"),
        ('forwarded_allow_ips = ["10.0.0.1", "10.1.0.0/16"]', "forwarded_allow_ips", "10.0.0.1,10.1.0.0/16"),
        ('root_path = "/shop"', "root_path", "/shop"),
        ('header = ["X-A: 1", "X-B:http://x"]', "headers", (("X-A", "1"), ("X-B", "http://x"))),
        ('header = {X-A = "1"}', "headers", (("X-A", "1"),)),
        ("access_log = false", "access_log", False),
        ('log_format = "json"', "log_format", "json"),
        ('log_config = "/etc/log.json"', "log_config", "/etc/log.json"),
        ("generation_header = true", "generation_header", True),
        (
            '[uvicorn]\nlifespan = "off"\nssl_keyfile = "k"\nproxy_headers = false\nh11_max_incomplete_event_size = 9',
            "uvicorn",
            {"lifespan": "off", "ssl_keyfile": "k", "proxy_headers": False, "h11_max_incomplete_event_size": 9},
        ),
    ],
)
def test_each_key_of_the_file_is_read(directory: Path, line: str, field: str, value: object) -> None:
    _write(directory, line)
    overrides = {} if field == "app" else {"app": "m:app"}
    settings = load_settings(_launch(directory, **overrides), str(directory), {})
    assert getattr(settings, field) == value
    # As the worker gets it.
    assert msgspec.json.decode(msgspec.json.encode(settings), type=Settings) == settings


def test_keys_that_are_the_services_do_not_disturb_the_settings(directory: Path) -> None:
    text = 'run_dir = "run"\npidfile = "p"\ncontrol_group = "g"\nenv_file = "e"\n'
    assert _load(directory, text, run_dir="/r", pidfile=None) == Settings(app="m:app", name="shop")


def test_the_command_line_wins_over_the_file_and_the_file_over_the_environment(directory: Path) -> None:
    environment = {"WEB_CONCURRENCY": "3", "FORWARDED_ALLOW_IPS": "10.0.0.1"}
    assert _load(directory).workers == 1
    settings = _load(directory, environment=environment)
    assert (settings.workers, settings.forwarded_allow_ips) == (3, "10.0.0.1")
    settings = _load(directory, 'workers = 4\nforwarded_allow_ips = "*"', environment)
    assert (settings.workers, settings.forwarded_allow_ips) == (4, "*")
    settings = _load(directory, "workers = 4", environment, workers=5, forwarded_allow_ips="::1")
    assert (settings.workers, settings.forwarded_allow_ips) == (5, "::1")


def test_an_override_of_none_means_all_at_once(directory: Path) -> None:
    assert _load(directory, "surge = 2", surge=None).surge is None


def test_an_empty_web_concurrency_counts_as_unset_and_an_empty_list_of_proxies_as_none(directory: Path) -> None:
    settings = _load(directory, environment={"WEB_CONCURRENCY": "", "FORWARDED_ALLOW_IPS": ""})
    assert (settings.workers, settings.forwarded_allow_ips) == (1, "")


@pytest.mark.parametrize("value", ["many", "0", "257", "-1", "1.5", "9" * 20])
def test_a_web_concurrency_that_is_none_is_refused(directory: Path, value: str) -> None:
    message = f"WEB_CONCURRENCY={value}: expected a whole number from 1 to 256"
    assert _refusal(directory, environment={"WEB_CONCURRENCY": value}) == message


def test_a_factory_in_parentheses_is_a_factory(directory: Path) -> None:
    settings = _load(directory, app="m:make()")
    assert (settings.app, settings.factory) == ("m:make", True)


def test_a_log_config_is_looked_for_in_the_directory(directory: Path) -> None:
    assert _load(directory, 'log_config = "log.json"').log_config == f"{directory}/log.json"


def test_without_an_app_it_says_where_to_give_one(directory: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_settings(_launch(directory), str(directory), {})
    assert caught.value.message == (
        'no app is given; write handoff run module:attribute, or handoff run -- COMMAND, or app = "…" in handoff.toml'
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("worker = 2", 'unknown key "worker"; did you mean "workers"?'),
        ('check-time-out = "1s"', 'unknown key "check_time_out"; did you mean "check_timeout"?'),
        ('zzz = "1s"', 'unknown key "zzz"; leave it out (settings of uvicorn go into the table [uvicorn])'),
        ('chdir = "x"', "chdir: cannot be set in the file; the file is found by the directory, use --chdir"),
        ('python = "x"', "python: cannot be set in the file; use --python"),
        ('config = "x"', "config: cannot be set in the file; this is that file, use --config"),
        (
            'warm-up = "/"\nwarm_up = "/"',
            'key "warm_up" is there twice, with - and with _; leave one out',
        ),
    ],
)
def test_a_key_that_cannot_be_there_is_named(directory: Path, line: str, message: str) -> None:
    assert _refusal(directory, line) == f"handoff.toml: {message}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('app = "app"', 'app = "app": expected module:attribute, for example main:app'),
        ('app = "a b:app"', 'app = "a b:app": expected module:attribute, for example main:app'),
        ("app = 1", "app = 1: expected module:attribute, for example main:app"),
        ('factory = "yes"', 'factory = "yes": expected true or false'),
        ("bind = 80", "bind = 80: expected an address, a list of addresses, or a table of names and addresses"),
        ('bind = "127.0.0.1"', "bind: bind 127.0.0.1: has no port; write 127.0.0.1:8000"),
        ('bind = [":1", ":1"]', "bind: bind 0.0.0.0:1: is there twice; leave one out"),
        ('bind = {web = ":99999"}', "bind: bind web=:99999: port 99999 is out of range; write 0 to 65535"),
        ('bind = {"" = ":80"}', 'bind = {"": ":80"}: name "": expected letters, digits and _ . -'),
        ('bind = {"unix:x" = "y"}', 'bind = {"unix:x": "y"}: name "unix:x": expected letters, digits and _ . -'),
        ("arguments = 1", "arguments = 1: expected a table"),
        ("backlog = 0", "backlog = 0: expected a whole number from 1 to 65535"),
        ("workers = 257", "workers = 257: expected a whole number from 1 to 256"),
        ('workers = "2"', 'workers = "2": expected a whole number from 1 to 256'),
        ("workers = true", "workers = true: expected a whole number from 1 to 256"),
        ("workers = 2.0", "workers = 2.0: expected a whole number from 1 to 256"),
        ("threads = 1001", "threads = 1001: expected a whole number from 1 to 1000"),
        ('interface = "rsgi"', 'interface = "rsgi": expected "auto" or "asgi" or "wsgi" or "handoff"'),
        ('loop = "auto"', 'loop = "auto": expected "uvloop" or "asyncio"'),
        ('name = "-x"', 'name = "-x": expected up to 64 letters, digits and . _ -, the first no . or -'),
        ('label = "a;b"', 'label = "a;b": expected up to 64 letters, digits and . _ -, the first no . or -'),
        (
            'check = "health"',
            'check = "health": expected a path that begins with /, or a URL that begins with http://',
        ),
        (
            'check = "http:///x"',
            'check = "http:///x": expected a path that begins with /, or a URL that begins with http://',
        ),
        (
            'warm_up = ["/a b"]',
            'warm_up = ["/a b"]: expected a path that begins with /, or a URL that begins with http://',
        ),
        ("boot_timeout = 30", "boot_timeout: duration 30: has no unit; write 30s, 200ms or 2m"),
        ('boot_timeout = "0s"', 'boot_timeout = "0s": expected a duration above 0s'),
        ("boot_timeout = []", 'boot_timeout = []: expected a duration such as "30s"'),
        ("surge = 0", 'surge = 0: expected a whole number from 1 to 256, or "all"'),
        ('surge = "some"', 'surge = "some": expected a whole number from 1 to 256, or "all"'),
        ("max_generations = 1", "max_generations = 1: expected a whole number from 2 to 100"),
        ("limit_concurrency = 0", "limit_concurrency = 0: expected a whole number from 2 to 1000000"),
        (
            "forwarded_allow_ips = 1",
            'forwarded_allow_ips = 1: expected an address, a list of addresses, or "*"',
        ),
        ('root_path = "shop"', 'root_path = "shop": expected a path that begins with /'),
        (
            'header = "X-A"',
            'header = "X-A": expected a table of names and values, or a list of "NAME: VALUE"',
        ),
        (
            "header = {X-A = 1}",
            'header = {"X-A": 1}: expected a table of names and values, or a list of "NAME: VALUE"',
        ),
        (
            'header = ["X A: 1"]',
            'header = ["X A: 1"]: "X A" is not the name of a header; expected letters, digits and -',
        ),
        (
            'header = {X-A = "1\\r\\nX-B: 2"}',
            'header = {"X-A": "1\\r\\nX-B: 2"}: header X-A has a character that no header can;'
            " expected printable Latin-1",
        ),
        (
            'header = {X-A = "€"}',
            'header = {"X-A": "€"}: header X-A has a character that no header can; expected printable Latin-1',
        ),
        ('log_format = "xml"', 'log_format = "xml": expected "text" or "json"'),
        ('log_config = ""', 'log_config = "": expected the path of a file'),
        ("uvicorn = 1", "uvicorn = 1: expected a table"),
        ("[uvicorn]\nport = 80", "uvicorn: port: is not passed to uvicorn; use the key bind outside [uvicorn]"),
        ("[uvicorn]\nreload_dirs = []", "uvicorn: reload_dirs: is not passed to uvicorn; use handoff reload"),
        ('[uvicorn]\nhttp = "h11"', "uvicorn: http: is not passed to uvicorn; handoff sets it, leave it out"),
        (
            "[uvicorn]\ntimeout_keep_alive = 1",
            "uvicorn: timeout_keep_alive: is not passed to uvicorn; use the key keep_alive outside [uvicorn]",
        ),
        (
            "[uvicorn]\nx = 1979-05-27",
            'uvicorn: x = "1979-05-27": expected text, a number, true or false, or a list',
        ),
    ],
)
def test_a_value_that_cannot_be_is_named_with_what_is_expected(directory: Path, line: str, message: str) -> None:
    assert _refusal(directory, line) == f"handoff.toml: {message}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"workers": 0}, "--workers 0: expected a whole number from 1 to 256"),
        ({"boot_timeout_seconds": 0.0}, "--boot-timeout 0s: expected a duration above 0s"),
        ({"drain_timeout_seconds": -1.0}, "--drain-timeout -1s: expected a duration of 0s or more"),
        ({"binds": ("127.0.0.1",)}, "bind 127.0.0.1: has no port; write 127.0.0.1:8000"),
        (
            {"binds": ("none", ":80")},
            "--bind none, :80: none is no address; expected it alone, for a service without any listener",
        ),
        ({"binds": ("a=:80", "b=:80")}, "bind 0.0.0.0:80: is there twice; leave one out"),
        ({"name": "a/b"}, "--name a/b: expected up to 64 letters, digits and . _ -, the first no . or -"),
        (
            {"warm_up": ("/ok", "x")},
            "--warm-up /ok, x: expected a path that begins with /, or a URL that begins with http://",
        ),
        (
            {"headers": (("X-A", "1\r\n"),)},
            "--header X-A:1\\r\\n: header X-A has a character that no header can; expected printable Latin-1",
        ),
        ({"surge": 0}, '--surge 0: expected a whole number from 1 to 256, or "all"'),
        ({"app": "app"}, "application app: expected module:attribute, for example main:app"),
        ({"warm_up": ("/",) * 65}, f"--warm-up {', '.join('/' * 65)}: has 65 entries; expected at most 64"),
    ],
)
def test_what_the_command_line_gives_is_held_to_the_same_limits(
    directory: Path, overrides: dict[str, Any], message: str
) -> None:
    assert _refusal(directory, "", **overrides) == message


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("workers = 2\n\nthreads 3\n", "line 3: expected '=' after a key"),
        ('workers = 2\nname = "x', "line 2: "),
        ("workers = 2\nworkers = 3\n", "line 2: cannot overwrite a value"),
        ('name = "\x01"', "line 1: "),
        ("x = " + "[" * 5000, "is nested too deeply; make it flat"),
    ],
)
def test_a_syntax_error_is_named_with_its_line(directory: Path, text: str, start: str) -> None:
    assert _refusal(directory, text).startswith(f"handoff.toml: {start}")


def test_a_file_that_is_not_utf_8_is_named_with_its_line(directory: Path) -> None:
    (directory / "handoff.toml").write_bytes(b"workers = 2\nname = '\xff'\n")
    with pytest.raises(UsageError) as caught:
        load_settings(_launch(directory, app="m:app"), str(directory), {})
    assert caught.value.message == "handoff.toml: line 2: is not UTF-8; save the file as UTF-8"


def test_a_file_that_cannot_be_read_is_one_line(directory: Path) -> None:
    (directory / "handoff.toml").symlink_to(directory / "gone")
    with pytest.raises(UsageError) as caught:
        load_settings(_launch(directory, app="m:app"), str(directory), {})
    assert caught.value.message == "handoff.toml: does not exist; create it or give another one"


def test_a_file_given_with_config_must_be_there_and_is_named_as_given(directory: Path) -> None:
    launch = msgspec.structs.replace(_launch(directory, app="m:app"), config=f"{directory}/other.toml")
    with pytest.raises(UsageError) as caught:
        load_settings(launch, str(directory), {})
    assert caught.value.message == f"{directory}/other.toml: does not exist; create it or give another one"
    _write(directory, "workers = 2")
    (directory / "other.toml").write_text("workers = 3")
    assert load_settings(launch, str(directory), {}).workers == 3


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("/srv/shop", "shop"),
        ("/srv/shop/", "shop"),
        ("/srv/shop/.", "shop"),
        ("/srv/my shop!", "my-shop-"),
        ("/srv/.hidden", "hidden"),
        ("/srv/größe", "gr-e"),
        ("/srv/" + "x" * 80, "x" * 64),
        ("/", "app"),
        ("/srv/---", "app"),
    ],
)
def test_the_name_comes_from_the_directory_as_typed(directory: Path, typed: str, name: str) -> None:
    launch = _launch(typed)
    assert service_name(launch, str(directory)) == name


def test_the_name_of_the_command_line_wins_over_the_files_and_that_over_the_directorys(directory: Path) -> None:
    assert service_name(_launch(directory), str(directory)) == "shop"
    _write(directory, 'name = "file"\nworkers = "broken, but not asked for"')
    assert service_name(_launch(directory), str(directory)) == "file"
    assert service_name(_launch(directory, name="typed"), str(directory)) == "typed"


def test_the_services_options_come_from_the_command_line_or_the_file(directory: Path) -> None:
    assert load_service_options(_launch(directory), str(directory)) == ServiceOptions()
    _write(directory, 'run_dir = "run"\npidfile = "/run/p"\ncontrol_group = "www"\nworkers = "broken"')
    assert load_service_options(_launch("/typed/current"), str(directory)) == ServiceOptions(
        run_dir="/typed/current/run", pidfile="/run/p", control_group="www"
    )
    launch = _launch(directory, run_dir="/r", pidfile="/p", control_group="adm")
    assert load_service_options(launch, str(directory)) == ServiceOptions(
        run_dir="/r", pidfile="/p", control_group="adm"
    )


def test_a_service_option_that_cannot_be_is_named(directory: Path) -> None:
    _write(directory, "run_dir = 1")
    with pytest.raises(UsageError) as caught:
        load_service_options(_launch(directory), str(directory))
    assert caught.value.message == "handoff.toml: run_dir = 1: expected the path of a directory"


def test_the_environment_file_of_the_command_line_wins_over_the_files(directory: Path) -> None:
    launch = _launch(directory)
    assert env_file_path(read_config(launch, str(directory)), launch, str(directory)) is None
    _write(directory, 'env_file = "web.env"')
    config = read_config(launch, str(directory))
    assert env_file_path(config, launch, str(directory)) == f"{directory}/web.env"
    launch = msgspec.structs.replace(launch, env_file="/typed.env")
    assert env_file_path(config, launch, str(directory)) == "/typed.env"
