"""systemd's socket activation: the listeners come from the parent, under the parent's names."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

from tests.system.harness import Service


def activator() -> str:
    """The tool of systemd; where CI runs it must be there."""
    found = shutil.which("systemd-socket-activate")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("systemd-socket-activate is missing: install the package systemd")
        pytest.skip("systemd-socket-activate is missing: install the package systemd")
    return found


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def test_inherited_listeners_keep_their_names_over_reloads(directory: Path) -> None:
    web, api = free_ports(2)
    command = [
        activator(),
        *("-l", f"127.0.0.1:{web}", "-l", f"127.0.0.1:{api}", "--fdname=web:api"),
        *("-E", "PATH", "-E", "PYTHONUNBUFFERED", sys.executable, "-m", "handoff"),
    ]
    service = Service(directory, bind=None, command=command)
    service.launch()
    with service:
        service.stderr.wait_for("Listening on")
        with socket.create_connection(("127.0.0.1", web)) as first:  # which starts it
            first.sendall(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
            assert first.recv(12) == b"HTTP/1.1 200"
        expected = {"web": f"127.0.0.1:{web}", "api": f"127.0.0.1:{api}"}
        for _ in range(2):
            assert {one["name"]: one["address"] for one in service.status()["listeners"]} == expected
            for port in (web, api):
                service.port = port
                assert service.get()[2] == b"1"
            assert service.ask({"type": "reload"})["exit_code"] == 0
