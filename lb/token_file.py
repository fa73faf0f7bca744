"""The file of the token that changes over TCP need."""

from __future__ import annotations

import os
import stat

from handoff.errors import HandoffError

MAXIMUM_TOKEN_BYTES = 4096
NEEDS_TOKEN = (
    "can be reached from other machines; set admin_token_file in [balancer] to a file with a token, or take a loopback"
    " address"
)
"""Of an admin address."""


def read_token(file: str | None) -> str | None:
    """Raises HandoffError."""
    if file is None:
        return None
    try:
        with open(file, "rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            text = opened.read(MAXIMUM_TOKEN_BYTES + 1)
    except OSError as error:
        raise HandoffError(f"admin_token_file {file}: cannot be read ({error.strerror})") from None
    token = text.decode("latin-1").strip()
    if not token or len(text) > MAXIMUM_TOKEN_BYTES or not token.isascii() or not token.isprintable():
        raise HandoffError(
            f"admin_token_file {file}: holds no token; write one line of 1 to {MAXIMUM_TOKEN_BYTES} characters"
        )
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        raise HandoffError(f"admin_token_file {file}: can be read by everybody; chmod 600 it")
    return token
