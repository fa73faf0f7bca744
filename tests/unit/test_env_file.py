"""Environment files: what is read, and what is refused with its line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from handoff.env_file import MAX_FILE_BYTES, read_env_file
from handoff.errors import ExitCode, UsageError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "web.env"


def _message(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        read_env_file(str(path))
    assert caught.value.exit_code is ExitCode.USAGE
    assert caught.value.message.isprintable()
    return caught.value.message.replace(str(path), "FILE")


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("KEY=value", "value"),
        ("  KEY=value  ", "value"),
        ("export KEY=value", "value"),
        ("export\t KEY=value", "value"),
        ("KEY=", ""),
        ("KEY=''", ""),
        ("KEY= spaced out ", "spaced out"),
        ("KEY=a=b", "a=b"),
        ("KEY=value # comment", "value"),
        ("KEY= # comment", ""),
        ("KEY=pass#word", "pass#word"),
        ("KEY=#word", "#word"),
        ("KEY='a # b \\n $X'", "a # b \\n $X"),
        ("KEY='a' # comment", "a"),
        ('KEY="a # b"#comment', "a # b"),
        (r'KEY="line\nline\ttab \"quoted\" \\ \$X \d"', 'line\nline\ttab "quoted" \\ $X \\d'),
        ("KEY=it's", "it's"),
        ("KEY=größe", "größe"),
        ("KEY=a\u2028b", "a\u2028b"),
    ],
)
def test_a_line_is_read(path: Path, line: str, value: str) -> None:
    path.write_text(f"# comment\n\n{line}\nOTHER=1\n", encoding="utf-8")
    assert read_env_file(str(path)) == {"KEY": value, "OTHER": "1"}


def test_line_ends_of_windows_a_byte_order_mark_and_a_missing_last_line_end_do_no_harm(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbfA=1\r\nB='2'\r\nC=3")
    assert read_env_file(str(path)) == {"A": "1", "B": "2", "C": "3"}


def test_of_a_key_that_is_there_twice_the_last_counts(path: Path) -> None:
    path.write_text("A=1\nA=2\n")
    assert read_env_file(str(path)) == {"A": "2"}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("KEY", "has no =; write KEY=VALUE"),
        ("=value", "'' is not the name of a variable; write KEY=VALUE with letters, digits and _"),
        ("1KEY=value", "'1KEY' is not the name of a variable; write KEY=VALUE with letters, digits and _"),
        ("KEY =value", "'KEY ' is not the name of a variable; write KEY=VALUE with letters, digits and _"),
        ("KEY='value", "the quote ' is not closed; close it on the same line"),
        ('KEY="value', 'the quote " is not closed; close it on the same line'),
        ('KEY="value\\"', 'the quote " is not closed; close it on the same line'),
        ("KEY='a'b", "'b' follows the closing quote; put all of the value into the quotes"),
        ("KEY=a\0b", "KEY holds a NUL, which no variable can; remove it"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(path: Path, line: str, problem: str) -> None:
    path.write_text(f"GOOD=1\n\n{line}\n")
    assert _message(path) == f"env file FILE: line 3: {problem}"


def test_a_missing_file_is_one_line(path: Path) -> None:
    assert _message(path) == "env file FILE: does not exist; create it or give another one"


def test_a_directory_and_a_named_pipe_are_refused_without_waiting(path: Path, tmp_path: Path) -> None:
    os.mkfifo(path)
    assert _message(path) == "env file FILE: is not a regular file; give one"
    assert _message(tmp_path) == "env file FILE: is not a regular file; give one"


def test_a_file_that_may_not_be_read_is_one_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    assert _message(path) == "env file FILE: no permission to read it; grant it or give another one"


def test_a_file_of_more_than_1_mib_is_refused(path: Path) -> None:
    line = b"#" * (MAX_FILE_BYTES - 1) + b"\n"
    path.write_bytes(line)
    assert read_env_file(str(path)) == {}
    path.write_bytes(line + b"\n")
    assert _message(path) == "env file FILE: has more than 1048576 bytes; at most 1 MiB is read"


def test_a_file_that_is_not_utf_8_is_refused_with_its_line(path: Path) -> None:
    path.write_bytes(b"A=1\nB=\xff\n")
    assert _message(path) == "env file FILE: line 2: is not UTF-8; save the file as UTF-8"
