"""One peer's trouble, and the kernel's refusals, never end the master."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.system.apps import hello
from tests.system.harness import Service, wait_until

_PTRACE_SEIZE = 0x4206
_WALL = 0x40000000


def test_a_member_of_the_control_group_gets_an_answer(directory: Path) -> None:
    with Service(directory, "--control-group", "nogroup") as service:
        path = service.run_dir / "web" / "control.sock"
        service.run_dir.chmod(0o755)
        program = (
            "import os, socket, sys; os.setgroups([65534]); os.setgid(12345); os.setuid(12345);"
            "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
            "s.sendall(sys.argv[2].encode()); print(s.makefile().readline())"
        )
        command = [sys.executable, "-c", program, str(path), '{"type": "status"}\n']
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert json.loads(done.stdout)["name"] == "web", done.stderr


def test_a_release_whose_name_is_no_utf8_is_refused_and_the_service_goes_on(directory: Path, tmp_path: Path) -> None:
    strange = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(strange)
    Path(os.fsdecode(strange), "main.py").write_text(hello("2"))
    current = tmp_path / "current"
    current.symlink_to(directory)
    with Service(directory, "--chdir", str(current)) as service:
        current.unlink()
        os.symlink(strange, os.fsencode(current))
        done = service.reload()
        assert done.returncode == 3
        assert "caf\\udce9: is no UTF-8; rename it" in done.stderr
        assert service.status()["live"] == 1
        assert service.get()[2] == b"1"


@contextlib.contextmanager
def traced(pid: int) -> Iterator[None]:
    """A debugger is attached, in a thread of its own, and does not wait for the process before this ends."""
    attached, release = threading.Event(), threading.Event()
    libc = ctypes.CDLL(None, use_errno=True)

    def trace() -> None:
        libc.ptrace(_PTRACE_SEIZE, pid, None, None)
        attached.set()
        release.wait()
        os.waitpid(pid, _WALL)

    thread = threading.Thread(target=trace)
    thread.start()
    attached.wait()
    try:
        yield
    finally:
        release.set()
        thread.join()


def test_a_worker_that_dies_under_a_debugger_is_collected_when_that_lets_go(directory: Path) -> None:
    with Service(directory, "-w", "2") as service:
        pid = service.workers()[0]["pid"]
        with traced(pid):
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z", "it is a zombie")
            assert service.get()[2] == b"1"
            assert service.status()["live"] == 1
        wait_until(lambda: pid not in {worker["pid"] for worker in service.workers()}, "it was collected")
        service.wait_for_generations(1)


def test_a_master_without_fds_goes_on_when_it_has_some_again(directory: Path) -> None:
    with Service(directory) as service:
        soft, hard = resource.prlimit(service.pid, resource.RLIMIT_NOFILE)
        open_fds = len(os.listdir(f"/proc/{service.pid}/fd"))
        for spare in (1, 0):
            resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (open_fds + spare, hard))
            asked = service.begin({"type": "status"})
            if spare:
                assert json.loads(json.dumps(asked.answer()))["open_fds"] == -1
            else:
                assert service.get()[2] == b"1"
                resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (soft, hard))
                assert asked.answer()["live"] == 1


def test_silent_peers_do_not_lock_the_operator_out(directory: Path) -> None:
    with Service(directory) as service, contextlib.ExitStack() as stack:
        for _ in range(80):
            stack.enter_context(service.control_socket())
        assert service.status()["live"] == 1
        assert service.handoff("reload").returncode == 0


def test_a_peer_that_sends_no_more_still_gets_its_verdict(directory: Path) -> None:
    with Service(directory) as service, service.control_socket() as peer:
        peer.sendall(b'{"type": "reload"}\n')
        peer.shutdown(socket.SHUT_WR)
        data = b""
        while chunk := peer.recv(65536):
            data += chunk
        assert json.loads(data)["exit_code"] == 0


def test_closed_standard_files_are_not_taken_for_others(directory: Path) -> None:
    command = ["sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "sh", sys.executable, "-m", "handoff"]
    service = Service(directory, "--pidfile", str(directory / "pid"), command=command)
    with service.launch():
        wait_until((service.run_dir / "web" / "control.sock").exists, "it runs")
        service.command = [sys.executable, "-m", "handoff"]
        wait_until(lambda: service.status()["live"] == 1, "it is live")
        assert (service.run_dir / "web" / "lock").read_text().strip().isdigit()
        assert os.readlink(f"/proc/{service.pid}/fd/2") == os.devnull
