"""The balancer's master is killed: relay workers let go of the port at once, and finish what they have."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil

from tests.system.balancer import Balancer, Kept, backend, config, http_backends
from tests.system.harness import wait_until
from tests.system.test_supervision import is_listening


def test_a_new_balancer_has_the_port_while_connections_of_the_orphans_go_on(tmp_path: Path) -> None:
    with http_backends(tmp_path, "a") as servers:
        pools = {"main": [backend(servers["a"])]}
        with Balancer(tmp_path, "[balancer]\nrelays = 2\n" + config(pools)) as service:
            relays = [psutil.Process(worker["pid"]) for worker in service.workers()]
            kept = [Kept(service) for _ in range(4)]
            assert [one.ask() for one in kept] == ["a /"] * 4
            service.signal(signal.SIGKILL)
            service.wait()
            wait_until(lambda: not any(is_listening(relay) for relay in relays), "the orphans let go of the port")
            listen = f"127.0.0.1:{service.port}"
            with Balancer(tmp_path, config(pools, listen=listen)) as successor:
                assert successor.body() == "a /"
                for one in kept:
                    assert one.ask("/old") == "a /old"
                    one.close()
                _, alive = psutil.wait_procs(relays, 60)
                assert not alive
