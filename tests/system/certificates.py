"""Certificates for tests, made by openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path


def certificate(
    directory: Path, name: str = "", subject: str = "localhost", days: int = 1, host: str = "localhost"
) -> None:
    """A self-signed one for a host: `cert.pem` and `key.pem`, with `name` in front."""
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", f"/CN={subject}", "-addext", f"subjectAltName=DNS:{host}", "-days", str(days)]
    files = ["-keyout", f"{name}key.pem", "-out", f"{name}cert.pem"]
    command = ["openssl", "req", "-x509", *kind, *names, *files]
    subprocess.run(command, cwd=directory, check=True, capture_output=True)
