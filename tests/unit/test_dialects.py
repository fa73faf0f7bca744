"""The words of commands: what is read of them, and what is not."""

from __future__ import annotations

import pytest

from handoff.core.dialects import EinhornCommand, Inherited, listener_variables, read_einhorn_command, read_notification

ACK = EinhornCommand("worker:ack", 7)


@pytest.mark.parametrize(
    "line",
    [
        b"---%0Acommand: worker:ack%0Apid: 7%0A",  # Ruby's YAML.dump, escaped by einhorn's client
        b"--- %0Acommand: worker:ack%0Apid: 7%0A",  # Ruby 1.8
        b"---%0Acommand:%20worker:ack%0Apid:%207",  # node-einhorn
        b'---%0A"command": "worker:ack"%0Apid: 7%0A',
        b'{"command":"worker:ack", "pid":7}',  # the README
        b'{"command": "worker:ack", "pid": 7}\r',
        b"---%0Acommand: worker:ack%0Apid: 7%0Aid: abc%0A",
    ],
)
def test_an_ack_is_read_however_it_is_written(line: bytes) -> None:
    assert read_einhorn_command(line) == ACK


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"worker:ack",
        b"---%0Acommand: worker:ack",
        b"---%0Acommand: worker:ack%0Apid: seven",
        b"---%0Acommand: !ruby/object:Object {}%0Apid: 7",
        b"---%0Acommand: &a worker:ack%0Apid: *a",
        b"%0Acommand: worker:ack%0Apid: 7",
        b"\xff\xfe",
        b"[" * 1000,
        b'{"command": ' + b"[" * 1000,
        b'{"command": "worker:ack"}',
        b'{"command": "worker:ack", "pid": "7"}',
    ],
)
def test_what_is_no_command_is_not_read(line: bytes) -> None:
    assert read_einhorn_command(line) is None


def test_einhorn_is_told_of_listeners_by_number_and_family() -> None:
    listeners = [Inherited("web", "127.0.0.1:80", "AF_INET"), Inherited("local", "unix:/a", "AF_UNIX")]
    assert listener_variables("einhorn", listeners, 2) == {
        "EINHORN_FD_COUNT": "2",
        "EINHORN_FD_0": "3",
        "EINHORN_FD_FAMILY_0": "AF_INET",
        "EINHORN_FD_1": "4",
        "EINHORN_FD_FAMILY_1": "AF_UNIX",
    }


def test_auto_speaks_all_dialects() -> None:
    found = listener_variables("auto", [Inherited("web", "127.0.0.1:80", "AF_INET")], 2)
    assert {"LISTEN_FDS", "SERVER_STARTER_PORT", "EINHORN_FD_COUNT"} <= set(found)


def test_a_watchdog_is_read_within_bounds() -> None:
    assert read_notification(b"WATCHDOG=1").is_alive
    assert read_notification(b"WATCHDOG=trigger").is_broken
    assert read_notification(b"WATCHDOG_USEC=2500000").watchdog_seconds == 2.5
    for text in ("0", "-1", "1", "x", "9" * 15, "9" * 30, "2.5"):
        assert read_notification(f"WATCHDOG_USEC={text}".encode()).watchdog_seconds is None


def test_what_is_stored_follows_the_listeners() -> None:
    found = listener_variables("systemd", [Inherited("web", "127.0.0.1:80", "AF_INET")], 2, ["a", "stored"])
    assert found == {"LISTEN_FDS": "3", "LISTEN_FDNAMES": "web:a:stored"}


@pytest.mark.parametrize(("text", "name"), [("state 1", "state 1"), ("a:b", None), ("a\x01", None), ("x" * 256, None)])
def test_the_name_of_an_fd_is_one_that_the_variable_can_hold(text: str, name: str | None) -> None:
    assert read_notification(f"FDSTORE=1\nFDNAME={text}".encode()).fd_name == name


def test_words_are_lines_and_nothing_else_ends_a_line() -> None:
    said = read_notification("STATUS=one\u2028READY=1\x0bWATCHDOG=1\rSTOPPING=1\nFDSTORE=1".encode())
    assert (said.is_ready, said.is_alive, said.is_stopping, said.stores_fds) == (False, False, False, True)
    assert said.status == "oneREADY=1WATCHDOG=1STOPPING=1"
