"""A real sshd on loopback, with keys and a configuration of its own, in the foreground. It ends with the test."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import psutil

from tests.system.harness import Output

ROOT = Path(__file__).parents[2]
_MAXIMUM_ATTEMPTS = 20
"""Somebody else may take the port between our look and sshd's bind."""
SERVER_CONFIG = """\
ListenAddress 127.0.0.1:{port}
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/authorized_keys
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
"""
CLIENT_CONFIG = """\
Host *
    HostName 127.0.0.1
    Port {port}
    User {user}
    IdentityFile {directory}/key
    IdentitiesOnly yes
    IdentityAgent none
    UserKnownHostsFile {directory}/known_hosts
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    HostKeyAlias box
"""


class Sshd:
    """Use as a context manager. Any destination without a dash leads to it, with `config`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = str(directory / "ssh_config")
        self.state = directory / "state"
        self.port = 0
        self._process: subprocess.Popen[str] | None = None
        self._stderr: Output | None = None

    def __enter__(self) -> Sshd:
        self.directory.mkdir()
        for name in ("host_key", "key", "stranger_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.directory / name)]
            subprocess.run(command, check=True, timeout=60)
        (self.directory / "authorized_keys").write_text((self.directory / "key.pub").read_text())
        kind, key, *_ = (self.directory / "host_key.pub").read_text().split()
        (self.directory / "known_hosts").write_text(f"box {kind} {key}\n")
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd(8): where it separates privileges
        for _ in range(_MAXIMUM_ATTEMPTS):
            if self._is_started():
                user = pwd.getpwuid(os.geteuid()).pw_name
                text = CLIENT_CONFIG.format(port=self.port, user=user, directory=self.directory)
                Path(self.config).write_text(text)
                return self
        raise AssertionError("no port for sshd")

    def _is_started(self) -> bool:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        config = self.directory / "sshd_config"
        config.write_text(SERVER_CONFIG.format(port=self.port, directory=self.directory))
        command = ["/usr/sbin/sshd", "-D", "-e", "-f", str(config)]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self._stderr = Output(self._process.stderr)
        if self._stderr.wait_for("Server listening|Cannot bind any address").group() == "Server listening":
            return True
        self._process.wait(60)
        self._stderr.finish()
        return False

    def __exit__(self, *_: object) -> None:
        if self._process is None or self._stderr is None:
            return
        sessions = self.sessions()
        self._process.terminate()
        self._process.wait(60)
        for one in sessions:
            with contextlib.suppress(psutil.Error):
                one.kill()
        psutil.wait_procs(sessions, 60)
        self._stderr.finish()

    def sessions(self) -> list[psutil.Process]:
        """The processes of sshd that serve connections."""
        assert self._process is not None
        found = []
        for one in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if one.name().startswith("sshd"):
                    found.append(one)
        return found

    def signal(self, number: signal.Signals) -> None:
        """To all that serve connections; the listening process goes on."""
        for one in self.sessions():
            with contextlib.suppress(psutil.Error):
                one.send_signal(number)

    @property
    def handoff(self) -> str:
        """The command `handoff` over there: of this checkout, with a state of its own."""
        site = plug_ins(self.directory / "site")
        path = f"{site}:{ROOT}"
        return f"env HANDOFF_HOST_STATE={self.state} PYTHONPATH={path} {sys.executable} -P -m handoff"


def plug_ins(site: Path) -> Path:
    """Where Python finds the plug-ins of pyproject.toml, whatever is installed."""
    info = site / "plug_ins_test-1.dist-info"
    if not info.exists():
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug-ins-test\nVersion: 1\n")
        entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["handoff.commands"]
        lines = "".join(f"{name} = {value}\n" for name, value in entries.items())
        (info / "entry_points.txt").write_text(f"[handoff.commands]\n{lines}")
    return site
