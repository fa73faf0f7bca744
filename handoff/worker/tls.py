"""TLS of a worker: its context, so that what is wrong with the files is said before the worker is ready."""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Iterator
from typing import NoReturn

from handoff.errors import UsageError
from handoff.settings import Settings, TLSFiles
from handoff.tls_files import read_tls_files
from handoff.worker.load import BootFailure


def server_context(settings: Settings, pinned: TLSFiles | None) -> ssl.SSLContext | None:
    """None without `--tls-cert`. `pinned`: what the files held when the generation was prepared; an older master does
    not tell. Raises BootFailure, one line.
    """
    try:
        files = pinned or read_tls_files(settings)
    except UsageError as error:
        raise BootFailure(error.message) from None
    if files is None:
        return None
    if any(key.startswith("ssl_") for key in settings.uvicorn):
        raise BootFailure("tls-cert and [uvicorn] ssl_*: say the same thing twice; leave one out")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    with _as_file(files.cert) as cert, _as_file(files.key) as key:
        try:
            context.load_cert_chain(cert, key, password=_no_password)
        except ssl.SSLError as error:
            raise BootFailure(_pair_problem(settings, error)) from None
    if files.ca is not None:
        with _as_file(files.ca) as ca:
            try:
                context.load_verify_locations(ca)
            except ssl.SSLError as error:
                problem = f"holds no certificates in PEM ({_reason(error)})"
                raise BootFailure(f"tls-ca {settings.tls_ca}: {problem}") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


@contextlib.contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """A path for OpenSSL, which reads keys from files only; the content is in memory, and nowhere else."""
    fd = os.memfd_create("handoff-tls", os.MFD_CLOEXEC)
    with open(fd, "wb") as file:
        file.write(content)
        file.flush()
        yield f"/proc/self/fd/{fd}"


def _no_password() -> NoReturn:
    """Without this OpenSSL would ask at the terminal."""
    raise BootFailure("tls-key: is encrypted, and nobody is there to type the password; give a key without one")


def _pair_problem(settings: Settings, error: ssl.SSLError) -> str:
    cert, key = settings.tls_cert, settings.tls_key
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"tls-key {key}: is not the key of tls-cert {cert}; give the pair that belongs together"
    return f"tls-cert {cert}, tls-key {key}: are no certificate and key in PEM ({_reason(error)})"


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "no PEM").lower().replace("_", " ")
