"""Workers of other makes behind handoff: gunicorn, uvicorn, Ruby, shell; and what einhorn's children say."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.system.foreign import SPEAKER, command, peer, reload
from tests.system.harness import Clients, Service, wait_until

WSGI = """
import os

def app(environ, start_response):
    body = f"wsgi {os.environ['HANDOFF_GENERATION']}".encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
"""
ASGI = """
import os

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    body = f"asgi {os.environ['HANDOFF_GENERATION']}".encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
"""
RUBY = r"""
require 'socket'
require 'yaml'

# What lib/einhorn/worker.rb and client.rb do, written out.
abort 'my parent is not einhorn' unless Process.ppid == ENV.fetch('EINHORN_MASTER_PID').to_i
abort 'one listener' unless ENV.fetch('EINHORN_FD_COUNT') == '1' && ENV.fetch('EINHORN_FD_FAMILY_0') == 'AF_INET'
listener = TCPServer.for_fd(ENV.fetch('EINHORN_FD_0').to_i)
told, tell = IO.pipe
Signal.trap('USR2') { tell.write_nonblock('.') }

message = YAML.dump({ 'command' => 'worker:ack', 'pid' => $$ })
UNIXSocket.open(ENV.fetch('EINHORN_SOCK_PATH')) do |client|
  client.write(message.gsub(/%|\n/, '%' => '%25', "\n" => '%0A') + "\n")
end

loop do
  ready, = IO.select([told, listener])
  exit if ready.include?(told)
  begin
    client = listener.accept_nonblock
  rescue IO::WaitReadable
    next
  end
  client.readpartial(65536)
  body = "ruby #{ENV['HANDOFF_GENERATION']} #{ENV['EINHORN_CHILD_INDEX']}"
  client.write("HTTP/1.1 200 OK\r\nContent-Length: #{body.bytesize}\r\nConnection: close\r\n\r\n#{body}")
  client.close
end
"""
SHELL = """
printf '{"command":"worker:ack", "pid":%d}\\n' $$ | socat - "UNIX-CONNECT:$EINHORN_SOCK_PATH"
exec "$PYTHON" speaker.py
"""
WAITS = "import os, signal; open('address', 'w').write(os.environ['EINHORN_SOCK_PATH'] + chr(10)); signal.pause()"
ONLY_BY_ITS_WORD = ("--ready-after", "1h")


def reload_often(service: Service, last: int = 21) -> Clients:
    """Reloads under load, each client with a new connection for each request."""
    with Clients(service.get) as clients:
        for number in range(2, last + 1):
            reload(service)
            service.wait_for_generations(number)
    return clients


# --- servers --------------------------------------------------------------------------------------------------------


def test_gunicorn_takes_the_listener_as_from_systemd(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(WSGI)
    words = [sys.executable, "-m", "gunicorn", "--no-control-socket", "main:app"]
    with command(tmp_path, *words, options=("--dialect", "systemd")) as service:
        clients = reload_often(service, last=6)
        clients.assert_none_failed()
        assert service.get()[2] == b"wsgi 6"


def test_uvicorn_takes_the_listener_as_fd_3(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(ASGI)
    words = [sys.executable, "-m", "uvicorn", "--fd", "3", "--no-access-log", "main:app"]
    with command(tmp_path, *words, options=("--ready-after", "500ms")) as service:
        clients = reload_often(service, last=6)
        assert clients.done > len(clients.failures)  # what it loses: docs/operations.md
        assert service.get()[2] == b"asgi 6"


# --- einhorn --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dialect", "last"), [("auto", 6), ("einhorn", 11)])
def test_a_child_of_einhorns_kind_acks(tmp_path: Path, dialect: str, last: int) -> None:
    (tmp_path / "main.rb").write_text(RUBY)
    options = ("--dialect", dialect, "--drain-signal", "USR2", *ONLY_BY_ITS_WORD)
    with command(tmp_path, peer("ruby"), "main.rb", options=options) as service:
        clients = reload_often(service, last)
        clients.assert_none_failed()
        assert service.get()[2] == f"ruby {last} 0".encode()
        assert len(list((service.run_dir / "web").glob("ack-*"))) == 1
    assert not list(service.run_dir.rglob("ack-*"))


def test_a_shell_script_acks_through_a_child_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "speaker.py").write_text(SPEAKER)
    (tmp_path / "main.sh").write_text(SHELL)
    peer("socat")
    options = ("--dialect", "auto", *ONLY_BY_ITS_WORD)
    (tmp_path / "speaker.py").write_text(SPEAKER.replace('say("READY=1', 'say("STATUS=silent'))
    service = command(tmp_path, "sh", "main.sh", options=options)
    service.environment["PYTHON"] = sys.executable
    with service:
        clients = reload_often(service)
        clients.assert_none_failed()


def test_a_child_of_einhorns_kind_that_never_acks_is_ready_after_a_second(tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(WAITS)
    with command(tmp_path, sys.executable, "waits.py", options=("--dialect", "einhorn")) as service:
        assert [one["state"] for one in service.workers()] == ["accepting"]


def test_the_ack_of_a_stranger_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "speaker.py").write_text(SPEAKER)
    (tmp_path / "waits.py").write_text(WAITS)
    (tmp_path / "handoff.toml").write_text(f'command = "{sys.executable} speaker.py"\nready_after = "1h"\n')
    with Service(tmp_path, app=None) as service:
        (tmp_path / "handoff.toml").write_text(f'command = "{sys.executable} waits.py"\nready_after = "1h"\n')
        asked = service.begin({"type": "reload"})
        address = tmp_path / "address"
        wait_until(lambda: address.is_file() and address.read_text().endswith("\n"), "the new one runs")
        path = address.read_text().strip()
        assert os.stat(path).st_mode & 0o777 == 0o600
        pid = service.workers(2)[0]["pid"]
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(path)
            with contextlib.suppress(BrokenPipeError):  # it may be closed already
                stranger.sendall(b'{"command":"worker:ack", "pid":%d}\n' % pid)
            service.stderr.wait_for("ack of a stranger was ignored")
        assert [one["state"] for one in service.workers(2)] == ["booting"]
        service.ask({"type": "rollback"})
        assert asked.answer()["exit_code"] == 7
        assert service.get()[2] == b"1 default"


def test_an_ack_that_is_none_ends_only_its_connection(tmp_path: Path) -> None:
    (tmp_path / "speaker.py").write_text(
        "import contextlib, json, os, signal, socket\n"
        "def say(data):\n"
        "    with socket.socket(socket.AF_UNIX) as one:\n"
        "        one.connect(os.environ['EINHORN_SOCK_PATH'])\n"
        "        one.sendall(data)\n"
        "        with contextlib.suppress(ConnectionResetError):\n"
        "            one.recv(1)\n"
        "say(b'x' * 5000)\n"
        "say(b'no command\\n')\n"
        "held = [socket.socket(socket.AF_UNIX) for _ in range(3)]\n"
        "for one in held:\n"
        "    one.connect(os.environ['EINHORN_SOCK_PATH'])\n"
        "say(json.dumps({'command': 'worker:ack', 'pid': os.getpid()}).encode() + b'\\n')\n"
        "signal.pause()\n"
    )
    options = ("--dialect", "einhorn", *ONLY_BY_ITS_WORD)
    with command(tmp_path, sys.executable, "speaker.py", options=options) as service:
        assert [one["state"] for one in service.workers()] == ["accepting"]
        assert service.stderr.text.count("an ack that is none was ignored") == 2


# --- the status file ------------------------------------------------------------------------------------------------


def test_the_status_file_names_the_workers_that_live(tmp_path: Path) -> None:
    (tmp_path / "speaker.py").write_text(SPEAKER)
    path = tmp_path / "workers.status"
    path.write_text("7:4711\n")  # of a service that was killed

    def tells_it_as_it_is() -> bool:
        living = sorted((one["generation"], worker["pid"]) for one in groups() for worker in one["workers"])
        return path.read_text() == "".join(f"{generation}:{pid}\n" for generation, pid in living)

    def groups() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = service.status()["generations"]
        return found

    options = ("--workers", "2", "--status-file", path.name)
    with command(tmp_path, sys.executable, "speaker.py", options=options) as service:
        assert path.stat().st_mode & 0o777 == 0o644
        assert tells_it_as_it_is()
        reload(service)
        service.wait_for_generations(2)
        wait_until(tells_it_as_it_is, "the status file tells of the second generation")
        os.kill(service.workers()[0]["pid"], signal.SIGKILL)
        wait_until(lambda: tells_it_as_it_is() and path.read_text().count("\n") == 2, "and of a replacement")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["speaker.py"]


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("gone/status", "does not exist; create it"),
        (".", "is not a regular file"),
        ("notes.txt", "holds something else"),
        ("link", "is a symbolic link"),
        ("notes.txt/status", "is not a directory"),
    ],
)
def test_a_status_file_that_cannot_be_is_one_line_before_anything_starts(
    tmp_path: Path, path: str, problem: str
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to("notes.txt")
    options = ("--status-file", path)
    with command(tmp_path, "sh", "-c", "touch started; sleep 1000", options=options).launch() as service:
        assert service.wait() == 1
        text = service.stderr.finish()
        assert "status file" in text
        assert problem in text
        assert text.count("\n") == 0
    assert not (tmp_path / "started").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_sockets_for_acks_of_a_master_that_was_killed_are_removed(tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(WAITS)
    options = ("--dialect", "einhorn", "--ready-after", "50ms")
    service = command(tmp_path, sys.executable, "waits.py", options=options)
    (service.run_dir / "web").mkdir(parents=True, mode=0o700)
    (service.run_dir / "web" / "ack-77").touch()
    with service:
        assert [one.name for one in (service.run_dir / "web").glob("ack-*")] == ["ack-1"]
