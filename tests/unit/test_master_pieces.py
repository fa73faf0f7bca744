"""Small parts of the master where the kernel says no, or not yet."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from handoff.master import spawn as spawn_module
from handoff.master.command_check import CommandCheck
from handoff.master.describing import Describing
from handoff.master.loop import Loop, Order
from handoff.master.processes import peer_groups
from handoff.master.signals import SignalSocket
from handoff.master.spawn import Command, spawn
from handoff.settings import Launch, Settings


def sleeper(channel: socket.socket, directory: Path) -> Command:
    arguments = [sys.executable, "-c", "import time; time.sleep(1000)"]
    return Command(sys.executable, arguments, str(directory), dict(os.environ), channel.fileno(), [])


def children() -> set[str]:
    return set(Path("/proc/self/task", str(os.getpid()), "children").read_text().split())


def test_a_child_without_a_pidfd_is_ended_and_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    before = children()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        monkeypatch.setattr(spawn_module.os, "pidfd_open", refuse)
        with pytest.raises(OSError, match="Too many open files"):
            spawn(sleeper(theirs, tmp_path))
    assert children() == before


def test_a_signal_is_remembered_even_when_the_wakeup_socket_is_full() -> None:
    signals = SignalSocket()
    try:
        signals._writer.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while signals._writer.send(b"\0"):
                pass
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.read() == [signal.SIGHUP, signal.SIGTERM]
        assert signals.read() == []
    finally:
        signals.close()


def test_who_reaps_strangers_knows_the_processes_that_describe_and_check(tmp_path: Path) -> None:
    before = children()
    loop = Loop()
    describing = Describing(loop)
    words = ("sh", "-c", "sleep 1000")
    launch = Launch(
        overrides={}, directory=str(tmp_path), python="", config=None, env_file=None, describe=words, environment={}
    )
    ended: list[object] = []
    with contextlib.closing(loop), socket.create_server(("127.0.0.1", 0)) as listener:
        describing.start(launch, ended.append)
        settings = Settings(name="web", command=("true",), check="/", check_timeout_seconds=1000)
        check = CommandCheck(loop, [os.getpid()], listener.getsockname(), settings, ended.append)
        assert {str(pid) for pid in describing.pids() | check.pids} == children() - before
        describing.cancel()
        check.close()
        assert not describing.pids() | check.pids
    assert children() == before
    assert not ended


def test_the_groups_of_a_peer_are_told() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_groups(ours) == os.getgroups()


def test_trouble_of_one_callback_goes_to_its_watcher_and_the_others_are_called() -> None:
    loop = Loop()
    one, two = socket.socketpair()
    called: list[object] = []

    def fail() -> None:
        raise ValueError("mine")

    def stop(error: Exception) -> None:
        called.append(repr(error))
        loop.forget(one)

    with one, two:
        loop.watch(one, Order.CHANNEL, fail, on_failure=stop)
        loop.watch(two, Order.EXIT, lambda: called.append("two"))
        one.send(b"x")
        two.send(b"x")
        loop.turn(1.0)
        assert called == ["ValueError('mine')", "two"]
    loop.close()
