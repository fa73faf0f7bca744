"""A balancer on a network that fails: peers that are gone without a word, and a machine that has no ports left."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

from lb.core.model import Timeouts
from lb.relay.silence import notice_silence
from tests.system.network import Machine, Network, ip
from tests.unit.test_lb_engine import Backend, Rig, endpoint

PORTS = 2
RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def bound(machine: Machine, made: Backend) -> Backend:
    """A listener at the machine's address, in place of the one on loopback."""
    made.listener.close()
    made.listener = socket.create_server((machine.address, 0), backlog=100)
    made.listener.setblocking(False)
    made.address = f"{machine.address}:{made.listener.getsockname()[1]}"
    return made


def test_peers_whose_machine_has_lost_its_power_are_noticed(tmp_path: Path) -> None:
    """Nothing is under way to the one; what was sent to the other is never acknowledged."""
    with Network(edge=1, server=2) as network:
        backend = network["server"].within(lambda: bound(network["server"], Backend()))

        def scenario() -> None:
            rig = Rig(tmp_path)
            rig.backends.append(backend)
            rig.serve(endpoint(backend), timeouts=Timeouts(idle_seconds=None, fin_seconds=None, silent_seconds=1.0))
            clients = [rig.client() for _ in range(2)]
            rig.until(lambda: backend.look() == rig.engine.connections == 2, "both are relayed")
            ip("-n", network.switch, "link", "set", "to-server", "down")
            clients[1].send(b"question")
            for client in clients:
                assert rig.read(client) == b"reset"
            rig.close()

        network["edge"].within(scenario)


def test_clients_whose_machine_has_lost_its_power_are_noticed(tmp_path: Path) -> None:
    with Network(edge=1, client=2) as network:

        def scenario() -> None:
            rig = Rig(tmp_path)
            rig.listener.close()
            rig.listener = socket.create_server((network["edge"].address, 0))
            rig.listener.setblocking(False)
            notice_silence(rig.listener, 1.0)
            backend = rig.backend()
            rig.serve(endpoint(backend), timeouts=Timeouts(idle_seconds=None, fin_seconds=None))
            network["client"].within(rig.client)
            rig.until(lambda: backend.look() == rig.engine.connections == 1, "it is relayed")
            ip("-n", network.switch, "link", "set", "to-client", "down")
            assert rig.read(backend.accepted[0]) == b"reset"
            rig.close()

        network["edge"].within(scenario)


def test_without_ports_left_clients_wait_and_the_backend_is_not_blamed(tmp_path: Path) -> None:
    with Network(edge=1) as network:

        def scenario() -> None:
            rig = Rig(tmp_path)
            backend = rig.backend()
            RANGE.write_text(f"30000 {30000 + PORTS - 1}")  # of this thread's namespace
            rig.serve(endpoint(backend))
            for number in range(PORTS + 1):  # from another address: the ports of this one are the relay's
                made = socket.socket()
                made.bind(("127.0.0.2", 20_000 + number))
                made.connect(rig.listener.getsockname())
                made.setblocking(False)
                rig.clients.append(made)
            rig.until(lambda: backend.look() == PORTS and rig.engine.waiting == 1, "one has to wait")
            assert rig.failures == []
            backend.accepted[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            backend.accepted[0].close()  # with a reset: its port is free at once
            rig.until(lambda: backend.look() == PORTS + 1, "it has its turn")
            assert rig.failures == []
            rig.close()

        network["edge"].within(scenario)
