"""The balancer, end to end: real backends, real commands, strict clients."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from tests.system.balancer import HTTP_CHECK, Balancer, HttpBackend, Kept, backend, config, http_backends
from tests.system.harness import Clients, Service, wait_until


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path


def is_up(service: Balancer, *names: str) -> bool:
    found = service.backends()
    return all(found[name]["is_eligible"] for name in names)


# --- relaying and reloads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relays", [1, 2])
def test_reloads_lose_nothing_and_kept_connections_go_on(directory: Path, relays: int) -> None:
    with http_backends(directory, "a", "b") as servers:
        text = f"[balancer]\nrelays = {relays}\n" + config(
            {"main": [backend(one) for one in servers.values()]}, check=HTTP_CHECK
        )
        with Balancer(directory, text) as service:
            kept = Kept(service)
            first = kept.ask()
            with Clients(service.body) as new, Clients(kept.ask, 1) as old:
                for number in range(2, 4):
                    assert service.ask({"type": "reload"})["exit_code"] == 0, number
                    new.more(20)
                    old.more(5)
            new.assert_none_failed()
            old.assert_none_failed()
            assert kept.ask() == first
            kept.close()
            wait_until(lambda: len(service.status()["generations"]) == 1, "the old relay workers have ended")


def test_a_file_with_a_mistake_changes_nothing(directory: Path) -> None:
    with http_backends(directory, "a") as servers:
        text = config({"main": [backend(servers["a"])]})
        with Balancer(directory, text) as service:
            service.write(text + "[service.chek]\n")
            answer = service.ask({"type": "reload"})
            assert answer["exit_code"] == 3
            assert 'line 7: "chek" is no key that is known here; did you mean "check"?' in answer["message"]
            found = service.lb("apply")
            assert (found.returncode, found.stdout) == (2, "")
            assert "chek" in found.stderr
            assert service.body() == "a /"


def test_listeners_and_backends_on_unix_sockets(directory: Path) -> None:
    with http_backends(directory, "a") as servers:
        second = directory / "second.sock"
        inner = config({"main": [backend(servers["a"])]}, listen=f"unix:{second}")
        with Balancer(directory, inner, name="inner"):
            outer = directory / "outer"
            outer.mkdir()
            with Balancer(outer, config({"main": [f'"unix:{second}"']})) as service:
                assert service.body("/x") == "a /x"


# --- health ---------------------------------------------------------------------------------------------------------


def test_a_backend_gets_nothing_before_its_first_check_and_nothing_while_it_is_sick(directory: Path) -> None:
    with http_backends(directory, "a", "b") as servers:
        servers["b"].sick(True)
        text = config({"main": [backend(one) for one in servers.values()]}, check=HTTP_CHECK)
        with Balancer(directory, text) as service:
            assert {service.body() for _ in range(10)} == {"a /"}
            servers["b"].sick(False)
            wait_until(lambda: is_up(service, "main/b"), "b is up")
            assert {service.body() for _ in range(4)} == {"a /", "b /"}
            servers["a"].sick(True)
            wait_until(lambda: not is_up(service, "main/a"), "a is down")
            assert {service.body() for _ in range(4)} == {"b /"}
            assert "503" in service.backends()["main/a"]["last_check"]


def test_a_killed_backend_costs_only_what_it_was_serving(directory: Path) -> None:
    with http_backends(directory, "a", "b") as servers:
        text = config({"main": [backend(one) for one in servers.values()]}, check=HTTP_CHECK)
        with Balancer(directory, text) as service:
            wait_until(lambda: is_up(service, "main/a", "main/b"), "both are up")
            with Clients(service.body, 4) as clients:
                clients.more(20)
                servers["a"].end(signal.SIGKILL)
                wait_until(lambda: not is_up(service, "main/a"), "it is out")
                clients.more(40)
            assert len(clients.failures) <= 4, clients.failures  # one for each client, at most
            assert {service.body() for _ in range(4)} == {"b /"}


def test_a_stopped_backend_is_noticed_by_its_checks(directory: Path) -> None:
    check = HTTP_CHECK.replace('timeout = "1s"', 'timeout = "200ms"')
    with http_backends(directory, "a", "b") as servers:
        text = config({"main": [backend(one) for one in servers.values()]}, check=check)
        with Balancer(directory, text) as service:
            wait_until(lambda: is_up(service, "main/a", "main/b"), "both are up")
            servers["a"].send(signal.SIGSTOP)
            wait_until(lambda: not is_up(service, "main/a"), "it is out")
            assert {service.body() for _ in range(4)} == {"b /"}
            servers["a"].send(signal.SIGCONT)
            wait_until(lambda: is_up(service, "main/a"), "it is back")


def test_when_all_are_down_clients_are_told(directory: Path) -> None:
    with http_backends(directory, "a") as servers:
        text = config({"main": [backend(servers["a"])]}, check=HTTP_CHECK)
        with Balancer(directory, text) as service:
            assert service.body() == "a /"
            servers["a"].end(signal.SIGKILL)
            wait_until(lambda: not is_up(service, "main/a"), "it is out")
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                service.body()


# --- the controller -------------------------------------------------------------------------------------------------


def test_a_killed_controller_costs_no_request_and_comes_back_knowing(directory: Path) -> None:
    with http_backends(directory, "a", "b") as servers:
        text = config({"main": [backend(one) for one in servers.values()]}, check=HTTP_CHECK)
        with Balancer(directory, text) as service:
            wait_until(lambda: is_up(service, "main/a", "main/b"), "both are up")
            service.done("drain", "shop/b", "--why", "test")
            with Clients(service.body) as clients:
                for _ in range(2):
                    pid = service.controller_pid()
                    assert pid is not None
                    os.kill(pid, signal.SIGKILL)
                    wait_until(lambda old=pid: service.controller_pid() not in (None, old), "it is started again")  # type: ignore[misc]
                    clients.more(20)
                wait_until(lambda: is_up(service, "main/a"), "it is back")
            clients.assert_none_failed()
            assert service.backends()["main/b"]["override"].startswith("drain by")
            assert {service.body() for _ in range(4)} == {"a /"}


def test_overrides_outlive_a_restart_of_everything(directory: Path) -> None:
    with http_backends(directory, "a", "b") as servers:
        text = config({"main": [backend(one) for one in servers.values()]})
        with Balancer(directory, text) as service:
            service.done("maint", "shop/b")
            service.done("add", "shop/main", f"c={servers['b'].address}")
            assert {service.body() for _ in range(6)} == {"a /", "b /"}
        with Balancer(directory, text) as service:
            wait_until(lambda: "main/c" in service.backends(), "it is known")
            assert service.backends()["main/b"]["administrative"] == "maint"
            service.done("remove", "shop/main", "c")
            assert {service.body() for _ in range(6)} == {"a /"}


# --- operating ------------------------------------------------------------------------------------------------------


def test_a_rolling_restart_of_all_backends_loses_nothing(directory: Path) -> None:
    with http_backends(directory, "a", "b", "c") as servers:
        text = config({"main": [backend(one) for one in servers.values()]}, check=HTTP_CHECK)
        with Balancer(directory, text) as service:
            wait_until(lambda: is_up(service, "main/a", "main/b", "main/c"), "all are up")
            with Clients(service.body) as clients:
                for name in ("a", "b", "c"):
                    service.done("drain", f"shop/{name}", "--wait")
                    servers[name].end()
                    servers[name].close()
                    servers[name] = HttpBackend(directory, name, servers[name].port)
                    service.done("ready", f"shop/{name}", "--wait")
                clients.more(20)
            clients.assert_none_failed()
            assert {service.body() for _ in range(9)} == {"a /", "b /", "c /"}


def test_a_switch_loses_nothing_and_after_it_nothing_new_reaches_the_old_pool(directory: Path) -> None:
    with http_backends(directory, "blue", "green") as servers:
        pools = {name: [backend(one)] for name, one in servers.items()}
        text = "[balancer]\nrelays = 2\n" + config(pools, service='active = "blue"', check=HTTP_CHECK)
        with Balancer(directory, text) as service:
            assert service.body() == "blue /"
            kept = Kept(service)
            assert kept.ask() == "blue /"
            with Clients(service.body) as clients:
                for pool in ("green", "blue", "green"):
                    clients.more(10)
                    service.done("switch", "shop", pool, "--wait", "10s")
                    assert {service.body() for _ in range(10)} == {f"{pool} /"}
                service.done("rollback", "shop")
                assert {service.body() for _ in range(10)} == {"blue /"}
            clients.assert_none_failed()
            assert kept.ask() == "blue /"
            kept.close()


def test_a_switch_to_a_sick_pool_is_refused_and_so_is_one_of_a_stale_revision(directory: Path) -> None:
    with http_backends(directory, "blue", "green") as servers:
        servers["green"].sick(True)
        pools = {name: [backend(one)] for name, one in servers.items()}
        with Balancer(directory, config(pools, service='active = "blue"', check=HTTP_CHECK)) as service:
            assert service.body() == "blue /"
            assert service.lb("switch", "shop", "green").returncode == 9
            servers["green"].sick(False)
            revision = service.lb_status()["services"]["shop"]["revision"]
            service.done("switch", "shop", "green", "--wait", "10s", "--revision", str(revision))
            found = service.lb("switch", "shop", "blue", "--revision", str(revision))
            assert found.returncode == 9
            assert service.body() == "green /"


def test_changed_backends_are_applied_in_place(directory: Path) -> None:
    with http_backends(directory, "a", "b") as servers:
        text = config({"main": [backend(servers["a"])]})
        with Balancer(directory, text) as service:
            kept = Kept(service)
            assert kept.ask() == "a /"
            service.write(config({"main": [backend(servers["b"])]}))
            service.done("apply")
            assert {service.body() for _ in range(4)} == {"b /"}
            assert kept.ask("/kept") == "a /kept"
            kept.close()
            with socket.create_server(("127.0.0.1", 0)) as other:
                port = other.getsockname()[1]
            service.write(config({"main": [backend(servers["b"])]}, listen=f"127.0.0.1:{port}"))
            found = service.lb("apply")
            assert found.returncode == 0
            assert "needs a reload: listen of shop" in found.stdout + found.stderr
            assert len(service.status()["generations"]) == 1


def test_when_it_stops_it_is_unready_first(directory: Path) -> None:
    with http_backends(directory, "a") as servers:
        text = '[balancer]\nunready = "1h"\n' + config({"main": [backend(servers["a"])]})
        with Balancer(directory, text, "--stop-timeout", "10s") as service:
            wait_until(lambda: service.admin("/readyz")[0] == 200, "it is ready")
            service.signal(signal.SIGTERM)
            wait_until(lambda: service.admin("/readyz")[0] == 503, "it is not ready any more")
            assert service.body() == "a /"
            assert service.admin("/livez")[0] == 200
            assert service.wait() == 0


# --- PROXY ----------------------------------------------------------------------------------------------------------

APP = """
async def app(scope, receive, send):
    assert scope["type"] == "http"
    body = "{}:{}".format(*scope["client"]).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})
"""


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_an_application_of_handoff_sees_the_clients_address_also_after_reloads(directory: Path, version: str) -> None:
    (directory / "app").mkdir()
    (directory / "app" / "main.py").write_text(APP)
    with Service(directory / "app", "--proxy-protocol", "require") as app:
        text = config(
            {"main": [f'"127.0.0.1:{app.port}"']},
            service=f'send_proxy = "{version}"',
            check=HTTP_CHECK.replace("/health", "/"),
        )
        with Balancer(directory, text) as service:
            kept = Kept(service)
            host, port = kept.connection.getsockname()
            assert kept.ask() == f"{host}:{port}"
            for one in (app, service):
                assert one.ask({"type": "reload"})["exit_code"] == 0
                assert kept.ask() == f"{host}:{port}"
                new = Kept(service)
                assert new.ask() == "{}:{}".format(*new.connection.getsockname())
                new.close()
            kept.close()
