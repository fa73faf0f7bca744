"""Live relays move: reloads and scaling of a balancer, seen from clients whose connections last."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.balancer import Balancer, config
from tests.system.harness import Clients, wait_until
from tests.system.streams import Download, Echo, StreamServer, Upload

STREAMS = 12


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path


def relays(service: Balancer) -> list[int]:
    """Connections of each relay worker of the live generation."""
    return [one["connections"] for one in service.workers() if one["state"] == "accepting"]


@pytest.mark.parametrize("count", [1, 2])
def test_streams_and_bulk_transfers_move_at_each_reload(directory: Path, count: int) -> None:
    with StreamServer() as server:
        text = f"[balancer]\nrelays = {count}\n" + config({"main": [f'"{server.address}"']})
        with Balancer(directory, text) as service:
            address = ("127.0.0.1", service.port)
            echoes = [Echo(address) for _ in range(STREAMS)]
            clients = [Clients(echo.ask, 1) for echo in echoes]
            for one in clients:
                one.__enter__()
            download, upload = Download(address), Upload(address)
            for _ in range(4):
                assert service.ask({"type": "reload"})["exit_code"] == 0
                wait_until(lambda: len(service.status()["generations"]) == 1, "no old process is left")
                for one in clients:
                    one.more(2)
                before = download.size, upload.size
                wait_until(lambda at=before: download.size > at[0] and upload.size > at[1], "bulk goes on")  # type: ignore[misc]
            for one in clients:
                one.__exit__(None, None, None)
                one.assert_none_failed()
            assert download.finish() > 0
            assert upload.finish() > 0
            assert server.opened == STREAMS + 2, "nobody was connected anew"
            for echo in echoes:
                echo.close()
