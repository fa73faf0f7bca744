"""Sockets from the parent: whose they are, what they are called, and when they are what is served."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from handoff import inherited
from handoff.addresses import Bind
from handoff.errors import ExitCode, UsageError
from handoff.inherited import InheritedSocket, effective_binds, take_inherited


@pytest.fixture
def first_fd(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The first of three inheritable fds in a row, in the place of fd 3."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        base = 200
        for offset in range(3):
            os.dup2(server.fileno(), base + offset, inheritable=True)
        monkeypatch.setattr(inherited, "FIRST_FD", base)
        yield base
        for offset in range(3):
            os.close(base + offset)


def test_sockets_keep_their_names_and_become_close_on_exec(first_fd: int) -> None:
    environ = {"LISTEN_PID": "77", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "web.socket:foo@1.socket", "PATH": "/bin"}
    assert take_inherited(environ, 77) == [
        InheritedSocket("web.socket", first_fd),
        InheritedSocket("foo@1.socket", first_fd + 1),
    ]
    assert environ == {"PATH": "/bin"}
    assert [os.get_inheritable(first_fd + offset) for offset in range(3)] == [False, False, True]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"LISTEN_FDNAMES": "web:web:api"}, ["web", "web-2", "api"]),
        ({"LISTEN_FDNAMES": "unknown:web:unknown"}, ["unknown-1", "web", "unknown-2"]),
        ({"LISTEN_FDNAMES": "web"}, ["web", "unknown-1", "unknown-2"]),
        ({}, ["unknown-1", "unknown-2", "unknown-3"]),
    ],
)
def test_sockets_of_one_name_or_none_are_numbered(first_fd: int, given: dict[str, str], names: list[str]) -> None:
    taken = take_inherited({"LISTEN_PID": "77", "LISTEN_FDS": "3", **given}, 77)
    assert [one.name for one in taken] == names


def test_sockets_for_another_process_are_left_alone_but_not_passed_on(first_fd: int) -> None:
    environ = {"LISTEN_PID": "78", "LISTEN_FDS": "2", "LISTEN_PIDFDID": "1"}
    assert take_inherited(environ, 77) == []
    assert environ == {}
    assert os.get_inheritable(first_fd)


def test_without_the_variables_there_are_none() -> None:
    assert take_inherited({}, 77) == []
    assert take_inherited({"LISTEN_FDS": "2"}, 77) == []


@pytest.mark.parametrize("count", ["two", "-1", "", "9" * 30])
def test_a_count_that_is_none_is_refused(count: str) -> None:
    with pytest.raises(UsageError) as caught:
        take_inherited({"LISTEN_PID": "77", "LISTEN_FDS": count}, 77)
    assert caught.value.message == (
        f"LISTEN_FDS={count!r}: is not a number of sockets; let the parent set it, or unset it"
    )
    assert caught.value.exit_code is ExitCode.USAGE


def test_an_fd_that_is_not_open_is_named(first_fd: int) -> None:
    with pytest.raises(UsageError) as caught:
        take_inherited({"LISTEN_PID": "77", "LISTEN_FDS": "4"}, 77)
    assert caught.value.message == (
        f"LISTEN_FDS=4: fd {first_fd + 3} is not open; let the parent pass it, or unset LISTEN_FDS"
    )


def test_what_was_asked_for_comes_before_what_was_passed_and_that_before_the_default() -> None:
    passed = [InheritedSocket("web", 3)]
    assert effective_binds(["unix:a.sock"], passed, "/srv") == [Bind(kind="unix", path="/srv/a.sock")]
    assert effective_binds([], passed, "/srv") == [Bind(name="web", kind="fd", fd=3)]
    assert effective_binds([], [], "/srv") == [Bind(kind="tcp", host="127.0.0.1", port=8000)]


def test_paths_that_become_the_same_are_refused() -> None:
    with pytest.raises(UsageError, match="bind unix:/srv/a: is there twice"):
        effective_binds(["unix:a", "unix:/srv/a"], [], "/srv")
