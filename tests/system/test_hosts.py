"""Hosts reached by a real ssh and a real sshd: commands that outlive sessions."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import socket
import subprocess
import tempfile
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from handoff.errors import ExitCode, HandoffError, UsageError
from lb.rollout import ssh
from lb.rollout.processes import Ran
from lb.rollout.transport import AccessDenied, Done, Transport, Unfinished, Unreachable, transport_for
from tests.system.harness import wait_until
from tests.system.sshd import Sshd

T = TypeVar("T")
SECONDS = 60.0


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with Sshd(tmp_path_factory.mktemp("sshd") / "server") as server:
        yield server


class Waiting:
    """A command that counts its runs, and ends when it is told to."""

    def __init__(self, directory: Path) -> None:
        self.runs = directory / "runs"
        self.gate = directory / "gate"
        os.mkfifo(self.gate)
        self.line = f"echo run >> {self.runs}; read word < {self.gate}; echo $word"

    async def has_started(self) -> None:
        await asyncio.to_thread(wait_until, self.runs.exists, "the command runs")

    async def end(self) -> None:
        await asyncio.to_thread(self.gate.write_text, "ended\n")

    @property
    def count(self) -> int:
        return len(self.runs.read_text().splitlines())


def reach(sshd: Sshd, name: str = "box", **changes: Any) -> Transport:
    return transport_for(name, **{"handoff": sshd.handoff, "ssh_config": sshd.config, **changes})


def run(scenario: Coroutine[Any, Any, T]) -> T:
    """At most two minutes, whatever goes wrong."""

    async def bounded() -> T:
        async with asyncio.timeout(100):
            return await scenario

    return asyncio.run(bounded())


def test_a_command_runs_once_and_a_second_call_answers_what_is_kept(sshd: Sshd, tmp_path: Path) -> None:
    async def scenario() -> list[Done]:
        host = reach(sshd)
        line = f"echo run >> {tmp_path}/runs; echo $HANDOFF_OPERATION $HANDOFF_TOKEN; exit 3"
        found = [await host.execute("once", 7, "r1/box/stage", line, SECONDS) for _ in range(2)]
        await host.aclose()
        return found

    assert run(scenario()) == [Done(3, "r1/box/stage 7\n")] * 2
    assert (tmp_path / "runs").read_text() == "run\n"


@pytest.mark.parametrize("side", ["client", "connection", "server", "network"])
def test_a_session_that_breaks_in_the_middle_changes_nothing(
    sshd: Sshd, tmp_path: Path, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "ALIVE_SECONDS", 1)

    async def scenario() -> Done:
        host = reach(sshd)
        command = Waiting(tmp_path)
        running = asyncio.create_task(host.execute("cut", 1, f"cut-{side}", command.line, SECONDS))
        await command.has_started()
        if side == "server":
            sshd.signal(signal.SIGKILL)
        elif side == "network":
            sshd.signal(signal.SIGSTOP)  # nothing comes from there any more
        else:
            for one in ssh_processes(sshd, is_connection=side == "connection"):
                one.kill()
        # It is joined: a second run of the command would write, and then wait at the gate in vain.
        ending = asyncio.create_task(command.end())
        done = await running
        await ending
        assert command.count == 1
        await host.aclose()
        return done

    assert run(scenario()) == Done(0, "ended\n")


def ssh_processes(sshd: Sshd, *, is_connection: bool) -> list[psutil.Process]:
    """Our ssh to that server: what holds the connection, or what is in a session over it."""
    found = []
    for one in psutil.process_iter(["cmdline", "name"]):
        words = one.info["cmdline"] or []
        if one.info["name"] == "ssh" and sshd.config in " ".join(words):
            is_master = not any("exec" in word for word in words)
            if is_master == is_connection:
                found.append(one)
    assert found
    return found


def test_words_arrive_as_they_were_meant(sshd: Sshd, tmp_path: Path) -> None:
    words = [
        "",
        " ",
        "a b",
        "'",
        '"',
        "$HOME",
        "`id`",
        "$(id)",
        "a;b",
        "&&",
        "|",
        "*",
        "\\",
        "\n",
        "-n",
        "~",
        "#",
        "!!",
        "é",
    ]

    async def scenario() -> tuple[bytes, Done]:
        host = reach(sshd)
        direct = await host.request(["printf", "<%s>", *words], b"", SECONDS)
        line = f"printf '<%s>' {shlex.join(words)}"
        executed = await host.execute("words", 1, "words", line, SECONDS)
        await host.aclose()
        return direct, executed

    expected = "".join(f"<{word}>" for word in words)
    direct, executed = run(scenario())
    assert direct.decode() == expected
    assert executed == Done(0, expected)


def test_stdin_goes_there_and_the_exit_code_comes_back(sshd: Sshd) -> None:
    async def scenario() -> None:
        host = reach(sshd)
        assert await host.request(["cat"], b"x" * 300_000, SECONDS) == b"x" * 300_000
        with pytest.raises(HandoffError, match=r"^box: no such thing$") as caught:
            await host.request(["sh", "-c", "echo one >&2; echo no such thing >&2; exit 5"], b"", SECONDS)
        assert caught.value.exit_code == ExitCode.NO_SUCH_SERVICE
        assert (await host.request(["handoff", "--version"], b"", SECONDS)).startswith(b"handoff, version ")
        await host.aclose()

    run(scenario())


def test_a_host_that_refuses_connections_is_unreachable(sshd: Sshd, tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        config = tmp_path / "config"
        port = nobody.getsockname()[1]
        config.write_text(Path(sshd.config).read_text().replace(f"Port {sshd.port}", f"Port {port}"))

        async def scenario() -> None:
            host = reach(sshd, ssh_config=str(config))
            with pytest.raises(Unreachable, match=r"^box: cannot be reached: .*Connection refused"):
                await host.execute("none", 1, "never", "true", SECONDS)
            await host.aclose()

        run(scenario())


def test_a_host_that_does_not_let_us_in_is_not_tried_again(sshd: Sshd, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(Path(sshd.config).read_text().replace("/key\n", "/stranger_key\n"))

    async def scenario() -> None:
        host = reach(sshd, ssh_config=str(config))
        with pytest.raises(AccessDenied, match=r"^box: cannot be reached: .*Permission denied"):
            await host.execute("none", 1, "never", "true", SECONDS)
        await host.aclose()

    run(scenario())


def test_a_host_without_handoff_says_so(sshd: Sshd) -> None:
    async def scenario() -> None:
        host = reach(sshd, handoff="/nowhere/handoff")
        with pytest.raises(HandoffError, match=r"^box: .*/nowhere/handoff.*; say where it is there, or install it$"):
            await host.execute("none", 1, "never", "true", SECONDS)
        await host.aclose()

    run(scenario())


def test_a_command_that_hangs_goes_on_after_the_timeout_and_is_joined(sshd: Sshd, tmp_path: Path) -> None:
    async def scenario() -> None:
        host = reach(sshd)
        command = Waiting(tmp_path)
        with pytest.raises(Unfinished, match="operation hung still runs after 200ms") as caught:
            await host.execute("hung", 1, "hung", command.line, 0.2)
        assert caught.value.exit_code == ExitCode.TIMED_OUT
        joined = asyncio.create_task(host.execute("hung", 1, "hung", command.line, SECONDS))
        await command.end()
        assert await joined == Done(0, "ended\n")
        assert command.count == 1
        await host.aclose()

    run(scenario())


def test_a_call_that_is_cancelled_leaves_the_command_alone(sshd: Sshd, tmp_path: Path) -> None:
    async def scenario() -> None:
        host = reach(sshd)
        command = Waiting(tmp_path)
        running = asyncio.create_task(host.execute("cancelled", 1, "cancelled", command.line, SECONDS))
        await command.has_started()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        joined = asyncio.create_task(host.execute("cancelled", 1, "cancelled", command.line, SECONDS))
        await command.end()
        assert await joined == Done(0, "ended\n")
        assert command.count == 1
        await host.aclose()

    run(scenario())


def test_a_command_can_be_stopped(sshd: Sshd, tmp_path: Path) -> None:
    async def scenario() -> None:
        host = reach(sshd)
        command = Waiting(tmp_path)
        running = asyncio.create_task(host.execute("stopped", 1, "stopped", command.line, SECONDS))
        await command.has_started()
        assert await host.stop("stopped", 1, "stopped", SECONDS) == Done(143, "")
        assert await running == Done(143, "")
        await host.aclose()

    run(scenario())


def test_an_older_token_is_refused(sshd: Sshd) -> None:
    async def scenario() -> None:
        host = reach(sshd)
        assert (await host.execute("fenced", 5, "new", "true", SECONDS)).exit_code == 0
        with pytest.raises(HandoffError, match=r"^box: service fenced: is fenced: token 4 is older than 5") as caught:
            await host.execute("fenced", 4, "old", "true", SECONDS)
        assert caught.value.exit_code == ExitCode.ABORTED
        await host.aclose()

    run(scenario())


def test_this_machine_is_a_host_like_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANDOFF_HOST_STATE", str(tmp_path / "state"))

    async def scenario() -> None:
        host = transport_for(None)
        line = f"echo run >> {tmp_path}/runs; echo $HANDOFF_OPERATION; exit 3"
        assert [await host.execute("shop", 2, "one", line, SECONDS) for _ in range(2)] == [Done(3, "one\n")] * 2
        with pytest.raises(HandoffError, match=r"^this machine: service shop: is fenced: token 1 is older than 2"):
            await host.execute("shop", 1, "two", line, SECONDS)
        assert await host.request(["cat"], b"there and back", SECONDS) == b"there and back"
        assert (await host.request(["handoff", "--version"], b"", SECONDS)).startswith(b"handoff, version ")
        with pytest.raises(HandoffError, match=r"^this machine: /nowhere: No such file or directory$"):
            await host.request(["/nowhere"], b"", SECONDS)
        await host.aclose()

    run(scenario())
    assert (tmp_path / "runs").read_text() == "run\n"


def test_many_hosts_are_reached_in_parallel_and_no_more_at_once_than_said(
    sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, most = set[int](), 0
    original = ssh.run

    async def counted(argv: Sequence[str], stdin: bytes, timeout: float, **options: bool) -> Ran:
        nonlocal most
        now.add(id(argv))
        most = max(most, len(now))
        try:
            return await original(argv, stdin, timeout, **options)
        finally:
            now.remove(id(argv))

    monkeypatch.setattr(ssh, "run", counted)

    async def scenario() -> list[Done]:
        gate = asyncio.Semaphore(2)
        hosts = [reach(sshd, f"web{number}", gate=gate) for number in range(3)]
        calls = (host.execute("many", 1, f"many-{host.name}", f"echo {host.name}", SECONDS) for host in hosts)
        found = await asyncio.gather(*calls)
        for host in hosts:
            await host.aclose()
        return found

    assert run(scenario()) == [Done(0, f"web{number}\n") for number in range(3)]
    assert most == 2
    assert not now


def test_closing_ends_the_connection_and_leaves_no_file(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(runtime: str) -> None:
        host = reach(sshd)
        await host.request(["true"], b"", SECONDS)
        (name,) = os.listdir(runtime)
        directory = f"{runtime}/{name}"
        assert os.stat(directory).st_mode & 0o777 == 0o700
        command = ["ssh", "-F", sshd.config, "-o", f"ControlPath={directory}/0", "-O", "check", "box"]
        said = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True, timeout=60)
        pid = int(said.stderr.partition("pid=")[2].partition(")")[0])
        connection = psutil.Process(pid)
        await host.aclose()
        await asyncio.to_thread(connection.wait, 60)
        assert os.listdir(runtime) == []
        await host.aclose()

    # Not pytest's directory: the path of a unix socket may have 107 bytes only.
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.setenv("XDG_RUNTIME_DIR", short)
        run(scenario(short))


@pytest.mark.parametrize("destination", ["", "-oProxyCommand=id", "a b", "a;id", "$(id)", "a\nb"])
def test_what_is_no_destination_is_refused(destination: str) -> None:
    with pytest.raises(UsageError, match="is no destination; write HOST, USER@HOST or ssh://USER@HOST:PORT"):
        transport_for(destination)
