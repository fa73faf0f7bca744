"""TLS of a worker: the context made of files, so that what is wrong with them is said before the worker is ready."""

from __future__ import annotations

import os
import ssl
from typing import NoReturn

from handoff.settings import Settings
from handoff.worker.load import BootFailure


def server_context(settings: Settings) -> ssl.SSLContext | None:
    """None without `--tls-cert`. Raises BootFailure, one line."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    if any(key.startswith("ssl_") for key in settings.uvicorn):
        raise BootFailure("tls-cert and [uvicorn] ssl_*: say the same thing twice; leave one out")
    for option, path in (("cert", settings.tls_cert), ("key", settings.tls_key), ("ca", settings.tls_ca)):
        if path is not None:
            _check_readable(option, path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password=_no_password)
    except ssl.SSLError as error:
        raise BootFailure(_pair_problem(settings.tls_cert, settings.tls_key, error)) from None
    if settings.tls_ca is not None:
        try:
            context.load_verify_locations(settings.tls_ca)
        except ssl.SSLError as error:
            raise BootFailure(f"tls-ca {settings.tls_ca}: holds no certificates in PEM ({_reason(error)})") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _check_readable(option: str, path: str) -> None:
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        problem = os.strerror(error.errno or 0)
        raise BootFailure(f"tls-{option} {path}: cannot be read ({problem}); correct the path or its mode") from None


def _no_password() -> NoReturn:
    """Without this OpenSSL would ask at the terminal."""
    raise BootFailure("tls-key: is encrypted, and nobody is there to type the password; give a key without one")


def _pair_problem(cert: str, key: str, error: ssl.SSLError) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"tls-key {key}: is not the key of tls-cert {cert}; give the pair that belongs together"
    return f"tls-cert {cert}, tls-key {key}: are no certificate and key in PEM ({_reason(error)})"


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "no PEM").lower().replace("_", " ")
