"""Listeners: real sockets, what they are set to, who holds them, and what is said when one cannot be had."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import psutil
import pytest

from handoff.addresses import Bind, parse_bind
from handoff.binding import Listener, bind_listener
from handoff.errors import ExitCode, HandoffError, UsageError
from handoff.inherited import InheritedSocket
from handoff.listeners import ListenerSet
from tests.unit.fds import open_fds


@pytest.fixture
def listeners() -> Iterator[ListenerSet]:
    owner = ListenerSet()
    yield owner
    owner.close_all()


def _failure(text: str, name: str = "web") -> str:
    with pytest.raises(HandoffError) as caught:
        bind_listener(parse_bind(text), name, 16)
    assert caught.value.exit_code is ExitCode.FAILED
    assert caught.value.message.isprintable()
    return caught.value.message


def _refuse_bind(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket.socket, "bind", refuse)


def _connect(listener: Listener) -> socket.socket:
    client = socket.socket(listener.socket.family)
    client.settimeout(10)
    client.connect(listener.bind.path or listener.socket.getsockname())
    return client


def _has_fd(sock: socket.socket) -> bool:
    return sock.fileno() != -1


# TCP


def test_a_tcp_listener_is_set_up_for_serving() -> None:
    listener = bind_listener(parse_bind("127.0.0.1:0"), "web", 16)
    sock = listener.socket
    assert sock.proto == socket.IPPROTO_TCP
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    assert not sock.getblocking()
    assert not sock.get_inheritable()
    assert (listener.name, listener.is_inherited, listener.backlog) == ("web", False, 16)
    listener.close()


def test_what_is_accepted_inherits_tcp_nodelay() -> None:
    listener = bind_listener(parse_bind("127.0.0.1:0"), "web", 16)
    with _connect(listener):
        connection, _ = listener.socket.accept()
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        connection.close()
    listener.close()


def test_the_address_has_the_port_that_the_kernel_chose() -> None:
    listener = bind_listener(parse_bind("127.0.0.1:0"), "web", 16)
    port = listener.socket.getsockname()[1]
    assert port != 0
    assert listener.address == f"127.0.0.1:{port}"
    assert repr(listener) == f"<Listener web 127.0.0.1:{port}>"
    listener.close()


def test_a_host_name_is_looked_up() -> None:
    listener = bind_listener(parse_bind("localhost:0"), "web", 16)
    assert listener.socket.getsockname()[0] in ("127.0.0.1", "::1")
    listener.close()


def test_a_listener_for_ipv6_leaves_ipv4_to_others() -> None:
    v6 = bind_listener(parse_bind("[::]:0"), "v6", 16)
    assert v6.socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    assert v6.address == f"[::]:{v6.socket.getsockname()[1]}"
    v6.close()


def test_a_closed_listener_can_be_closed_again() -> None:
    listener = bind_listener(parse_bind("127.0.0.1:0"), "web", 16)
    listener.close()
    listener.close()
    assert not _has_fd(listener.socket)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_is_taken_names_its_holder(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        address = f"{host}:{holder.getsockname()[1]}"
        name = psutil.Process().name()
        assert _failure(address) == (
            f"listener web: {address} is in use by {name} (pid {os.getpid()}); stop it or choose another port"
        )


def test_a_port_that_is_taken_by_whom_we_may_not_see_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        message = f"listener web: 127.0.0.1:{port} is in use by another process; stop it or choose another port"
        hidden = SimpleNamespace(status=psutil.CONN_LISTEN, laddr=SimpleNamespace(ip="127.0.0.1", port=port), pid=None)
        monkeypatch.setattr(psutil, "net_connections", lambda kind: [hidden])
        assert _failure(f"127.0.0.1:{port}") == message

        def refuse(kind: str) -> None:
            raise psutil.AccessDenied

        monkeypatch.setattr(psutil, "net_connections", refuse)
        assert _failure(f"127.0.0.1:{port}") == message


def test_a_low_port_without_the_right_to_it_names_the_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    _refuse_bind(monkeypatch, errno.EACCES)
    assert _failure("127.0.0.1:80") == (
        "listener web: 127.0.0.1:80 needs CAP_NET_BIND_SERVICE; grant it or bind a port above 1023"
    )


def test_other_refusals_of_the_kernel_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    _refuse_bind(monkeypatch, errno.EACCES)
    assert _failure("127.0.0.1:8000") == (
        "listener web: 127.0.0.1:8000 cannot be bound (Permission denied); choose another address"
    )
    _refuse_bind(monkeypatch, errno.EAFNOSUPPORT)
    assert _failure("[::1]:8000") == (
        "listener web: [::1]:8000 needs IPv6, which this machine has not; write an IPv4 address"
    )


def test_an_address_of_another_machine_is_refused() -> None:
    assert _failure("192.0.2.1:8000") == (  # RFC 5737: nobody has it
        "listener web: 192.0.2.1:8000 is not an address of this machine;"
        " write one that `ip address` lists, or use --freebind"
    )


def test_an_address_that_may_come_later_is_bound() -> None:
    listener = bind_listener(msgspec.structs.replace(parse_bind("192.0.2.1:0"), is_free=True), "web", 16)
    assert listener.address.startswith("192.0.2.1:")
    listener.close()


def test_an_unknown_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert _failure("nowhere.invalid:80") == (
        "listener web: nowhere.invalid:80: host nowhere.invalid is unknown (name or service not known);"
        " write an IP address"
    )


# Unix


@pytest.fixture
def path() -> Iterator[Path]:
    """A path short enough for a socket, which one below pytest's tmp_path need not be."""
    with tempfile.TemporaryDirectory(prefix="handoff-") as directory:
        yield Path(directory) / "web.sock"


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_a_unix_socket_has_the_mode_asked_for_whatever_the_umask(path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        listener = bind_listener(parse_bind(f"unix:{path}?mode=0660"), "web", 16)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert listener.address == f"unix:{path}"
    assert not listener.socket.getblocking()
    assert not listener.socket.get_inheritable()
    _connect(listener).close()
    assert [entry.name for entry in path.parent.iterdir()] == ["web.sock"]
    listener.close()
    assert list(path.parent.iterdir()) == []


def test_a_unix_socket_is_private_by_default(path: Path) -> None:
    listener = bind_listener(parse_bind(f"unix:{path}"), "web", 16)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    listener.close()


def test_a_stale_socket_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
        stale.listen()
    before = path.stat().st_ino
    listener = bind_listener(parse_bind(f"unix:{path}"), "web", 16)
    assert path.stat().st_ino != before
    _connect(listener).close()
    listener.close()


def test_a_socket_of_a_living_server_is_left_alone(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(str(path))
        living.listen(0)
        before = path.stat().st_ino
        message = f"listener web: unix path {path}: belongs to a living server; stop it or choose another path"
        # The second time its queue is full of our own probes.
        assert [_failure(f"unix:{path}") for _ in range(3)] == [message] * 3
        assert path.stat().st_ino == before


def test_a_living_datagram_socket_is_left_alone(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as living:
        living.bind(str(path))
        assert "belongs to a living server" in _failure(f"unix:{path}")


def test_a_path_that_is_no_socket_is_left_alone(path: Path) -> None:
    path.mkdir()
    assert _failure(f"unix:{path}") == f"listener web: unix path {path}: is a directory; choose another path"
    path.rmdir()
    path.write_text("precious")
    message = f"listener web: unix path {path}: is not a socket; remove it or choose another path"
    assert _failure(f"unix:{path}") == message
    assert path.read_text() == "precious"
    path.rename(path.with_suffix(".file"))
    path.symlink_to(path.with_suffix(".file"))
    assert _failure(f"unix:{path}") == message


def test_a_parent_directory_that_is_none_is_refused(path: Path) -> None:
    missing = path.parent / "missing"
    assert _failure(f"unix:{missing}/web.sock") == (
        f"listener web: unix path {missing}/web.sock: directory {missing} does not exist;"
        " create it or choose another path"
    )
    missing.write_text("")
    assert _failure(f"unix:{missing}/web.sock") == (
        f"listener web: unix path {missing}/web.sock: {missing} is not a directory; choose another path"
    )


def test_a_unix_path_without_permission_is_refused_and_leaves_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    assert _failure(f"unix:{path}") == (
        f"listener web: unix path {path}: no permission to create it in {path.parent}; grant it or choose another path"
    )
    assert list(path.parent.iterdir()) == []


def test_a_directory_that_another_master_binds_in_is_refused(path: Path) -> None:
    fd = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    message = _failure(f"unix:{path}")
    os.close(fd)
    assert message == (
        f"listener web: unix path {path}: {path.parent} is locked by another process that binds there; try again"
    )


def test_the_longest_path_can_be_bound(path: Path) -> None:
    directory = path.parent
    room = 107 - len(os.fsencode(directory)) - len("/") - len("/s")
    deep = directory / ("d" * room) / "s"
    deep.parent.mkdir()
    assert len(os.fsencode(deep)) == 107
    listener = bind_listener(parse_bind(f"unix:{deep}"), "web", 16)
    _connect(listener).close()
    listener.close()
    assert list(deep.parent.iterdir()) == []


def test_a_path_that_somebody_replaced_is_not_unlinked(path: Path) -> None:
    ours = bind_listener(parse_bind(f"unix:{path}"), "web", 16)
    path.unlink()
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(path))
        ours.close()
        assert path.exists()


def test_a_path_that_went_before_the_listener_does_no_harm(path: Path) -> None:
    listener = bind_listener(parse_bind(f"unix:{path}"), "web", 16)
    path.unlink()
    listener.close()
    assert not _has_fd(listener.socket)


# File descriptors


def test_an_fd_is_duplicated_and_neither_is_passed_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as passed:
        passed.set_inheritable(True)
        listener = bind_listener(Bind(kind="fd", fd=passed.fileno()), "web", 16)
        assert listener.socket.fileno() != passed.fileno()
        assert not passed.get_inheritable()
        assert not listener.socket.get_inheritable()
        assert listener.socket.proto == socket.IPPROTO_TCP
        assert listener.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert listener.is_inherited
        assert listener.address == f"127.0.0.1:{passed.getsockname()[1]}"
        listener.close()
        assert _has_fd(passed)


def test_a_unix_socket_that_was_passed_shows_its_path_and_keeps_it(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as passed:
        passed.bind(str(path))
        passed.listen()
        listener = bind_listener(Bind(kind="fd", fd=passed.fileno()), "web", 16)
        assert listener.address == f"unix:{path}"
        listener.close()
        assert path.exists()


def test_an_fd_that_does_not_listen_is_refused_and_left_open(tmp_path: Path) -> None:
    with socket.socket() as idle, socket.socket(type=socket.SOCK_DGRAM) as datagram, (tmp_path / "f").open("w") as file:
        for fd, problem in (
            (idle.fileno(), "is not a listening stream socket; pass one after listen(2)"),
            (datagram.fileno(), "is not a listening stream socket; pass one after listen(2)"),
            (file.fileno(), "is not a socket; pass a listening stream socket"),
        ):
            before = open_fds()
            with pytest.raises(UsageError) as caught:
                bind_listener(Bind(kind="fd", fd=fd), "web", 16)
            assert caught.value.message == f"bind fd://{fd}: {problem}"
            assert not open_fds() - before
            os.fstat(fd)


def test_an_fd_that_is_not_open_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        bind_listener(Bind(kind="fd", fd=999), "web", 16)
    assert caught.value.message == "bind fd://999: is not open (Bad file descriptor); let the parent pass it"


# ListenerSet


def _binds(*texts: str) -> list[Bind]:
    return [parse_bind(text) for text in texts]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_listeners_are_named_and_their_addresses_listed(listeners: ListenerSet) -> None:
    acquired = listeners.acquire(1, _binds("127.0.0.1:0", "web=127.0.0.1:0", "127.0.0.1:0"), 16)
    assert list(acquired) == ["default", "web", "default-2"]
    assert [listener.name for listener in acquired.values()] == ["default", "web", "default-2"]
    assert listeners.addresses() == {name: listener.address for name, listener in acquired.items()}
    assert len(set(listeners.addresses().values())) == 3


def test_a_listener_of_the_same_address_is_reused_whatever_its_name(listeners: ListenerSet) -> None:
    port = _free_port()
    old = listeners.acquire(1, _binds(f"web=127.0.0.1:{port}"), 16)["web"]
    new = listeners.acquire(2, _binds(f"api=127.0.0.1:{port}"), 16)["api"]
    assert new is old
    assert new.name == "api"
    assert listeners.addresses(1) == {"web": f"127.0.0.1:{port}"}
    assert listeners.addresses() == {"api": f"127.0.0.1:{port}"}


def test_a_listener_on_port_0_keeps_its_port_over_reloads_by_its_name(listeners: ListenerSet) -> None:
    old = listeners.acquire(1, _binds("a=127.0.0.1:0", "b=127.0.0.1:0"), 16)
    new = listeners.acquire(2, _binds("b=127.0.0.1:0", "a=127.0.0.1:0", "c=127.0.0.1:0"), 16)
    assert new["a"] is old["a"]
    assert new["b"] is old["b"]
    assert new["c"] not in old.values()


def test_another_backlog_is_taken_up(listeners: ListenerSet) -> None:
    listener = listeners.acquire(1, _binds("web=127.0.0.1:0"), 16)["web"]
    listeners.acquire(2, _binds("web=127.0.0.1:0"), 64)
    assert listener.backlog == 64
    # tcp_diag shows the backlog of a listening socket as its send queue; so does TCP_INFO, as tcpi_sacked.
    information = listener.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    assert int.from_bytes(information[28:32], "little") == 64


def test_another_mode_is_taken_up(listeners: ListenerSet, path: Path) -> None:
    listeners.acquire(1, _binds(f"unix:{path}"), 16)
    listeners.acquire(2, _binds(f"unix:{path}?mode=0666"), 16)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666


def test_a_mode_that_may_not_be_set_is_one_line(
    listeners: ListenerSet, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listeners.acquire(1, _binds(f"unix:{path}"), 16)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    with pytest.raises(HandoffError) as caught:
        listeners.acquire(2, _binds(f"unix:{path}?mode=0666"), 16)
    assert caught.value.message == (
        f"listener default: unix path {path}: cannot have mode 0666 (Operation not permitted); leave ?mode= as it was"
    )
    assert listeners.addresses(2) == {}


def test_a_listener_is_closed_when_no_generation_holds_it_any_more(listeners: ListenerSet, path: Path) -> None:
    both = listeners.acquire(1, _binds("web=127.0.0.1:0", f"unix:{path}"), 16)
    listeners.acquire(2, _binds("web=127.0.0.1:0"), 16)
    listeners.release(1)
    assert not path.exists()
    assert not _has_fd(both["default"].socket)
    assert _has_fd(both["web"].socket)
    listeners.release(1)
    listeners.release(2)
    assert not _has_fd(both["web"].socket)
    assert listeners.addresses() == {}


def test_if_one_cannot_be_had_the_new_ones_are_closed_and_the_old_ones_untouched(
    listeners: ListenerSet, path: Path
) -> None:
    old = listeners.acquire(1, _binds("web=127.0.0.1:0"), 16)["web"]
    fds = open_fds()
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken = holder.getsockname()[1]
        with pytest.raises(HandoffError, match=f"listener api: 127.0.0.1:{taken} is in use by"):
            listeners.acquire(2, _binds("web=127.0.0.1:0", f"unix:{path}", f"api=127.0.0.1:{taken}"), 64)
    assert not path.exists()
    assert not open_fds() - fds
    assert _has_fd(old.socket)
    assert old.backlog == 16
    listeners.release(2)
    assert listeners.addresses() == {"web": old.address}
    listeners.acquire(2, _binds("web=127.0.0.1:0"), 16)


def test_an_address_that_overlaps_with_one_of_ours_says_so(listeners: ListenerSet) -> None:
    port = _free_port()
    listeners.acquire(1, _binds(f"web=127.0.0.1:{port}"), 16)
    with pytest.raises(HandoffError) as caught:
        listeners.acquire(2, _binds(f"web=0.0.0.0:{port}"), 16)
    assert caught.value.message == (
        f"listener web: 0.0.0.0:{port} overlaps with 127.0.0.1:{port} of listener web of this service;"
        " choose another port or restart the service"
    )


def test_inherited_listeners_outlive_every_generation_but_not_the_service(listeners: ListenerSet) -> None:
    passed = socket.create_server(("127.0.0.1", 0))
    fd = passed.detach()
    listeners.adopt_inherited([InheritedSocket("web.socket", fd)])
    bind = Bind(name="web.socket", kind="fd", fd=fd)
    listener = listeners.acquire(1, [bind], 16)["web.socket"]
    assert listener.socket.fileno() == fd
    assert listener.is_inherited
    listeners.release(1)
    assert listeners.acquire(2, [bind], 16)["web.socket"] is listener
    listeners.close_all()
    assert not _has_fd(listener.socket)


def test_of_inherited_sockets_all_are_adopted_or_none(listeners: ListenerSet) -> None:
    with socket.create_server(("127.0.0.1", 0)) as good, socket.socket() as idle:
        with pytest.raises(UsageError, match=f"bind fd://{idle.fileno()}: is not a listening stream socket"):
            listeners.adopt_inherited([InheritedSocket("a", good.fileno()), InheritedSocket("b", idle.fileno())])
        assert listeners.close_unclaimed() == []
        os.fstat(good.fileno())


def test_inherited_sockets_that_nobody_claimed_are_closed(listeners: ListenerSet) -> None:
    fds = [socket.create_server(("127.0.0.1", 0)).detach() for _ in range(2)]
    listeners.adopt_inherited([InheritedSocket("web", fds[0]), InheritedSocket("old", fds[1])])
    claimed = listeners.acquire(1, [Bind(name="web", kind="fd", fd=fds[0])], 16)["web"]
    assert listeners.close_unclaimed() == ["old"]
    assert _has_fd(claimed.socket)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fds[1])


def test_an_fd_that_first_appears_in_a_reload_is_refused(listeners: ListenerSet) -> None:
    listeners.acquire(1, _binds("127.0.0.1:0"), 16)
    with socket.create_server(("127.0.0.1", 0)) as own:
        with pytest.raises(UsageError) as caught:
            listeners.acquire(2, [Bind(kind="fd", fd=own.fileno())], 16)
        assert caught.value.message == (
            f"bind fd://{own.fileno()}: was not passed when the service started; restart the service with it"
        )


def test_a_udp_socket_is_bound_once_and_kept_over_generations(listeners: ListenerSet) -> None:
    binds = [parse_bind("dns=udp:127.0.0.1:0"), parse_bind("127.0.0.1:0")]
    first = listeners.acquire(1, binds, 16)
    dns = first["dns"]
    assert dns.socket.type == socket.SOCK_DGRAM
    assert dns.address == f"udp:127.0.0.1:{dns.socket.getsockname()[1]}"
    assert listeners.acquire(2, binds, 32)["dns"] is dns
    with pytest.raises(HandoffError, match=rf"listener dns: {dns.address} is in use by .* \(pid {os.getpid()}\)"):
        bind_listener(parse_bind(dns.address), "dns", 16)


def test_a_udp_socket_that_was_passed_is_a_listener() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as passed:
        passed.bind(("127.0.0.1", 0))
        listener = bind_listener(Bind(kind="fd", fd=passed.fileno()), "dns", 16)
        assert listener.address == f"udp:127.0.0.1:{passed.getsockname()[1]}"
        listener.close()
