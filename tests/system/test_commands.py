"""What the commands say and how they exit, and who they find."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.apps import gated, hello
from tests.system.harness import DEADLINE_SECONDS, Service, wait_until


def handoff(directory: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with nothing but what is given to find its service by."""
    return subprocess.run(
        [sys.executable, "-m", "handoff", *arguments],
        cwd=directory,
        env={key: value for key, value in os.environ.items() if key != "PWD"} | environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )


# --- which service --------------------------------------------------------------------------------------------------


def test_commands_find_the_service_of_the_directory_in_the_runtime_directory_of_systemd(directory: Path) -> None:
    runtime = directory.parent / "runtime"
    runtime.mkdir()
    environment = {"RUNTIME_DIRECTORY": str(runtime)}
    service = Service(directory, environment=environment)
    service.arguments = ["run", "main:app", "--bind", "127.0.0.1:0"]  # neither --name nor --run-dir
    with service:
        assert (runtime / "app" / "control.sock").exists()
        done = handoff(directory, "status", **environment)
        assert done.stdout.startswith("app: generation 1 live"), done.stderr
        elsewhere = handoff(directory.parent, "status", "--name", "app", **environment)
        assert elsewhere.stdout.startswith("app: generation 1 live"), elsewhere.stderr
        missing = handoff(directory, "status", "--run-dir", str(directory.parent))
        assert missing.returncode == 5
    assert not (runtime / "app" / "control.sock").exists()


def test_the_name_of_the_configuration_counts_before_the_directorys(directory: Path) -> None:
    runtime = directory.parent / "runtime"
    runtime.mkdir()
    (directory / "handoff.toml").write_text(f'name = "shop"\napp = "main:app"\nrun_dir = "{runtime}"\n')
    service = Service(directory)
    service.arguments = ["run", "--bind", "127.0.0.1:0"]
    with service:
        assert handoff(directory, "status").stdout.startswith("shop: generation 1 live")
        assert handoff(directory, "reload").stdout.startswith("shop: ")


def test_ps_lists_the_processes_of_every_service(directory: Path) -> None:
    with Service(directory, "-w", "2", "--label", "v1") as web, Service(directory, name="other") as other:
        done = handoff(directory, "ps", "--run-dir", str(web.run_dir))
        assert done.returncode == 0
        rows = [line.split() for line in done.stdout.splitlines()[1:]]
    masters = {(row[0], int(row[1])) for row in rows if row[2] == "master"}
    assert masters == {("web", web.pid), ("other", other.pid)}
    workers = sorted((row[0], *row[3:6], *row[7:]) for row in rows if row[2] == "worker")
    assert workers == [
        ("other", "1", "0", "accepting"),
        ("web", "1", "0", "accepting", "v1"),
        ("web", "1", "1", "accepting", "v1"),
    ]


# --- waiting --------------------------------------------------------------------------------------------------------


def test_a_reload_that_nobody_waits_for_goes_on(directory: Path) -> None:
    with Service(directory) as service:
        (directory / "main.py").write_text(gated("2"))
        done = service.reload("--no-wait")
        assert (done.returncode, done.stdout) == (0, "web: reload requested\n")
        assert service.get()[2] == b"1"
        (directory / "go").touch()
        service.wait_for_generations(2)
        assert service.get()[2] == b"2"
        done = service.handoff("rollback", "--no-wait")
        assert (done.returncode, done.stdout) == (0, "web: rollback requested\n")
        service.wait_for_generations(3)


def test_a_command_that_waits_too_long_says_so_and_the_reload_goes_on(directory: Path) -> None:
    with Service(directory) as service:
        (directory / "main.py").write_text(gated("2"))
        done = service.reload("--timeout", "100ms")
        assert done.returncode == 4
        assert done.stderr == "handoff: error: service web: no answer within 0.1 s; it goes on; ask handoff status\n"
        (directory / "go").touch()
        service.wait_for_generations(2)


# --- check ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "arguments", "exit_code", "words"),
    [
        (hello("1"), ["main:app"], 0, "main:app: loads; interface asgi"),
        ("def app(environ, start_response): ...", ["main:app"], 0, "main:app: loads; interface wsgi"),
        ("def main(worker): ...", ["main:main"], 0, "main:main: loads; interface handoff"),
        ("def create(): return lambda environ, start_response: []", ["main:create", "--factory"], 0, "interface wsgi"),
        (
            "import handoff\nhandoff.listener('default')\nasync def app(scope, receive, send): ...",
            ["main:app"],
            0,
            "asgi",
        ),
        ("app = 1", ["main:app"], 1, "not callable"),
        ("1 / 0", ["main:app"], 1, "ZeroDivisionError"),
        ("def (", ["main:app"], 1, "main.py"),
        (hello("1"), ["main:aap"], 1, "did you mean app?"),
        (hello("1"), [], 2, "no app"),
    ],
)
def test_check_imports_and_serves_nothing(
    directory: Path, text: str, arguments: list[str], exit_code: int, words: str
) -> None:
    (directory / "main.py").write_text(text)
    done = handoff(directory, "check", *arguments)
    assert done.returncode == exit_code, done.stderr
    assert words in (done.stderr if exit_code else done.stdout)
    assert done.stderr.count("handoff: error: ") == (1 if exit_code else 0)


@pytest.mark.parametrize(
    ("text", "config", "exit_code", "words"),
    [
        (
            hello("1"),
            "[uvicorn]\nserver_heade = false\n",
            1,
            "has no setting server_heade; did you mean server_header?",
        ),
        (hello("1"), '[uvicorn]\ndate_header = "maybe"\n', 1, "date_header = 'maybe': uvicorn takes another kind"),
        (hello("1"), "[uvicorn]\nws_ping_interval = 20\n", 0, "interface asgi"),
        (hello("1"), '[uvicorn]\nlifespan = "of"\n', 1, "lifespan = 'of': "),
        (hello("1"), 'log_config = "none.json"\n', 1, "none.json: is not a file"),
        (hello("1"), 'control_group = "nobody-has-it"\n', 2, "control group nobody-has-it: does not exist"),
        ("def app(worker): ...", 'check = "/x"\n', 1, "checks itself before worker.ready()"),
        ("def app(worker): ...", 'listen_mode = "reuseport"\n', 1, "listen-mode reuseport: "),
    ],
)
def test_check_finds_what_a_reload_would_be_rolled_back_for(
    directory: Path, text: str, config: str, exit_code: int, words: str
) -> None:
    (directory / "main.py").write_text(text)
    (directory / "handoff.toml").write_text(config)
    done = handoff(directory, "check", "main:app")
    assert done.returncode == exit_code, done.stderr
    assert words in (done.stderr if exit_code else done.stdout)


def test_check_beside_the_running_service_takes_none_of_its_addresses(directory: Path) -> None:
    with Service(directory) as service:
        done = handoff(directory, "check", "main:app")
        assert done.returncode == 0, done.stderr
        assert service.get()[2] == b"1"


def test_a_command_in_a_directory_that_is_gone_says_so(directory: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    program = f"import os, sys; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); sys.argv = ['handoff', 'status']\n"
    program += "from handoff.cli import main; main()"
    done = handoff_program(program)
    assert done.returncode == 1
    assert done.stderr == "handoff: error: current directory: is gone; change to one that exists and try again\n"


def handoff_program(program: str) -> subprocess.CompletedProcess[str]:
    # -P: as for the console script; Python 3.13.0 fails to import anything where its path has a directory that is gone.
    return subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)


# --- a worker that breaks the protocol ------------------------------------------------------------------------------

BREAKS = '''
import os, socket, stat

def send_garbage():
    """Into the channel, and into every mailbox."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            one = socket.socket(fileno=os.dup(fd))
        except OSError:
            continue
        if one.family == socket.AF_UNIX and one.type == socket.SOCK_SEQPACKET:
            one.send(b"this is no message")
        one.close()

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    body = b"%d" % os.getpid()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})
    if scope["path"] == "/break":
        send_garbage()
'''


def test_garbage_on_the_channel_ends_that_worker_and_no_other(directory: Path) -> None:
    (directory / "main.py").write_text(BREAKS)
    with Service(directory, "-w", "2") as service:
        first, second = (worker["pid"] for worker in service.workers())
        broken = int(service.get("/break")[2])
        service.stderr.wait_for(r"(?i)warning.*broke the protocol")

        def is_replaced() -> bool:
            pids = {one["pid"] for one in service.workers() if one["state"] == "accepting"}
            return len(pids) == 2 and broken not in pids

        wait_until(is_replaced, "another worker took its place")
        assert ({first, second} - {broken}) < {worker["pid"] for worker in service.workers()}
        assert service.get()[0] == 200
