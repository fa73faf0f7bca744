"""Reloads under load lose nothing."""

from __future__ import annotations

from pathlib import Path

from tests.system.apps import hello
from tests.system.harness import Clients, Service


def test_a_reload_brings_the_new_code(directory: Path) -> None:
    with Service(directory, "-w", "2") as service:
        assert service.get()[2] == b"1"
        (directory / "main.py").write_text(hello("2"))
        done = service.reload()
        assert done.returncode == 0, done.stderr
        assert "generation 2 is live" in done.stdout
        assert service.get()[2] == b"2"
        service.wait_for_generations(2)


def test_twenty_reloads_lose_no_new_connection(directory: Path) -> None:
    with Service(directory, "-w", "2") as service, Clients(service.get, 8) as clients:
        for number in range(2, 22):
            (directory / "main.py").write_text(hello(str(number)))
            assert service.ask({"type": "reload"})["exit_code"] == 0
            clients.more(10)
        service.wait_for_generations(21)
    clients.assert_none_failed()
