"""Environment files: lines of KEY=VALUE, as systemd and docker take them."""

from __future__ import annotations

import errno
import os
import re
import stat

from handoff.errors import UsageError

MAX_FILE_BYTES = 1024 * 1024

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_EXPORT = re.compile(r"export[ \t]+")
_COMMENT = re.compile(r"[ \t]+#.*")
_AFTER_QUOTE = re.compile(r"[ \t]*(?:#.*)?")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\", "$": "$"}


def read_env_file(path: str) -> dict[str, str]:
    """The variables in an environment file; of a key that is there twice, the last.

    Values may be in single quotes (taken as they are) or double quotes (with the escapes \\n \\t \\r \\" \\\\ \\$);
    nothing is expanded. Raises UsageError with the file and the line.
    """
    variables = {}
    # Not splitlines(), which also splits where a value may hold a form feed or a line separator.
    for number, line in enumerate(read_small_file(path, f"env file {path}").split("\n"), start=1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        try:
            key, value = _parse_line(stripped)
        except ValueError as error:
            raise UsageError(f"env file {path}: line {number}: {error}") from None
        variables[key] = value
    return variables


def read_small_file(path: str, subject: str) -> str:
    """The text of a regular file of at most 1 MiB of UTF-8; `subject` begins the message of the UsageError."""
    content = read_small_bytes(path, subject)
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{subject}: line {line}: is not UTF-8; save the file as UTF-8") from None


def read_small_bytes(path: str, subject: str) -> bytes:
    """What a regular file of at most 1 MiB holds; `subject` begins the message of the UsageError."""
    try:
        # Not blocking: a named pipe without a writer would hold us up.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise UsageError(f"{subject}: is not a regular file; give one")
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{subject}: {_problem(error)}") from None
    if len(content) > MAX_FILE_BYTES:
        raise UsageError(f"{subject}: has more than {MAX_FILE_BYTES} bytes; at most 1 MiB is read")
    return content


def _problem(error: OSError) -> str:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return "does not exist; create it or give another one"
        case errno.EACCES:
            return "no permission to read it; grant it or give another one"
        case errno.EISDIR:
            return "is not a regular file; give one"
        case _:
            return f"cannot be read ({os.strerror(error.errno or 0)}); give another one"


def _parse_line(line: str) -> tuple[str, str]:
    exported = _EXPORT.match(line)
    assignment = line[exported.end() :] if exported else line
    key, equals, rest = assignment.partition("=")
    if not equals:
        raise ValueError("has no =; write KEY=VALUE")
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is not the name of a variable; write KEY=VALUE with letters, digits and _")
    value = _parse_value(rest)
    if "\0" in value:
        raise ValueError(f"{key} holds a NUL, which no variable can; remove it")
    return key, value


def _parse_value(rest: str) -> str:
    text = rest.lstrip(" \t")
    if text.startswith("'"):
        value, quote, after = text[1:].partition("'")
        if not quote:
            raise ValueError("the quote ' is not closed; close it on the same line")
    elif text.startswith('"'):
        value, after = _parse_double_quoted(text[1:])
    else:
        return _COMMENT.sub("", rest, count=1).strip()  # a # within a word belongs to it, as in a shell
    if not _AFTER_QUOTE.fullmatch(after):
        raise ValueError(f"{after.strip()!r} follows the closing quote; put all of the value into the quotes")
    return value


def _parse_double_quoted(text: str) -> tuple[str, str]:
    """The value up to the closing quote, and what follows it."""
    value: list[str] = []
    position = 0
    while position < len(text):
        character = text[position]
        if character == '"':
            return "".join(value), text[position + 1 :]
        if character == "\\" and position + 1 < len(text):
            escaped = text[position + 1]
            value.append(_ESCAPES.get(escaped, "\\" + escaped))
            position += 2
            continue
        value.append(character)
        position += 1
    raise ValueError('the quote " is not closed; close it on the same line')
