"""Live relays move: reloads and scaling of a balancer, seen from clients whose connections last."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.system.balancer import Balancer, config
from tests.system.harness import Clients, wait_until
from tests.system.streams import Download, Echo, StreamServer, Upload
from tests.unit.lb_harness import closed_port

STREAMS = 6


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
            for _ in range(3):
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


def test_relay_workers_share_connections_as_their_number_changes(directory: Path) -> None:
    with StreamServer() as server, Balancer(directory, config({"main": [f'"{server.address}"']})) as service:
        echoes = [Echo(("127.0.0.1", service.port)) for _ in range(STREAMS)]
        for workers in (3, 1, 2):
            assert service.ask({"type": "scale", "workers": workers})["exit_code"] == 0
            even = [STREAMS // workers] * workers
            wait_until(lambda wanted=even: relays(service) == wanted, f"{workers} have their share")  # type: ignore[misc]
            for echo in echoes:
                echo.ask()
        assert server.opened == STREAMS
        for echo in echoes:
            echo.close()


def test_who_waits_for_a_place_moves_and_gets_it(directory: Path) -> None:
    with StreamServer() as server:
        one = f'{{ name = "one", address = "{server.address}", maxconn = 1 }}'
        with Balancer(directory, config({"main": [one]}, service='timeouts = { queue = "60s" }')) as service:
            address = ("127.0.0.1", service.port)
            first, second = Echo(address), Echo(address)
            first.ask()
            for _ in range(2):
                assert service.ask({"type": "reload"})["exit_code"] == 0
                wait_until(lambda: len(service.status()["generations"]) == 1, "no old process is left")
                first.ask()
            assert server.opened == 1
            first.close()
            second.ask()
            second.close()


def test_who_waits_is_served_though_the_service_is_called_otherwise_by_now(directory: Path) -> None:
    with StreamServer() as server:
        one = f'{{ name = "one", address = "{server.address}", maxconn = 1 }}'
        listen = f"127.0.0.1:{closed_port()}"  # by which the listener is known as the same
        text = config({"main": [one]}, service='timeouts = { queue = "60s" }', listen=listen)
        with Balancer(directory, text) as service:
            first, second = (Echo(("127.0.0.1", service.port)) for _ in range(2))
            first.ask()
            service.write(text.replace('"shop"', '"store"'))
            assert service.ask({"type": "reload"})["exit_code"] == 0
            first.ask()
            second.ask()
            assert server.opened == 2
            first.close()
            second.close()


def test_who_waits_in_an_old_relay_worker_hears_of_a_new_table(directory: Path) -> None:
    """The new file has one listener less: who came there, and has no backend yet, waits in the worker of before."""
    with StreamServer() as server, StreamServer() as other:
        one = f'{{ name = "one", address = "{server.address}", maxconn = 1 }}'
        text = config({"main": [one]}, service='timeouts = { queue = "60s" }')
        both = text.replace('"127.0.0.1:0"', '"127.0.0.1:0", "127.0.0.2:0"')
        with Balancer(directory, both) as service:
            first, second = (Echo(("127.0.0.1", service.port)) for _ in range(2))
            first.ask()
            service.write(text)
            assert service.ask({"type": "reload"})["exit_code"] == 0
            draining = "the relay has moved, and who waits is in the old worker"
            wait_until(lambda: relays(service) == [1] and len(service.status()["generations"]) == 2, draining)
            service.done("add", "shop/main", f"two={other.address}")
            second.ask()
            wait_until(lambda: len(service.status()["generations"]) == 1, "it has moved as well")
            first.ask()
            second.ask()
            assert (server.opened, other.opened) == (1, 1)
            first.close()
            second.close()


def test_a_relay_worker_that_is_killed_in_a_reload_costs_its_own_connections_only(directory: Path) -> None:
    with StreamServer() as server:
        one = f'{{ name = "one", address = "{server.address}", maxconn = {STREAMS} }}'
        with Balancer(directory, "[balancer]\nrelays = 2\n" + config({"main": [one]})) as service:
            address = ("127.0.0.1", service.port)
            echoes = [Echo(address) for _ in range(STREAMS)]
            for echo in echoes:
                echo.ask()
            assert service.ask({"type": "reload"})["exit_code"] == 0
            one_of_two = next(one for one in service.workers() if one["state"] == "accepting")["pid"]
            os.kill(one_of_two, signal.SIGKILL)
            wait_until(lambda: len(service.status()["generations"]) == 1, "no old process is left")
            lost = 0
            for number, echo in enumerate(echoes):
                try:
                    echo.ask()
                except (ConnectionError, EOFError):
                    lost += 1
                    echo.close()
                    echoes[number] = Echo(address)  # it gets a place: what the killed one had counts no more
                    echoes[number].ask()
            assert lost < STREAMS
            assert server.opened == STREAMS + lost
            # One that moves to the replacement is counted by both for a moment: never too few.
            wait_until(lambda: service.backends()["main/one"]["connections"] == STREAMS, "each is counted once")
            for echo in echoes:
                echo.close()
            wait_until(lambda: service.backends()["main/one"]["connections"] == 0, "nobody is left")


def test_a_stop_ends_what_moves(directory: Path) -> None:
    """The service stops while relays are on their way: every process ends, and every client sees an end."""
    with StreamServer() as server:
        text = "[balancer]\nrelays = 2\n" + config({"main": [f'"{server.address}"']})
        with Balancer(directory, text, "--drain-timeout", "1s", "--stop-timeout", "2s") as service:
            echoes = [Echo(("127.0.0.1", service.port)) for _ in range(STREAMS)]
            reloading = service.begin({"type": "reload"})
            assert service.ask({"type": "stop"})["exit_code"] == 0
            reloading.answer()
            assert service.wait() == 0
            for echo in echoes:
                with pytest.raises((ConnectionError, EOFError)):
                    echo.ask()
                echo.close()
