"""Child processes of the deployer."""

from __future__ import annotations

import asyncio
import os
import sys

import psutil
import pytest

from lb.rollout import processes
from lb.rollout.processes import Flooded, Ran, run
from tests.system.harness import wait_until


def children() -> list[psutil.Process]:
    return [one for one in psutil.Process().children() if one.cmdline()[:1] == ["cat"]]


def test_what_a_process_reads_writes_and_says() -> None:
    command = ["sh", "-c", "cat; echo problem >&2; exit 4"]
    assert asyncio.run(run(command, b"x" * 200_000, 60)) == Ran(4, b"x" * 200_000, "problem\n")


def test_a_process_that_does_not_read_its_input_is_no_error() -> None:
    assert asyncio.run(run(["sh", "-c", "echo done"], b"x" * 2_000_000, 60)).output == b"done\n"


def test_at_its_timeout_it_is_killed() -> None:
    with pytest.raises(TimeoutError):
        asyncio.run(run(["cat", "/dev/zero"], b"", 0))
    fifo_end, keep = os.pipe()
    try:
        with pytest.raises(TimeoutError):
            asyncio.run(run(["cat", f"/proc/{os.getpid()}/fd/{fifo_end}"], b"", 0.1))
    finally:
        os.close(fifo_end)
        os.close(keep)
    assert children() == []


def test_who_is_cancelled_kills_it() -> None:
    fifo_end, keep = os.pipe()

    async def scenario() -> None:
        waiting = asyncio.create_task(run(["cat", f"/proc/{os.getpid()}/fd/{fifo_end}"], b"", 60))
        await asyncio.to_thread(wait_until, children, "it runs")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(scenario())
    os.close(fifo_end)
    os.close(keep)
    assert children() == []


def test_one_that_writes_too_much_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "MAXIMUM_OUTPUT_BYTES", 100_000)
    with pytest.raises(Flooded, match="wrote more than 100000 bytes"):
        asyncio.run(run(["cat", "/dev/zero"], b"", 60))
    assert children() == []


def test_of_what_it_says_the_end_is_kept() -> None:
    ran = asyncio.run(run(["sh", "-c", "yes | head -c 1000000 >&2; echo last >&2"], b"", 60))
    assert ran.errors.endswith("\ny\nlast\n")
    assert len(ran.errors) == processes._KEPT_ERROR_BYTES


def test_what_stays_in_the_background_with_its_stderr_is_not_waited_for() -> None:
    read_end, write_end = os.pipe()
    # Ends when our end of the pipe is closed.
    behind = f"import sys; open('/proc/{os.getpid()}/fd/{read_end}').read()"
    text = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {behind!r}], stdout=subprocess.DEVNULL)"
    try:
        assert asyncio.run(run([sys.executable, "-c", text + "; print('done')"], b"", 60)).output == b"done\n"
    finally:
        os.close(write_end)
        os.close(read_end)


def test_a_command_that_is_not_there_is_an_error_and_leaves_no_fd() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        asyncio.run(run(["/nowhere"], b"", 60))
    assert len(os.listdir("/proc/self/fd")) == before
