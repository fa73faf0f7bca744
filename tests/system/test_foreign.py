"""Commands of any language as workers: how they get listeners, say that they are ready, drain, and fail."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

import psutil
import pytest

from tests.system.foreign import SPEAKER, command, free_port, peer, reload
from tests.system.harness import Clients, Service, wait_until

NODE = """
const answer = 'node ' + process.env.HANDOFF_GENERATION;
const server = require('http').createServer((request, response) => response.end(answer));
server.listen({fd: 3});
process.on('SIGTERM', () => server.close(() => process.exit(0)));
"""
NGINX = """
events {}
http {
    access_log off;
    server { listen 127.0.0.1:PORT; location / { return 200 "nginx $pid"; } }
}
"""
PERL = """
use strict; use warnings;
use IO::Socket::INET; use Server::Starter qw(server_ports);
my ($address, $fd) = %{ server_ports() };
my $listener = IO::Socket::INET->new; $listener->fdopen($fd, 'r+') or die "fd $fd: $!";
my $ends = 0; $SIG{TERM} = sub { $ends = 1 };
while (!$ends) {
    my $client = $listener->accept or next;
    my $request = ''; sysread($client, $request, 65536);
    my $body = "perl $ENV{SERVER_STARTER_GENERATION} $address";
    my $head = "HTTP/1.1 200 OK\\r\\nContent-Length: " . length($body);
    syswrite($client, "$head\\r\\nConnection: close\\r\\n\\r\\n$body");
    close $client;
}
"""


@pytest.fixture
def speaker(tmp_path: Path) -> list[str]:
    (tmp_path / "speaker.py").write_text(SPEAKER)
    return [sys.executable, "speaker.py"]


@pytest.mark.parametrize("dialect", ["auto", "systemd"])
def test_a_command_gets_listeners_and_says_that_it_is_ready(tmp_path: Path, speaker: list[str], dialect: str) -> None:
    options = ("--dialect", dialect, "--bind", "second=127.0.0.1:0", "--workers", "2")
    with command(tmp_path, *speaker, options=options, bind="first=127.0.0.1:0") as service:
        assert service.get()[2] == b"1 first:second"
        reload(service)
        service.wait_for_generations(2)
        assert service.get()[2] == b"2 first:second"
        status = service.status()
        assert [one["app"] for one in status["generations"]] == [f"{sys.executable} speaker.py"]
        assert [worker["interface"] for worker in service.workers()] == ["command"] * 2


def test_reloads_of_commands_that_drain_well_lose_nothing(tmp_path: Path, speaker: list[str]) -> None:
    with command(tmp_path, *speaker, options=("--workers", "2")) as service:
        with Clients(service.get) as clients:
            for number in range(2, 22):
                reload(service)
                service.wait_for_generations(number)
        clients.assert_none_failed()


def test_one_that_says_no_word_is_ready_after_a_while(tmp_path: Path) -> None:
    (tmp_path / "main.js").write_text(NODE)
    words = [peer("node"), "main.js"]
    with command(tmp_path, *words, options=("--ready-after", "500ms")) as service:
        with Clients(service.get) as clients:
            clients.more(10)
            for number in range(2, 7):
                reload(service)
                service.wait_for_generations(number)
        clients.assert_none_failed()
        assert service.get()[2] == b"node 6"


def test_nginx_takes_the_listener_by_its_own_variable(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "nginx.conf").write_text(NGINX.replace("PORT", str(port)))
    more = f"daemon off; pid {tmp_path}/$$.pid; error_log stderr;"
    words = ["sh", "-c", f'NGINX="3;" exec {peer("nginx")} -p . -c nginx.conf -g "{more}"']
    options = ("--drain-signal", "QUIT")
    with command(tmp_path, *words, options=options, bind=f"127.0.0.1:{port}") as service:
        with Clients(service.get) as clients:
            clients.more(10)
            for number in range(2, 5):
                reload(service)
                service.wait_for_generations(number)
        clients.assert_none_failed()


def test_a_child_of_server_starters_kind(tmp_path: Path) -> None:
    (tmp_path / "main.pl").write_text(PERL)
    peer("start_server")
    words = [peer("perl"), "main.pl"]
    options = ("--dialect", "server-starter", "--ready-after", "200ms")
    with command(tmp_path, *words, options=options) as service:
        assert service.get()[2] == f"perl 1 127.0.0.1:{service.port}".encode()
        reload(service)
        wait_until(lambda: service.get()[2].startswith(b"perl 2"), "the new generation answers")


def test_what_a_command_left_behind_is_ended_with_it(tmp_path: Path) -> None:
    words = ["sh", "-c", "sleep 1000 & echo $! > child; wait"]
    with command(tmp_path, *words, options=("--ready-after", "50ms")) as service:
        child = int((tmp_path / "child").read_text())
        assert psutil.pid_exists(child)
        os.kill(service.workers()[0]["pid"], signal.SIGKILL)
        wait_until(lambda: not psutil.pid_exists(child), "the child of the killed one is gone")
        wait_until(lambda: [one["state"] for one in service.workers()] == ["accepting"], "it is replaced")


@pytest.mark.parametrize(
    ("words", "options", "problem"),
    [
        (
            ["speaker.py", "exit"],
            ("--ready-after", "1m"),
            "exited with status 3 (its log is the standard error of the service) while it was loading the model",
        ),
        (["speaker.py", "hang"], ("--dialect", "systemd", "--boot-timeout", "6s"), "it was loading the model"),
        (["-c", "import os; os.abort()"], ("--ready-after", "1m"), "was killed by SIGABRT"),
    ],
)
def test_a_command_that_does_not_come_up_is_a_verdict(
    tmp_path: Path, speaker: list[str], words: list[str], options: tuple[str, ...], problem: str
) -> None:
    with command(tmp_path, speaker[0], *words, options=options).launch() as service:
        assert service.wait() == 1
        assert problem in service.stderr.finish()


def test_a_broken_command_is_rolled_back_and_the_old_one_serves_on(tmp_path: Path, speaker: list[str]) -> None:
    (tmp_path / "handoff.toml").write_text(f'command = "{sys.executable} speaker.py"\n')
    with Service(tmp_path, app=None) as service:
        (tmp_path / "handoff.toml").write_text('command = ["no-such-program", "x"]\n')
        done = service.ask({"type": "reload"})
        assert done["exit_code"] == 3
        assert "command no-such-program: is not found in PATH" in done["message"]
        # Not ready for having lived one second, which it may need for its start.
        text = f'command = ["{sys.executable}", "speaker.py", "exit"]\nready_after = "1m"\n'
        (tmp_path / "handoff.toml").write_text(text)
        assert service.ask({"type": "reload"})["exit_code"] == 3
        assert service.get()[2] == b"1 default"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--"], "nothing follows --"),
        (["--", "no-such-program"], "command no-such-program: is not found in PATH"),
        (["--", "./plain.txt"], "command ./plain.txt: is not executable"),
        (["--", "./gone"], "command ./gone: is no file in"),
        (["--warm-up", "/", "--", "true"], "warm_up: is for applications"),
        (["--check", "/", "--bind", "none", "--", "true"], "check: a command is asked through a TCP listener"),
        (["--drain-signal", "KILL", "--", "true"], "--drain-signal KILL: expected the name of a signal"),
        (["--dialect", "esperanto", "--", "true"], "esperanto"),
        (["main:app", "--", "true"], "app and command: a service runs one of the two"),
        (["main:app", "--ready-after", "1s"], "ready_after: is for commands"),
    ],
)
def test_what_is_typed_wrong_gets_one_line(tmp_path: Path, arguments: list[str], problem: str) -> None:
    (tmp_path / "plain.txt").write_text("no program")
    with Service(tmp_path, *arguments, app=None, bind=None, probation=None).launch() as service:
        assert service.wait() in (1, 2)
        text = service.stderr.finish()
        assert problem in text
        assert text.count("\n") == 0


def test_the_word_of_a_stranger_is_not_taken(tmp_path: Path, speaker: list[str]) -> None:
    (tmp_path / "wait.py").write_text(
        "import os, signal; open('address', 'w').write(os.environ['NOTIFY_SOCKET'] + chr(10)); signal.pause()"
    )
    (tmp_path / "handoff.toml").write_text(f'command = "{speaker[0]} speaker.py"\ndialect = "systemd"\n')
    with Service(tmp_path, "--boot-timeout", "5s", app=None) as service:
        (tmp_path / "handoff.toml").write_text(f'command = "{speaker[0]} wait.py"\ndialect = "systemd"\n')
        asked = service.begin({"type": "reload"})
        address = tmp_path / "address"
        wait_until(lambda: address.is_file() and address.read_text().endswith("\n"), "the new one runs")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
            stranger.connect("\0" + address.read_text().strip()[1:])
            stranger.send(b"READY=1")
        service.stderr.wait_for("notification of a stranger was ignored")
        done = asked.answer()
        assert done["exit_code"] == 3
        assert "expected to say READY=1" in done["message"]


def test_a_command_that_accepts_in_a_blocking_way_has_a_listener_that_blocks(tmp_path: Path) -> None:
    (tmp_path / "blocks.py").write_text(
        "import os, socket\n"
        "assert os.get_blocking(3)\n"
        "while True:\n"
        "    connection, _ = socket.socket(fileno=os.dup(3)).accept()\n"
        "    connection.recv(65536)\n"
        "    connection.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\nConnection: close\\r\\n\\r\\nok')\n"
    )
    with command(tmp_path, sys.executable, "blocks.py", options=("--ready-after", "300ms")) as service:
        assert service.get()[2] == b"ok"


def test_systemd_notify_speaks_for_its_parent(tmp_path: Path) -> None:
    words = ["sh", "-c", "systemd-notify --ready --status=up; exec sleep 1000"]
    peer("systemd-notify")
    with command(tmp_path, *words, options=("--dialect", "systemd")) as service:
        assert [one["state"] for one in service.workers()] == ["accepting"]
