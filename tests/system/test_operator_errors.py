"""An operator's mistake: one clear line, the right exit code, and nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.harness import DEADLINE_SECONDS, Service


def handoff(directory: Path, *arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Run the command to its end: exit code and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "handoff", *arguments],
        cwd=directory,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["main:app", "--wokers", "2"], 2, ["--wokers", "--workers"]),
        (["main:app", "--bind", "localhost"], 2, ["localhost", "no port"]),
        (["main:app", "--bind", "127.0.0.1:99999"], 2, ["99999"]),
        (["main:app", "--bind", "::1:80"], 2, ["["]),
        (["main:app", "--bind", "unix:."], 1, ["is a directory"]),
        (["main:app", "--bind", "fd://77"], 2, ["77"]),
        (["main:app", "--boot-timeout", "5"], 2, ["no unit", "5s"]),
        (["main:app", "--workers", "0"], 2, ["workers", "0"]),
        (["main:app", "--env-file", "none.env"], 2, ["none.env"]),
        (["main:app", "--config", "none.toml"], 2, ["none.toml"]),
        (["main:app", "--chdir", "nowhere"], 1, ["nowhere", "does not exist"]),
        (["main:app", "--python", "/nowhere/python"], 1, ["/nowhere/python"]),
        (["main:app", "--control-group", "no-such-group"], 2, ["no-such-group"]),
        ([], 2, ["no app"]),
        (["main"], 2, ["main"]),
        (["nosuch:app"], 1, ["nosuch", "--chdir"]),
        (["main:aap"], 1, ["aap", "did you mean app?"]),
        (["main:VERSION"], 1, ["not callable"]),
    ],
)
def test_a_mistake_is_one_line(directory: Path, arguments: list[str], exit_code: int, words: list[str]) -> None:
    run_dir = directory.parent / "run"
    bind = [] if "--bind" in arguments else ["--bind", "127.0.0.1:0"]
    code, text = handoff(directory, "run", *arguments, *bind, "--run-dir", str(run_dir))
    assert text.startswith("handoff: error: ")
    assert text.count("\n") == 1, text
    assert code == exit_code
    for word in words:
        assert word in text
    assert not run_dir.exists() or not list(run_dir.iterdir())


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("wokers = 2\n", ["handoff.toml", "wokers", "workers"]),
        ("workers = [\n", ["handoff.toml", "line"]),
        ('workers = "two"\n', ["handoff.toml", "workers", "two"]),
        ('drain_timeout = "30"\n', ["handoff.toml", "drain_timeout", "unit"]),
        ("[uvicorn]\nport = 1\n", ["port", "bind"]),
    ],
)
def test_a_mistake_in_the_configuration_is_one_line(directory: Path, toml: str, words: list[str]) -> None:
    (directory / "handoff.toml").write_text(toml)
    code, text = handoff(directory, "run", "main:app", "--run-dir", str(directory.parent / "run"))
    assert code == 2
    assert text.count("\n") == 1
    for word in words:
        assert word in text


def test_a_taken_port_names_its_holder(directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        code, text = handoff(directory, "run", "main:app", "--bind", bind, "--run-dir", str(directory.parent / "run"))
    assert code == 1
    assert f"{bind} is in use by" in text
    assert f"(pid {os.getpid()})" in text
    assert text.count("\n") == 1


def test_a_unix_path_of_a_living_server_is_left_alone(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(str(path))
        living.listen()
        run_dir = str(tmp_path / "run")
        code, text = handoff(directory, "run", "main:app", "--bind", f"unix:{path}", "--run-dir", run_dir)
        assert (code, text.count("\n")) == (1, 1)
        assert "living server" in text
        assert path.exists()


def test_a_port_below_1024_needs_a_capability(directory: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("dropping a capability in a network namespace of one's own needs root")
    command = (
        "sysctl -qw net.ipv4.ip_unprivileged_port_start=1024 2>/dev/null || "
        "echo 1024 > /proc/sys/net/ipv4/ip_unprivileged_port_start; ip link set lo up; "
        'exec setpriv --bounding-set=-net_bind_service --inh-caps=-net_bind_service "$@"'
    )
    run = [sys.executable, "-m", "handoff", "run", "main:app", "--bind", "127.0.0.1:80"]
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", command, "sh", *run, "--run-dir", str(directory.parent / "run")],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "127.0.0.1:80 needs CAP_NET_BIND_SERVICE; grant it or bind a port above 1023" in done.stderr


def test_two_services_of_one_name_are_refused(directory: Path) -> None:
    with Service(directory) as service:
        done = service.handoff("run", "main:app", "--bind", "127.0.0.1:0")
        assert done.returncode == 6
        assert f"already runs (pid {service.pid})" in done.stderr
        assert done.stderr.count("\n") == 1
        assert service.get()[2] == b"1"


def test_a_command_without_a_service_says_which_ones_run(directory: Path) -> None:
    with Service(directory) as service:
        code, text = handoff(directory, "reload", "--name", "wbe", "--run-dir", str(service.run_dir))
        assert code == 5
        assert "running: web" in text


def test_another_system_gets_one_line() -> None:
    program = "import sys; sys.platform = 'darwin'; from handoff.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == ("handoff: error: runs on Linux only (pidfds, memfds, SCM_RIGHTS); this is darwin\n")


def test_the_control_socket_is_private_and_its_garbage_is_logged(directory: Path) -> None:
    with Service(directory) as service:
        service_directory = service.run_dir / "web"
        assert stat.S_IMODE(service_directory.stat().st_mode) == 0o700
        assert stat.S_IMODE((service_directory / "control.sock").stat().st_mode) == 0o600
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(service_directory / "control.sock"))
            peer.sendall(b"\x00garbage\n")
            assert peer.recv(100) == b""
        service.stderr.wait_for("closed a peer that sent garbage")
        assert service.get()[2] == b"1"


def test_a_control_group_may_come_in(directory: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("giving a file to another group needs root")
    with Service(directory, "--control-group", "nogroup") as service:
        service_directory = service.run_dir / "web"
        assert stat.S_IMODE(service_directory.stat().st_mode) == 0o750
        assert stat.S_IMODE((service_directory / "control.sock").stat().st_mode) == 0o660


def test_a_peer_of_another_user_is_refused(directory: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    with Service(directory) as service:
        path = service.run_dir / "web" / "control.sock"
        for one in [*path.parents, path]:  # so that only the check of the peer is left to refuse
            if one.is_relative_to(service.run_dir):
                one.chmod(0o777)
        for parent in directory.parents:
            if not os.stat(parent).st_mode & stat.S_IXOTH:
                parent.chmod(os.stat(parent).st_mode | stat.S_IXOTH)
        program = (
            "import os, socket, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534);"
            "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(s.recv(10))"
        )
        command = [sys.executable, "-c", program, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stdout.strip() == "b''", done.stderr
        service.stderr.wait_for("refused a peer of another user")


def test_a_pid_file_lives_as_long_as_the_service(directory: Path, tmp_path: Path) -> None:
    pid_file = tmp_path / "web.pid"
    with Service(directory, "--pidfile", str(pid_file)) as service:
        assert int(pid_file.read_text()) == service.pid
        code, text = handoff(
            directory, *("run", "main:app", "--name", "other", "--bind", "127.0.0.1:0"),
            *("--pidfile", str(pid_file), "--run-dir", str(service.run_dir)),
        )  # fmt: skip
        assert code == 6
        assert str(service.pid) in text
        service.signal(signal.SIGTERM)
        assert service.wait() == 0
        assert not pid_file.exists()
        assert not (service.run_dir / "web").exists()


EARLY = """
import os, signal, sys
from handoff.master import master
create = master.PidFile.create

def create_and_be_told_to_stop(self):
    create(self)
    os.kill(os.getpid(), signal.{signal})

master.PidFile.create = create_and_be_told_to_stop
from handoff.cli import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP])
def test_a_signal_that_comes_while_the_master_is_being_made_is_not_lost_and_leaves_nothing(
    directory: Path, tmp_path: Path, number: signal.Signals
) -> None:
    pid_file = tmp_path / "web.pid"
    command = [sys.executable, "-c", EARLY.format(signal=number.name)]
    service = Service(directory, "--pidfile", str(pid_file), command=command, bind=f"unix:{directory}/s")
    with service.launch():
        if number is signal.SIGHUP:  # a reload, after the first boot
            service.stderr.wait_for("verdict: generation 2 is live")
            service.signal(signal.SIGTERM)
        assert service.wait() == 0
        assert not pid_file.exists()
        assert not (directory / "s").exists()
        assert not (service.run_dir / "web").exists()
