"""Agents and names, end to end: what is observed reaches clients, and what they have goes on."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from pathlib import Path

from tests.system.balancer import HTTP_CHECK, Balancer, HttpBackend, Kept, backend, config
from tests.system.harness import DEADLINE_SECONDS, Clients, wait_until


class Agent:
    """Answers what it is told to. Owns its thread."""

    def __init__(self, words: str, host: str, port: int = 0) -> None:
        self.words = words
        self._listener = socket.create_server((host, port))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with client, contextlib.suppress(OSError):
                    client.sendall(f"{self.words}\r\n".encode())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it may be closed already
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(DEADLINE_SECONDS)
        self._listener.close()


def eligible(service: Balancer) -> set[str]:
    return {name for name, one in service.backends().items() if one["is_eligible"]}


def test_an_agent_drains_its_backend_also_over_a_reload_and_no_client_notices(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        a = stack.enter_context(contextlib.closing(HttpBackend(tmp_path, "a", host="127.0.0.1")))
        b = stack.enter_context(contextlib.closing(HttpBackend(tmp_path, "b", host="127.0.0.2")))
        of_a = stack.enter_context(contextlib.closing(Agent("up 100%", "127.0.0.1")))
        of_b = stack.enter_context(contextlib.closing(Agent("ready", "127.0.0.2", of_a.port)))
        text = config({"main": [backend(a), backend(b)]}, check=HTTP_CHECK)
        text += f'[service.agent]\nport = {of_a.port}\ninterval = "50ms"\n'
        service = stack.enter_context(Balancer(tmp_path, text))
        wait_until(lambda: all(one["agent"] for one in service.backends().values()), "both agents have spoken")
        kept = stack.enter_context(contextlib.closing(kept_at(service, "b")))
        with Clients(service.body) as clients:
            of_b.words = "drain # backup runs"
            wait_until(lambda: eligible(service) == {"main/a"}, "b drains")
            assert "agent: drain" in service.done("status")
            of_b.close()  # silence changes nothing, for the next generation neither
            assert service.ask({"type": "reload"})["exit_code"] == 0
            wait_until(lambda: service.lb_status()["generation"] == 2, "the new controller answers")
            wait_until(lambda: eligible(service) == {"main/a"}, "a is up")
            assert {service.body()[0] for _ in range(10)} == {"a"}
            assert kept.ask() == "b /", "a drain by an agent closes nothing"
            stack.enter_context(contextlib.closing(Agent("ready", "127.0.0.2", of_a.port)))
            wait_until(lambda: eligible(service) == {"main/a", "main/b"}, "b is back")
            clients.more(10)
        clients.assert_none_failed()


def kept_at(service: Balancer, name: str) -> Kept:
    """A connection to that backend."""
    while True:
        made = Kept(service)
        if made.ask() == f"{name} /":
            return made
        made.close()


def test_a_name_whose_answer_changes_takes_backends_in_and_out_and_no_client_notices(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    with contextlib.ExitStack() as stack:
        a = stack.enter_context(contextlib.closing(HttpBackend(tmp_path, "a", host="127.0.0.1")))
        stack.enter_context(contextlib.closing(HttpBackend(tmp_path, "b", port=a.port, host="127.0.0.2")))
        hosts.write_text("127.0.0.1 localhost\n")
        text = '[balancer]\nresolve_interval = "50ms"\n'
        text += config({"main": [f'{{ name = "app", address = "app.test:{a.port}" }}']}, check=HTTP_CHECK)
        service = Balancer(tmp_path, text)
        # A hosts file of its own: in a mount namespace, as which the same process goes on.
        script = 'mount --bind "$0" /etc/hosts && exec "$@"'
        service.command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(hosts)]
        service.command += [sys.executable, "-m", "handoff"]
        stack.enter_context(service)
        first, second = f"main/app@127.0.0.1:{a.port}", f"main/app@127.0.0.2:{a.port}"
        wait_until(lambda: service.admin("/readyz")[0] == 503, "it serves, and is not ready")
        assert f"no address is known of app.test:{a.port}".encode() in service.admin("/readyz")[1]
        hosts.write_text("127.0.0.1 app.test\n127.0.0.2 app.test\n")
        wait_until(lambda: eligible(service) == {first, second}, "both addresses are backends")
        kept = stack.enter_context(contextlib.closing(kept_at(service, "b")))
        with Clients(service.body) as clients:
            hosts.write_text("127.0.0.1 app.test\n")
            wait_until(lambda: eligible(service) == {first}, "one is gone")
            assert {service.body()[0] for _ in range(10)} == {"a"}
            assert kept.ask() == "b /", "what it has goes on"
            hosts.write_text("")  # a lookup that fails changes nothing
            wait_until(lambda: next(iter(service.lb_status()["names"].values()))["error"], "the lookup fails")
            assert eligible(service) == {first}
            hosts.write_text("127.0.0.2 app.test\n127.0.0.1 app.test\n")
            wait_until(lambda: eligible(service) >= {first} and len(eligible(service)) == 2, "it is back")
            clients.more(10)
        clients.assert_none_failed()
        identities = {one["identity"] for one in service.backends().values() if one["is_eligible"]}
        assert f"shop/{second}#2" in identities, "as another one, which was checked first"
