"""The files of TLS, read once for a generation, so that each of its workers serves the same certificate."""

from __future__ import annotations

from handoff.env_file import read_small_bytes
from handoff.settings import Settings, TLSFiles


def read_tls_files(settings: Settings) -> TLSFiles | None:
    """None without `--tls-cert`. Raises UsageError, one line."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    ca = None if settings.tls_ca is None else _read("ca", settings.tls_ca)
    return TLSFiles(cert=_read("cert", settings.tls_cert), key=_read("key", settings.tls_key), ca=ca)


def _read(option: str, path: str) -> bytes:
    return read_small_bytes(path, f"tls-{option} {path}")
