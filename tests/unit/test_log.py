"""The master's log: nothing that reads it can block the master, and nothing is lost without being counted."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from handoff import output as module
from handoff.master.log import MAXIMUM_HELD_LINES, MAXIMUM_LINE_BYTES, MasterLog


class Pipe:
    """A pipe that a log writes to. Owns both ends."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def read(self) -> str:
        os.set_blocking(self.reader, False)
        data = b""
        try:
            while chunk := os.read(self.reader, 65536):
                data += chunk
        except BlockingIOError:
            pass
        return data.decode()

    def lines(self) -> list[str]:
        return self.read().splitlines()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    found = Pipe()
    yield found
    os.close(found.reader)
    os.close(found.writer)


@pytest.fixture
def make(pipe: Pipe) -> Iterator[Callable[..., MasterLog]]:
    logs: list[MasterLog] = []

    def make(**arguments: object) -> MasterLog:
        logs.append(MasterLog(**{"fd": pipe.writer, **arguments}))  # type: ignore[arg-type]
        return logs[-1]

    yield make
    for log in logs:
        log.close()


# --- what a line looks like -----------------------------------------------------------------------------------------


def test_a_line_has_time_level_message_and_fields(pipe: Pipe, make: Callable[..., MasterLog]) -> None:
    make().info("serving", generation=3, label="", pid=None, slot=0)
    (line,) = pipe.lines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3} info    handoff serving generation=3 slot=0", line)


def test_json_lines_parse_and_carry_the_fields(pipe: Pipe, make: Callable[..., MasterLog]) -> None:
    log = make(format="json")
    log.warning('a "quoted"\nmessage €', path=Path("/x"), generation=3)
    log.info("second")
    first, second = map(json.loads, pipe.lines())
    assert first["message"] == 'a "quoted"\nmessage €'
    assert (first["level"], first["logger"], first["path"], first["generation"]) == ("warning", "handoff", "/x", 3)
    assert second["message"] == "second"


def test_what_cannot_be_encoded_is_still_written(pipe: Pipe, make: Callable[..., MasterLog]) -> None:
    make().info("path", name="\udcff")
    assert "name=\\udcff" in pipe.read()


def test_a_very_long_line_is_cut(pipe: Pipe, make: Callable[..., MasterLog]) -> None:
    fcntl.fcntl(pipe.writer, fcntl.F_SETPIPE_SZ, 4 * MAXIMUM_LINE_BYTES)
    make().info("x" * 2 * MAXIMUM_LINE_BYTES)
    text = pipe.read()
    assert len(text) == MAXIMUM_LINE_BYTES + 1
    assert text.endswith("x\n")


# --- holding back ---------------------------------------------------------------------------------------------------


def test_held_lines_come_in_order_when_they_are_released(pipe: Pipe, make: Callable[..., MasterLog]) -> None:
    log = make()
    log.hold()
    log.info("first")
    log.info("second")
    assert pipe.read() == ""
    log.release()
    log.info("third")
    assert [line.split()[-1] for line in pipe.lines()] == ["first", "second", "third"]


def test_a_muted_log_says_nothing_of_what_was_held_and_nothing_after(
    pipe: Pipe, make: Callable[..., MasterLog]
) -> None:
    log = make()
    log.hold()
    log.info("held")
    log.mute()
    log.warning("after")
    log.release()
    assert pipe.read() == ""


def test_releasing_what_is_not_held_is_harmless(pipe: Pipe, make: Callable[..., MasterLog]) -> None:
    log = make()
    log.release()
    log.info("x")
    log.release()
    assert len(pipe.lines()) == 1


def test_what_is_held_has_a_bound_and_keeps_its_order(pipe: Pipe, make: Callable[..., MasterLog]) -> None:
    fcntl.fcntl(pipe.writer, fcntl.F_SETPIPE_SZ, 1024 * 1024)
    log = make()
    log.hold()
    for number in range(MAXIMUM_HELD_LINES + 10):
        log.info(str(number))
    log.release()
    numbers = [int(line.split()[-1]) for line in pipe.lines()]
    assert numbers == list(range(MAXIMUM_HELD_LINES + 10))


# --- readers that stall or go ---------------------------------------------------------------------------------------


def test_a_stalled_reader_does_not_block_the_master_and_what_is_dropped_is_counted(
    pipe: Pipe, make: Callable[..., MasterLog]
) -> None:
    log = make()
    fcntl.fcntl(pipe.writer, fcntl.F_SETPIPE_SZ, 4096)
    for number in range(1000):
        log.info(str(number))
    written = pipe.lines()
    assert log.dropped == 1000 - len(written)
    assert 0 < len(written) < 1000
    log.info("again")
    assert pipe.lines()[-1].endswith("again"), "the log goes on when there is room"


def test_the_stderr_that_workers_inherit_stays_blocking(pipe: Pipe, make: Callable[..., MasterLog]) -> None:
    make().info("x")
    assert os.get_blocking(pipe.writer)


def test_a_pipe_that_cannot_be_opened_anew_is_asked_first(
    pipe: Pipe, make: Callable[..., MasterLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "open", refuse)
        log = make()
    fcntl.fcntl(pipe.writer, fcntl.F_SETPIPE_SZ, 4096)
    for number in range(1000):
        log.info(str(number))
    assert log.dropped == 1000 - len(pipe.lines())


def test_a_reader_that_is_gone_costs_the_line_and_not_the_master() -> None:
    reader, writer = os.pipe()
    log = MasterLog(fd=writer)
    os.close(reader)
    log.info("x")
    assert log.dropped == 1
    log.close()
    os.close(writer)


def test_a_socket_as_stderr_gets_the_lines(make: Callable[..., MasterLog]) -> None:
    """As under systemd, where stderr is a socket of the journal."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        log = make(fd=theirs.fileno())
        log.info("hello")
        assert ours.recv(1000).endswith(b"handoff hello\n")


def test_a_full_socket_drops_and_counts_and_stays_blocking_for_others(make: Callable[..., MasterLog]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        log = make(fd=theirs.fileno())
        for _ in range(5000):
            log.info("x" * 100)
        assert log.dropped > 0
        assert os.get_blocking(theirs.fileno())


def test_a_closed_stderr_is_no_reason_to_fail() -> None:
    fd = os.open(os.devnull, os.O_WRONLY)
    os.close(fd)
    log = MasterLog(fd=fd)
    log.info("x")
    log.close()
    assert log.dropped == 1


def test_lines_and_those_of_another_writer_of_the_same_file_stand_side_by_side(
    tmp_path: Path, make: Callable[..., MasterLog]
) -> None:
    """`2>file` without O_APPEND: both write at one shared offset."""
    path = tmp_path / "log"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    log = make(fd=fd)
    for number in range(50):
        log.info(f"master {number}")
        os.write(fd, b"worker %d\n" % number)
    os.close(fd)
    ends = [" ".join(line.split()[-2:]) for line in path.read_text().splitlines()]
    assert ends == [f"{who} {number}" for number in range(50) for who in ("master", "worker")]


def test_closing_leaves_the_borrowed_fd_open(pipe: Pipe) -> None:
    log = MasterLog(fd=pipe.writer)
    log.close()
    os.fstat(pipe.writer)
