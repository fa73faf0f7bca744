"""The balancer's commands: what each sends to the controller, and what the operator sees and gets as an exit code."""

from __future__ import annotations

import http.server
import json
import socketserver
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest

from handoff.cli.commands import run_command
from handoff.durations import MAX_DURATION_SECONDS
from handoff.errors import ExitCode
from handoff.run_directory import RunDirectory
from handoff.settings import Launch
from lb.cli import client, main
from lb.core.admin import (
    SOCKET_NAME,
    Add,
    Answer,
    Apply,
    BackendStatus,
    Drain,
    Maint,
    PoolStatus,
    Ready,
    RelayStatus,
    Remove,
    Request,
    Rollback,
    ServiceStatus,
    Status,
    Switch,
    Weight,
)

ROOT = Path(__file__).parents[2]
FILE = '[balancer]\nname = "edge"\n[[service]]\nname = "shop"\nlisten = ":8080"\n[service.pool.blue]\nbackends = []\n'
REQUESTS: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)


class Admin(socketserver.ThreadingUnixStreamServer):
    """A controller that remembers what it was asked, and answers what it was told to."""

    daemon_threads = True

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), _Handler)
        self.asked: list[tuple[str, str, Request | None]] = []
        self.status_code = 200
        self.answer: Any = Answer(exit_code=0, message="done")
        """None: the connection ends without one."""
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Admin

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(REQUESTS.decode(body))

    def do_GET(self) -> None:
        self._answer(None)

    def _answer(self, request: Request | None) -> None:
        self.server.asked.append((self.command, self.path, request))
        if self.server.answer is None:
            return
        answer = self.server.answer
        body = answer if isinstance(answer, bytes) else msgspec.json.encode(answer)
        self.send_response(self.server.status_code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """The test's output is the command's."""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where commands are typed, by ann, with a runtime directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SUDO_USER", "ann")
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run"))
    return tmp_path


@pytest.fixture
def service(place: Path) -> Iterator[RunDirectory]:
    """A service `lb` that runs, as far as its lock says."""
    directory = RunDirectory(place / "run", "lb")
    directory.lock()
    yield directory
    directory.close()


@pytest.fixture
def admin(service: RunDirectory) -> Iterator[Admin]:
    server = Admin(service.path / SOCKET_NAME)
    yield server
    server.stop()
    (service.path / SOCKET_NAME).unlink()


@pytest.fixture
def lb(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["handoff lb", *arguments])
        return run_command(main)

    return call


@pytest.mark.parametrize(
    ("line", "request_"),
    [
        ("drain shop/b1", Drain(server="shop/b1")),
        (
            "drain shop/blue/b1 --wait --timeout 1m --deadline 30s --until 2h --why kernel",
            Drain(server="shop/blue/b1", wait_seconds=60.0, deadline_seconds=30.0, until_seconds=7200.0, why="kernel"),
        ),
        ("drain shop/b1 --wait", Drain(server="shop/b1", wait_seconds=MAX_DURATION_SECONDS)),
        ("drain shop/b1 --deadline 0s", Drain(server="shop/b1", deadline_seconds=0.0)),
        ("ready shop/b1 --wait --timeout 5s", Ready(server="shop/b1", wait_seconds=5.0)),
        ("maint shop/b1 --until 1h --why disk", Maint(server="shop/b1", until_seconds=3600.0, why="disk")),
        ("weight shop/b1 0", Weight(server="shop/b1", weight=0)),
        ("weight shop/b1 -1 --why typo", Weight(server="shop/b1", weight=-1, why="typo")),
        ("add shop/blue b3=10.0.0.3:80", Add(pool="shop/blue", name="b3", address="10.0.0.3:80")),
        ("add shop/blue [::1]:80", Add(pool="shop/blue", name="[::1]:80", address="[::1]:80")),
        (
            "add shop/blue unix:/run/a=b.sock --weight 3 --maxconn 9 --backup --wait --timeout 1s",
            Add(
                pool="shop/blue",
                name="unix:/run/a=b.sock",
                address="unix:/run/a=b.sock",
                weight=3,
                maxconn=9,
                backup=True,
                wait_seconds=1.0,
            ),
        ),
        (
            "remove shop/blue b3 --deadline 5s --wait --timeout 9s",
            Remove(pool="shop/blue", name="b3", deadline_seconds=5.0, wait_seconds=9.0),
        ),
        ("remove shop/blue b3=10.0.0.3:80", Remove(pool="shop/blue", name="b3")),
        ("switch shop green", Switch(service="shop", pool="green")),
        (
            "switch shop green --revision 4 --percent 10 --wait 30s --drain-old --deadline 1m --why release",
            Switch(
                service="shop",
                pool="green",
                revision=4,
                percent=10,
                wait_seconds=30.0,
                drain_old=True,
                deadline_seconds=60.0,
                why="release",
            ),
        ),
        ("rollback shop --wait 2s", Rollback(service="shop", wait_seconds=2.0)),
    ],
)
def test_a_command_sends_its_request_once(
    admin: Admin, lb: Callable[..., int], line: str, request_: Request, capfd: pytest.CaptureFixture[str]
) -> None:
    assert lb(*line.split()) == 0
    expected = msgspec.structs.replace(request_, who="ann")
    assert admin.asked == [("POST", f"/v1/{line.split()[0]}", expected)]
    assert capfd.readouterr() == ("lb: done\n", "")


def test_apply_sends_the_text_of_the_file_to_the_balancer_that_it_names(
    place: Path, admin: Admin, lb: Callable[..., int]
) -> None:
    text = FILE.replace("edge", "lb")
    (place / "other.toml").write_text(text)
    assert lb("apply", "other.toml") == 0
    assert admin.asked == [("POST", "/v1/apply", Apply(text=text, shown="other.toml", who="ann"))]


def test_apply_without_a_file_takes_that_of_the_directory_else_the_one_that_the_balancer_runs(
    place: Path, admin: Admin, lb: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    text = FILE.replace("edge", "lb")
    running = place / "elsewhere.toml"
    running.write_text(text)
    admin.answer = msgspec.structs.replace(STATUS, name="lb", file=str(running))
    assert lb("apply") == 1  # the answer to the second request is a status as well
    assert admin.asked[1] == ("POST", "/v1/apply", Apply(text=text, shown=str(running), who="ann"))
    (place / "lb.toml").write_text(text)
    admin.answer = Answer(exit_code=0, message="done")
    assert lb("apply") == 0
    assert admin.asked[2:] == [("POST", "/v1/apply", Apply(text=text, shown="lb.toml", who="ann"))]
    (place / "lb.toml").unlink()
    admin.answer = msgspec.structs.replace(STATUS, name="lb")
    capfd.readouterr()
    assert lb("apply") == 2
    assert capfd.readouterr().err == "handoff: error: service lb: runs what was typed, and no file; give FILE\n"


def test_a_file_with_a_mistake_is_not_sent(
    place: Path, admin: Admin, lb: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "lb.toml").write_text(FILE.replace("listen", "listne"))
    assert lb("apply", "--name", "lb") == 2
    assert admin.asked == []
    assert capfd.readouterr().err.startswith('handoff: error: lb.toml: line 5: "listne" is no key')


@pytest.mark.parametrize("code", [1, 2, 4, 5, 6, 9])
def test_the_exit_code_is_the_answers_and_its_notes_are_printed(
    admin: Admin, lb: Callable[..., int], code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    admin.status_code = 409
    admin.answer = Answer(exit_code=code, message="pool green has 1 of 2 up", notes=("not durable: disk full", "two"))
    assert lb("switch", "shop", "green") == code
    written = "lb: pool green has 1 of 2 up\nlb: note: not durable: disk full\nlb: note: two\n"
    assert capfd.readouterr() == ("", written)


@pytest.mark.parametrize(
    ("body", "status_code", "code", "said"),
    [
        (b"no JSON", 502, 1, "lb: an answer that this release cannot read: 502 Bad Gateway"),
        (msgspec.json.encode({"other": 1}), 200, 1, "lb: an answer that this release cannot read: 200 OK"),
        (None, 200, 7, "lb: its controller ended before it answered; ask handoff lb status, and try again"),
    ],
)
def test_what_is_no_answer_is_an_error_of_one_line(
    admin: Admin,
    lb: Callable[..., int],
    body: bytes | None,
    status_code: int,
    code: int,
    said: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    admin.answer, admin.status_code = body, status_code
    assert lb("weight", "shop/b1", "3") == code
    assert capfd.readouterr() == ("", f"handoff: error: service {said}\n")


def test_a_refused_status_says_why_with_its_exit_code(
    admin: Admin, lb: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    admin.answer, admin.status_code = Answer(exit_code=6, message="is busy"), 409
    assert lb("status") == 6
    assert capfd.readouterr() == ("", "handoff: error: service lb: is busy\n")


def test_no_answer_in_time_is_exit_code_4(
    admin: Admin, lb: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    released = threading.Event()
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.01)
    monkeypatch.setattr(_Handler, "do_GET", lambda self: released.wait(30))
    try:
        assert lb("status") == 4
    finally:
        released.set()
    assert capfd.readouterr().err == "handoff: error: service lb: no answer within 0.01 s; ask handoff lb status\n"


# --- which balancer -------------------------------------------------------------------------------------------------


def test_without_a_name_the_balancer_is_that_of_the_file_here(
    place: Path, lb: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "lb.toml").write_text(FILE)
    assert lb("status") == 5
    assert capfd.readouterr().err.startswith("handoff: error: no service named edge in ")


def test_its_name_is_read_from_a_file_that_is_wrong_otherwise(
    place: Path, lb: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "lb.toml").write_text(FILE.replace("listen", "listne"))
    assert lb("status") == 5
    assert capfd.readouterr().err.startswith("handoff: error: no service named edge in ")
    (place / "lb.toml").write_text(FILE.replace('[balancer]\nname = "edge"\n', "").replace("listen", "listne"))
    assert lb("status") == 5
    assert capfd.readouterr().err.startswith("handoff: error: no service named lb in ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[balancer\n", "lb.toml: expected ']' at the end of a table declaration (at line 1, column 10)"),
        ("[balancer]\nname = 3\n", "lb.toml: 3 is no name of a balancer"),
        ('balancer = "lb"\n', 'lb.toml: "lb" is no name of a balancer'),
    ],
)
def test_where_its_name_cannot_be_read_a_command_asks_for_it(
    place: Path, admin: Admin, lb: Callable[..., int], capfd: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    (place / "lb.toml").write_text(text)
    assert lb("drain", "shop/b1") == 2
    error = f"handoff: error: {said}; repair it, or say with --name which balancer is meant\n"
    assert capfd.readouterr() == ("", error)
    assert lb("drain", "shop/b1", "--name", "lb") == 0


def test_an_unknown_option_of_weight_is_told_as_ever(
    admin: Admin, lb: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert lb("weight", "shop/b1", "3", "--wyh", "x") == 2
    assert "No such option '--wyh'" in capfd.readouterr().err
    assert admin.asked == []


def test_a_balancer_is_found_by_its_name_and_directory(
    place: Path, lb: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RUNTIME_DIRECTORY")
    directory = RunDirectory(place / "elsewhere", "front")
    directory.lock()
    server = Admin(directory.path / SOCKET_NAME)
    assert lb("ready", "a/b", "--name", "front", "--run-dir", str(place / "elsewhere")) == 0
    server.stop()
    directory.close()
    assert server.asked == [("POST", "/v1/ready", Ready(server="a/b", who="ann"))]


def test_without_sudo_it_is_the_user_who_asks(
    admin: Admin, lb: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SUDO_USER")
    monkeypatch.setattr("os.getuid", lambda: 4_000_000_000)
    assert lb("ready", "a/b") == 0
    assert admin.asked[0][2] == Ready(server="a/b", who="uid 4000000000")


# --- a controller that is away --------------------------------------------------------------------------------------


def test_a_controller_that_is_just_restarting_is_waited_for(
    service: RunDirectory, lb: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Admin] = []

    def nap(_seconds: float) -> None:
        if not started:
            started.append(Admin(service.path / SOCKET_NAME))

    monkeypatch.setattr(client.time, "sleep", nap)
    assert lb("weight", "shop/b1", "3") == 0
    assert [command for command, _, _ in started[0].asked] == ["POST"]
    started[0].stop()
    monkeypatch.setattr(client, "ABSENT_SECONDS", -1.0)
    assert lb("weight", "shop/b1", "3") == 1  # its socket is still there, and refuses


def test_a_controller_that_does_not_come_back_is_an_error(
    service: RunDirectory, lb: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(client, "ABSENT_SECONDS", -1.0)
    assert lb("status") == 1
    assert capfd.readouterr().err.startswith("handoff: error: service lb: its controller does not answer at ")


def test_a_service_that_ends_meanwhile_is_no_such_service(
    service: RunDirectory, lb: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(client.time, "sleep", lambda _seconds: service.close())
    assert lb("status") == 5
    assert capfd.readouterr().err == "handoff: error: service lb: has just ended\n"


# --- status ---------------------------------------------------------------------------------------------------------


def backend(name: str, **changes: Any) -> BackendStatus:
    fixed = BackendStatus(
        name=name,
        address="10.0.0.1:80",
        identity=f"shop/blue/{name}@10.0.0.1:80#1",
        administrative="ready",
        health="up",
        is_ejected=False,
        is_eligible=True,
        weight=1.0,
        backup=False,
        maxconn=None,
        connections=7,
        total=70,
        failed=3,
        reset=1,
        sent_bytes=1,
        received_bytes=1,
        last_check="passed in 2 ms",
        since_seconds=61.2,
        override="",
    )
    return msgspec.structs.replace(fixed, **changes)


STATUS = Status(
    name="edge",
    generation=2,
    revision=9,
    is_durable=False,
    services={
        "shop": ServiceStatus(
            listen=("127.0.0.1:8080", "unix:/run/shop.sock"),
            algorithm="leastconn",
            revision=4,
            pools={
                "blue": PoolStatus(
                    percent=90,
                    backends={
                        "b1": backend("b1", maxconn=100, weight=0.5),
                        "b2": backend("b2", is_ejected=True, backup=True, administrative="drain", override="drain [x]"),
                    },
                ),
                "green": PoolStatus(percent=10, backends={}),
            },
        )
    },
    relays=(
        RelayStatus(pid=11, generation=2, slot=0, is_draining=False, taken=9),
        RelayStatus(pid=12, generation=1, slot=0, is_draining=True, taken=8),
    ),
)


def test_status_shows_every_server_in_a_line(
    admin: Admin, lb: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    admin.answer = STATUS
    assert lb("status") == 0
    lines = [" ".join(line.split()) for line in capfd.readouterr().out.splitlines()]
    assert admin.asked == [("GET", "/v1/status", None)]
    assert "edge: generation 2, table 9, changes are NOT durable" in lines
    assert "relay worker 0 of generation 2: pid 11" in lines
    assert "relay worker 0 of generation 1: pid 12, has table 8, draining" in lines
    assert "service shop: 127.0.0.1:8080, unix:/run/shop.sock, leastconn, revision 4" in lines
    assert "shop blue 90 b1 10.0.0.1:80 ready up for 61s 0.5 7/100 70 3 passed in 2 ms" in lines
    ejected = "shop blue 90 b2 (backup) 10.0.0.1:80 drain ejected for 61s 1 7 70 3 passed in 2 ms drain [x]"
    assert ejected in lines
    assert "shop green 10 -" in lines


def test_status_for_programs_is_all_of_it(
    admin: Admin, lb: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    admin.answer = STATUS
    assert lb("status", "--json") == 0
    assert msgspec.convert(json.loads(capfd.readouterr().out), Status) == STATUS


# --- what the command line refuses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("drain shop/b1 --timeout 5s", "--timeout: is for --wait; give both"),
        ("drain shop/b1 --deadline 5", "--deadline: duration 5: has no unit"),
        ("drain", "Missing argument 'SERVICE/SERVER'"),
        ("weight shop/b1 many", "'many' is not a valid integer"),
        ("switch shop", "Missing argument 'POOL'"),
        ("run", "no configuration is given"),
        ("check gone.toml", "gone.toml: does not exist"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2_and_sends_nothing(
    admin: Admin, lb: Callable[..., int], line: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert lb(*line.split()) == 2
    assert admin.asked == []
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err


# --- run and check --------------------------------------------------------------------------------------------------


def test_check_counts_what_the_file_says(
    place: Path, lb: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "lb.toml").write_text(FILE.replace("[]", '["10.0.0.1:80", "10.0.0.2:80"]'))
    assert lb("check") == 0
    assert capfd.readouterr().out == "lb.toml: ok, 1 service, 2 backends\n"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What `handoff run` was to serve; it is not served."""

    class Ended:
        exit_code = ExitCode.DONE

    launches: list[Launch] = []

    def serve(launch: Launch, *_: Any) -> tuple[Any, str]:
        launches.append(launch)
        return Ended, ""

    monkeypatch.setattr("handoff.cli.run.serve", serve)
    monkeypatch.setattr("handoff.cli.run.raise_fd_limit", lambda: None)
    return launches


def test_run_is_handoff_run_of_what_describes_the_file(
    place: Path, lb: Callable[..., int], served: list[Launch]
) -> None:
    (place / "conf").mkdir()
    (place / "conf" / "lb.toml").write_text(FILE)
    options = "--relays 3 --drain-timeout 5m --stop-timeout 1s --log-format json --label one"
    assert lb("run", "conf/lb.toml", *options.split()) == 0
    (launch,) = served
    assert launch.directory == str(place / "conf")
    assert launch.describe[1:] == ("-P", "-m", "lb.describe", str(place / "conf/lb.toml"), "--relays=3")
    assert launch.overrides == {
        "drain_timeout_seconds": 300.0,
        "stop_timeout_seconds": 1.0,
        "log_format": "json",
        "label": "one",
    }
    assert launch.described is not None
    assert (launch.described["name"], launch.described["workers"]) == ("edge", 3)


def test_run_without_a_file_keeps_what_was_typed_for_later_reloads(
    place: Path, lb: Callable[..., int], served: list[Launch]
) -> None:
    assert lb("run", "--listen", "127.0.0.1:0", "--backend", "b=10.0.0.1:80", "--check", "/up") == 0
    (launch,) = served
    assert launch.describe[4:] == ("--listen=127.0.0.1:0", "--backend=b=10.0.0.1:80", "--check=/up")
    assert launch.described is not None
    assert launch.described["bind"] == {"lb.0": "127.0.0.1:0"}
    assert [one.name for one in place.iterdir()] == ["run"]  # no file is made


# --- the group ------------------------------------------------------------------------------------------------------


def test_the_group_is_a_plug_in_of_handoff(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["handoff.commands"]
    (place / "site" / "balancer_test-1.dist-info").mkdir(parents=True)
    info = place / "site" / "balancer_test-1.dist-info"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: balancer-test\nVersion: 1\n")
    lines = "".join(f"{name} = {value}\n" for name, value in entries.items())
    (info / "entry_points.txt").write_text(f"[handoff.commands]\n{lines}")
    monkeypatch.syspath_prepend(place / "site")
    (place / "lb.toml").write_text(FILE)
    monkeypatch.setattr(sys, "argv", ["handoff", "lb", "check"])
    assert run_command() == 0
    assert capfd.readouterr().out == "lb.toml: ok, 1 service, 0 backends\n"


def test_the_group_called_is_a_program(place: Path) -> None:
    command = [sys.executable, "-P", "-c", "from lb.cli import main; main()", "check", "gone.toml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("handoff: error: gone.toml: does not exist")


def test_every_command_that_changes_something_has_a_request() -> None:
    tags = {str(kind.__struct_config__.tag) for kind in (Drain, Ready, Maint, Weight, Add, Remove, Switch)}
    tags |= {str(kind.__struct_config__.tag) for kind in (Rollback, Apply)}
    assert set(main.commands) == tags | {"run", "check", "status", "request"}
    assert isinstance(main, click.Group)
