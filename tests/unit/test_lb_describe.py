"""What a balancer's service is: the description of a file, or of what was typed, as the master reads it."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from handoff.cli.run import run as run_service
from handoff.config import load_settings
from handoff.errors import UsageError
from handoff.settings import Launch, Settings
from lb.cli.run import _OTHER_DEFAULTS, _PASSED, prepare, run
from lb.core.model import Balancer
from lb.core.reloading import taken_in_place
from lb.describe import describe, state_directory
from lb.source import Source, load, words

FILE = """
[balancer]
name = "edge"
relays = 2
admin = "127.0.0.1:8404"
freebind = true
state = "kept"

[[service]]
name = "shop"
listen = ["127.0.0.1:8080", "[::1]:8080"]
[service.pool.blue]
backends = ["10.0.0.1:8000", { name = "b2", address = "unix:b2.sock", weight = 2 }]

[[service]]
name = "mail"
listen = "unix:mail.sock"
[service.pool.main]
backends = []
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    path = tmp_path / "lb.toml"
    path.write_text(FILE)
    return path


def settings_of(described: dict[str, Any], directory: str) -> Settings:
    launch = Launch(
        overrides={}, directory=directory, python=sys.executable, config=None, env_file=None, environment={}
    )
    return load_settings(msgspec.structs.replace(launch, described=described), directory, {})


def test_the_description_of_a_file_is_a_good_configuration_of_handoff(file: Path) -> None:
    settings = settings_of(describe(Source(file=str(file))), str(file.parent))
    assert (settings.name, settings.app, settings.interface) == ("edge", "lb.relay.worker:main", "handoff")
    assert (settings.workers, settings.freebind, settings.drain_timeout_seconds) == (2, True, 3600.0)
    assert settings.binds == ("shop.0=127.0.0.1:8080", "shop.1=[::1]:8080", "mail.0=unix:mail.sock")
    controller = settings.companions["controller"]
    assert (controller.app, controller.interface) == ("lb.control.main:main", "handoff")
    assert controller.binds == ("admin=127.0.0.1:8404",)
    assert settings.arguments["shown"] == str(file)
    assert settings.arguments["state"] == str(file.parent / "kept")


def test_the_arguments_hold_the_whole_balancer_also_for_the_companion(file: Path) -> None:
    settings = settings_of(describe(Source(file=str(file))), str(file.parent))
    carried = msgspec.json.decode(msgspec.json.encode(settings.of_companion("controller").arguments))
    assert msgspec.convert(carried["balancer"], Balancer) == load(Source(file=str(file)))


def test_without_an_admin_address_the_controller_listens_nowhere(file: Path) -> None:
    described = describe(Source(listen=(":8080",), backend=("10.0.0.1:80",)))
    assert settings_of(described, str(file.parent)).companions["controller"].binds == ()


def test_what_was_typed_makes_one_service_with_one_pool(file: Path) -> None:
    source = Source(
        listen=("127.0.0.1:80", "[::1]:80"),
        backend=("10.0.0.1:80", "b=10.0.0.2:80", "unix:/run/a=b.sock"),
        algorithm="leastconn",
        check="/health",
        send_proxy="v2",
        relays=3,
    )
    balancer = load(source)
    (service,) = balancer.services
    assert (balancer.name, balancer.relays, service.name, service.active) == ("lb", 3, "lb", "main")
    assert (service.algorithm, service.send_proxy) == ("leastconn", "v2")
    assert service.check is not None
    assert (service.check.type, service.check.path) == ("http", "/health")
    assert [(one.name, one.address) for one in service.pools["main"]] == [
        ("10.0.0.1:80", "10.0.0.1:80"),
        ("b", "10.0.0.2:80"),
        ("unix:/run/a=b.sock", "unix:/run/a=b.sock"),
    ]
    assert set(describe(source)["bind"]) == {"lb.0", "lb.1"}


@pytest.mark.parametrize("command", ["describe", "prepare"])
def test_an_admin_name_that_others_reach_needs_a_token_before_anything_runs(
    file: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("198.51.100.9", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    typed = Source(listen=("127.0.0.1:80",), backend=("10.0.0.1:80",), admin="outside:8404")
    for source in (typed, Source(file=str(file), admin="outside:8404")):
        with pytest.raises(UsageError, match="admin outside:8404: can be reached from other machines; set admin_token"):
            describe(source) if command == "describe" else prepare(source)


def test_a_relative_socket_is_the_absolute_one_beside_the_file(file: Path) -> None:
    text = file.read_text()
    file.write_text(f'{text}[[service]]\nname = "z"\nlisten = "unix:z.sock"\n[service.pool.b]\n')
    load(Source(file=str(file)))
    file.write_text(f'{file.read_text()}backends = ["unix:{file.parent}/z.sock"]\n')
    for command in (describe, load, prepare):
        with pytest.raises(UsageError, match=r"z\.sock is an address that this balancer listens on itself"):
            command(Source(file=str(file)))


def test_a_check_may_be_only_to_connect(file: Path) -> None:
    check = load(Source(listen=(":80",), backend=("10.0.0.1:80",), check="tcp")).services[0].check
    assert check is not None
    assert check.type == "tcp"


def test_some_options_win_over_the_file(file: Path) -> None:
    source = Source(file=str(file), name="other", relays=5, admin="127.0.0.1:9000", state="/there")
    balancer = load(source)
    assert (balancer.name, balancer.relays, balancer.admin, balancer.state) == ("other", 5, "127.0.0.1:9000", "/there")
    assert balancer.services == load(Source(file=str(file))).services
    assert balancer.typed == ("name", "relays", "admin", "state")


def test_what_an_option_says_needs_no_reload_when_the_file_is_applied(file: Path) -> None:
    present = load(Source(file=str(file), relays=5, state="/there"))
    wanted = load(Source(file=str(file)))
    assert taken_in_place(present, wanted) == (present, ())
    changed = msgspec.structs.replace(wanted, admin="127.0.0.1:1", relays=7)
    assert taken_in_place(present, changed) == (present, ("needs a reload: admin",))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source(), "no configuration is given; write handoff lb run lb.toml, or --listen ADDR --backend ADDR"),
        (Source(listen=(":80",)), "no configuration is given"),
        (Source(file="gone.toml"), "gone.toml: does not exist"),
        (Source(file="lb.toml", algorithm="leastconn"), "--algorithm: is for a balancer without a file; write it into"),
        (Source(file="lb.toml", relays=0), "command line: relays: 0: expected a whole number from 1 to 64"),
        (Source(file="lb.toml", name="a b"), "command line: name"),
        (Source(file="lb.toml", admin="10.0.0.1:8000"), "lb.toml: line 13: 10.0.0.1:8000 is an address that this"),
        (Source(listen=(":80",), backend=("127.0.0.1:80",)), "command line: 127.0.0.1:80 is an address that this"),
        (Source(listen=(":80",), backend=("10.0.0.1",)), "command line: address: "),
    ],
)
def test_a_mistake_is_one_line_that_says_where(file: Path, source: Source, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(source)
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(
    ("environ", "uid", "directory"),
    [
        ({"STATE_DIRECTORY": "/var/lib/edge:/var/lib/other"}, 0, "/var/lib/edge"),
        ({}, 0, "/var/lib/handoff/edge"),
        ({"XDG_STATE_HOME": "/home/ann/state"}, 1000, "/home/ann/state/handoff/edge"),
        ({"XDG_STATE_HOME": "relative"}, 1000, "/home/bob/.local/state/handoff/edge"),
    ],
)
def test_where_state_is_kept_by_default(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], uid: int, directory: str
) -> None:
    monkeypatch.setenv("HOME", "/home/bob")
    balancer = Balancer(name="edge", services=())
    assert state_directory(balancer, "/etc", environ, uid) == directory


def test_the_words_make_the_same_source_again(file: Path) -> None:
    source = Source(
        file="with space.toml", name="n", relays=2, admin="127.0.0.1:1", state="/s", listen=("a", "b"), backend=("=c",)
    )
    from lb.describe import main

    parsed = main.make_context("describe", words(source)).params
    assert Source(**parsed) == source


def test_the_command_that_describes_prints_what_the_master_takes(file: Path) -> None:
    prepared = prepare(Source(file="lb.toml", state="mine"))
    assert prepared.directory == str(file.parent)
    done = subprocess.run(
        shlex.split(prepared.describe), cwd="/", capture_output=True, text=True, check=True, timeout=30
    )
    described = msgspec.json.decode(done.stdout, type=dict[str, Any])
    assert described["arguments"]["state"] == str(file.parent / "mine")
    assert settings_of(described, str(file.parent)).name == "edge"


def test_the_command_that_describes_tells_a_mistake_in_one_line_and_exits_with_2(file: Path) -> None:
    command = shlex.split(prepare(Source(file="lb.toml")).describe)
    file.write_text(FILE.replace("relays = 2", "relais = 2"))
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f'{file}: line 4: "relais" is no key that is known here; did you mean "relays"?\n'


def test_more_listeners_than_a_service_can_have_are_refused(file: Path) -> None:
    source = Source(listen=tuple(f"127.0.0.1:{port}" for port in range(1000, 1065)), backend=("10.0.0.1:80",))
    with pytest.raises(UsageError, match="at most 64"):
        prepare(source)


def test_the_options_that_are_passed_on_are_those_of_handoff_run() -> None:
    passed = {*_PASSED, *_OTHER_DEFAULTS}
    assert {option.name for option in run_service.params} >= passed
    assert {option.name for option in run.params} >= passed
