"""A version's label, and how it gets into a command line: checked, quoted, and nothing else is filled in."""

from __future__ import annotations

import re
import shlex

from handoff.errors import UsageError

_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}", re.ASCII)
_PLACEHOLDER = re.compile(r"(?P<before>[${]?)\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)\}")


def is_version(text: str) -> bool:
    """Whether it can be a version: up to 128 letters, digits and `. _ + -`, of which the first is a letter or digit."""
    return _VERSION.fullmatch(text) is not None


def filled(template: str, version: str) -> str:
    """The command line with the version for each `{version}`.

    `${NAME}` is the shell's, `{{NAME}}` another program's; both stay. Raises UsageError for a version that is none, for
    any other `{NAME}`, and for `${version}` and `{{version}}`, which would silently be something else.
    """
    if not is_version(version):
        raise UsageError(
            f"version {version!r}: is none; use up to 128 letters, digits and . _ + -, not first one of these"
        )
    if "\0" in template:
        raise UsageError(f"command {template!r}: has a NUL; no command can")
    quoted = shlex.quote(version)

    def fill(found: re.Match[str]) -> str:
        before, name = found["before"], found["name"]
        if name == "version" and not before:
            return quoted
        if name == "version":
            raise UsageError(f"command {template!r}: {found[0]} is not the version; write {{version}}")
        if before:
            return found[0]
        raise UsageError(f"command {template!r}: {{{name}}} is unknown; only {{version}} is filled in")

    return _PLACEHOLDER.sub(fill, template)
