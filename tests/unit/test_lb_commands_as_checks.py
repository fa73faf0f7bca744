"""Checks that are commands: good ones, and those that hang, spam, fork or are no programs."""

from __future__ import annotations

import asyncio
import os
import select
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lb.control import command as command_module
from lb.control.checks import Result
from lb.control.command import MAXIMUM_AT_ONCE, MAXIMUM_OUTPUT_BYTES, Commands
from lb.core.model import Check
from lb.core.standing import Outcome
from tests.unit.fds import open_fds
from tests.unit.lb_harness import SECONDS, run


def python(code: str, timeout: float = SECONDS, **fields: Any) -> Check:
    check = Check(type="command", command=(sys.executable, "-S", "-c", code), timeout_seconds=timeout)
    return msgspec.structs.replace(check, **fields)


@pytest.fixture
def no_fd_is_left() -> Iterator[None]:
    before = open_fds()
    yield
    assert not open_fds() - before


async def result_of(check: Check, address: str = "10.0.0.1:80", typed: str = "app.internal:80") -> tuple[Outcome, str]:
    commands = Commands({**os.environ, "HANDOFF_NAME": "edge", "LISTEN_FDS": "3", "GIVEN": "yes"})
    try:
        result = await commands.run(check, address, typed)
    finally:
        commands.close()
    return result.outcome, result.reason


@pytest.mark.usefixtures("no_fd_is_left")
@pytest.mark.parametrize(
    ("check", "reason"),
    [
        (python("print('fine')"), "passed in "),
        (python("import sys; print('\\n CRITICAL: \\x1b[31mdisk'); sys.exit(2)"), "exit code 2: CRITICAL: ?[31mdisk"),
        (python("import os; os.kill(os.getpid(), 9)"), "killed by signal 9"),
        (python("import time; print('on it', flush=True); time.sleep(100)", 0.3), "no end within 0.3 s"),
        (python("while True: print('spam' * 1000)"), f"wrote more than {MAXIMUM_OUTPUT_BYTES} bytes: spamspam"),
        (python("import sys; sys.stderr.write('err'); sys.exit(1)"), "exit code 1: err"),
        (python("import os; os.close(1); os.close(2)"), "passed in "),
        (python("import sys; sys.exit(len(sys.stdin.read()))"), "passed in "),
        (Check(type="command", command=("/none/there",)), "/none/there: no such file or directory"),
        (Check(type="command", command=("/etc/passwd",)), "/etc/passwd: permission denied"),
        (Check(type="command", command=("echo", "$HOME; false"), timeout_seconds=SECONDS), "passed in "),
    ],
)
def test_what_passes_and_what_does_not_and_why(check: Check, reason: str) -> None:
    async def test() -> None:
        outcome, told = await result_of(check)
        assert told.startswith(reason)
        assert (outcome is Outcome.PASSED) is reason.startswith("passed")

    run(test)


def test_a_command_is_told_whom_to_ask_and_nothing_that_is_ours() -> None:
    async def test() -> None:
        code = """
import os, sys
found = {key: value for key, value in os.environ.items() if key.startswith(("HANDOFF_", "LISTEN_", "GIVEN"))}
print(sorted(found.items()))
sys.exit(1)
"""
        _, told = await result_of(python(code, port=81))
        assert "'HANDOFF_BACKEND_ADDRESS', '10.0.0.1:80'" in told
        for words in ("'HANDOFF_BACKEND_PORT', '81'", "'HANDOFF_BACKEND_NAME', 'app.internal'", "'GIVEN', 'yes'"):
            name, value = words.replace("'", "").split(", ")
            outcome, problem = await result_of(python(f"import os; assert os.environ[{name!r}] == {value!r}", port=81))
            assert outcome is Outcome.PASSED, problem
        absent = "import os; assert not {'HANDOFF_NAME', 'LISTEN_FDS'} & set(os.environ)"
        assert (await result_of(python(absent)))[0] is Outcome.PASSED
        path = "import os; assert os.environ['HANDOFF_BACKEND_PATH'] == '/run/a.sock'"
        assert (await result_of(python(path), "unix:/run/a.sock", "unix:/run/a.sock"))[0] is Outcome.PASSED

    run(test)


FORKS = """
import os, sys, time
for number in range(3):
    if os.fork() == 0:
        with open(sys.argv[1] + f".{number}", "w") as file:
            file.write(str(os.getpid()))
        os.rename(sys.argv[1] + f".{number}", sys.argv[1] + f"{number}")
        while True:
            time.sleep(100)
while not all(os.path.exists(sys.argv[1] + f"{number}") for number in range(3)):
    time.sleep(0.01)
if sys.argv[2] == "spam":
    while True:
        print("x" * 10_000)
"""


@pytest.mark.usefixtures("no_fd_is_left")
@pytest.mark.parametrize("how", ["leave", "spam"])
def test_what_a_command_has_forked_ends_with_it(tmp_path: Path, how: str) -> None:
    path = tmp_path / "pid"
    check = Check(
        type="command",
        command=(sys.executable, "-S", "-c", FORKS, str(path), how),
        timeout_seconds=SECONDS,
    )

    async def test() -> None:
        outcome, told = await result_of(check)
        assert outcome is (Outcome.PASSED if how == "leave" else Outcome.FAILED), told

    run(test)
    for number in range(3):
        wait_for_end(int(Path(f"{path}{number}").read_text()))


def wait_for_end(pid: int) -> None:
    """Of a process that is no child of ours: killed is not yet gone."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert poll.poll(SECONDS * 1000), f"{pid} runs on"
    finally:
        os.close(fd)


@pytest.mark.usefixtures("no_fd_is_left")
def test_a_command_that_is_not_wanted_any_more_is_killed(tmp_path: Path) -> None:
    fifo = tmp_path / "pid"
    os.mkfifo(fifo)
    code = f"import os, time\nwith open({str(fifo)!r}, 'w') as file: file.write(str(os.getpid()))\ntime.sleep(100)"

    async def test() -> None:
        commands = Commands(os.environ)
        asking = asyncio.ensure_future(commands.run(python(code), "10.0.0.1:80", "10.0.0.1:80"))
        pid = int(await asyncio.to_thread(fifo.read_text))
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.to_thread(wait_for_end, pid)
        await asyncio.to_thread(commands._threads.shutdown)

    run(test)


def test_no_more_than_so_many_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    together, most, lock = 0, 0, threading.Lock()
    eight = threading.Barrier(8, timeout=SECONDS)

    def counted(*_: object) -> Result:
        nonlocal together, most
        with lock:
            together += 1
            most = max(most, together)
        eight.wait()  # so many are let in, or it is broken
        with lock:
            together -= 1
        return Result(Outcome.PASSED, "", 0.0)

    monkeypatch.setattr(command_module, "run_command", counted)

    async def test() -> None:
        commands = Commands(os.environ)
        asked = [commands.run(python(""), f"10.0.0.1:{number}", "app:80") for number in range(1, 25)]
        assert len(await asyncio.gather(*asked)) == 24
        commands.close()

    run(test)
    assert most == MAXIMUM_AT_ONCE == 8
