"""One listening socket: how it is bound, what it is, and how it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Sequence

import psutil

from handoff.addresses import Bind
from handoff.errors import HandoffError, UsageError
from handoff.reuseport import IP_FREEBIND, SlotSockets
from handoff.unix_paths import Inode, bind_path, inode_of

WILDCARDS = {"0.0.0.0", "::"}
_BOUND = (psutil.CONN_LISTEN, psutil.CONN_NONE)  # of TCP, of UDP


class Listener:
    """One listening socket. Owns the socket, and the path of a unix socket that we bound ourselves.

    `address` is what is really bound, as shown to a person: it has the port that the kernel chose for port 0.
    """

    __slots__ = ("_inode", "address", "backlog", "bind", "is_inherited", "name", "slots", "socket")

    def __init__(
        self,
        name: str,
        bind: Bind,
        sock: socket.socket,
        *,
        backlog: int,
        is_inherited: bool = False,
        inode: Inode | None = None,
    ) -> None:
        """Takes ownership of `sock`. `inode` is that of the path we bound; None means that the path is not ours."""
        self.name = name
        self.bind = bind
        self.socket = sock
        self.address = _shown_address(bind, sock)
        self.is_inherited = is_inherited
        self.backlog = backlog
        self.slots: SlotSockets | None = None
        """Where each slot has a socket of its own."""
        self._inode = inode

    def __repr__(self) -> str:
        return f"<Listener {self.name} {self.address}{' inherited' if self.is_inherited else ''}>"

    def listen(self, backlog: int) -> None:
        """Change the length of the queue of connections that wait to be accepted. Datagrams have no such queue."""
        if self.socket.type == socket.SOCK_STREAM:
            self.socket.listen(backlog)
        if self.slots is not None:
            self.slots.listen(backlog)
        self.backlog = backlog

    def socket_of(self, slot: int) -> socket.socket:
        """What a worker in this slot accepts from; borrowed. Raises OSError."""
        return self.socket if self.slots is None else self.slots.of(slot, self.backlog)

    def set_mode(self, mode: int) -> None:
        """Change the mode of the path that we bound, if it is still ours; HandoffError if that is not permitted."""
        if not self._has_own_path():
            return
        try:
            os.chmod(self.bind.path, mode)
        except OSError as error:
            problem = os.strerror(error.errno or 0)
            subject = f"listener {self.name}: unix path {self.bind.path}"
            raise HandoffError(f"{subject}: cannot have mode {mode:04o} ({problem}); leave ?mode= as it was") from error

    def close(self) -> None:
        """Close the socket, and unlink the path if we bound it and nobody replaced it since. May be called again."""
        if self._has_own_path():
            with contextlib.suppress(OSError):  # a directory that went read-only, or the file went just now
                os.unlink(self.bind.path)
        self._inode = None
        if self.slots is not None:
            self.slots.close()
        self.socket.close()

    def _has_own_path(self) -> bool:
        return self._inode is not None and inode_of(self.bind.path) == self._inode


def bind_listener(bind: Bind, name: str, backlog: int, is_per_slot: bool = False) -> Listener:
    """A new listener on `bind`, non-blocking and close-on-exec; the caller owns it.

    Raises HandoffError, one line that names the listener, the address, and what to do; UsageError for an fd:// that
    is no listening stream socket (its backlog is left as it is). Nothing is left behind then. Looking up a host name
    may block.
    """
    match bind.kind:
        case "tcp":
            return _bind_tcp(bind, name, backlog, is_per_slot)
        case "udp":
            return _bind_udp(bind, name)
        case "unix":
            return _bind_unix(bind, name, backlog)
        case "fd":
            return _duplicate_fd(bind, name)


def _shown_address(bind: Bind, sock: socket.socket) -> str:
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        host, port = sock.getsockname()[:2]
        scheme = "udp:" if sock.type == socket.SOCK_DGRAM else ""
        return f"{scheme}[{host}]:{port}" if ":" in host else f"{scheme}{host}:{port}"
    if bind.kind == "unix":
        return str(bind)
    path = sock.getsockname()
    return f"unix:{path}" if isinstance(path, str) and path else str(bind)


# TCP


def _bind_tcp(bind: Bind, name: str, backlog: int, is_per_slot: bool) -> Listener:
    if is_per_slot and bind.port != 0:
        # With SO_REUSEPORT another server of this user could have the port, and half of the clients.
        _bind_tcp(bind, name, backlog, is_per_slot=False).close()
    family, address = _resolve_host(bind, name)
    with contextlib.ExitStack() as undo:
        try:
            # asyncio sets TCP_NODELAY on what it accepts only if the listener's proto says TCP.
            sock = undo.enter_context(socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP))
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if is_per_slot:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if bind.is_free:
                sock.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
            sock.bind(address)
            # Two sockets with SO_REUSEADDR may bind the same address; only one may listen.
            sock.listen(backlog)
        except OSError as error:
            raise HandoffError(_tcp_problem(bind, name, address, error)) from error
        listener = Listener(name, bind, sock, backlog=backlog)
        listener.slots = SlotSockets(sock) if is_per_slot else None
        undo.pop_all()
        return listener


def _bind_udp(bind: Bind, name: str) -> Listener:
    """No SO_REUSEADDR: with it a second server could take the port, and half of the datagrams."""
    family, address = _resolve_host(bind, name)
    with contextlib.ExitStack() as undo:
        try:
            sock = undo.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            sock.setblocking(False)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if bind.is_free:
                sock.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
            sock.bind(address)
        except OSError as error:
            raise HandoffError(_tcp_problem(bind, name, address, error)) from error
        listener = Listener(name, bind, sock, backlog=0)
        undo.pop_all()
        return listener


def _resolve_host(bind: Bind, name: str) -> tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int]]:
    try:
        # As bytes: text would import the codec "idna" just now.
        found = socket.getaddrinfo(
            bind.host.encode("ascii"),
            bind.port,
            type=socket.SOCK_STREAM,
            proto=socket.IPPROTO_TCP,
            flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV,
        )
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise HandoffError(
            f"listener {name}: {bind}: host {bind.host} is unknown ({reason}); write an IP address"
        ) from error
    family, _, _, _, address = found[0]
    return family, address  # type: ignore[return-value]  # typeshed allows for Python without IPv6


def _tcp_problem(bind: Bind, name: str, address: Sequence[object], error: OSError) -> str:
    subject = f"listener {name}: {bind}"
    match error.errno:
        case errno.EADDRINUSE:
            holder = _holder(bind.kind, str(address[0]), bind.port)
            return f"{subject} is in use by {holder}; stop it or choose another port"
        case errno.EACCES if 0 < bind.port < 1024:
            return f"{subject} needs CAP_NET_BIND_SERVICE; grant it or bind a port above 1023"
        case errno.EADDRNOTAVAIL:
            return f"{subject} is not an address of this machine; write one that `ip address` lists, or use --freebind"
        case errno.EAFNOSUPPORT:
            return f"{subject} needs IPv6, which this machine has not; write an IPv4 address"
        case _:
            return f"{subject} cannot be bound ({os.strerror(error.errno or 0)}); choose another address"


def _holder(kind: str, host: str, port: int) -> str:
    """Who listens where `host` and `port` cannot be bound, as far as we are allowed to see it."""
    unknown = "another process"
    try:
        for connection in psutil.net_connections(kind=kind):
            local = connection.laddr
            if connection.status not in _BOUND or not local or local.port != port or not connection.pid:
                continue
            if host in WILDCARDS or local.ip in {host.partition("%")[0], *WILDCARDS}:
                holder = _eldest_holder(psutil.Process(connection.pid), kind, port)
                return f"{holder.name()} (pid {holder.pid})"
    except (psutil.Error, OSError, RuntimeError):
        return unknown  # /proc is hidden from us, or the holder went while we looked
    return unknown


def _eldest_holder(holder: psutil.Process, kind: str, port: int) -> psutil.Process:
    """Workers have the listener from their master, and the master is whom to stop."""
    while True:
        parent = holder.parent()
        if parent is None:
            return holder
        try:
            connections = parent.net_connections(kind=kind)
        except psutil.Error:
            return holder
        if port not in {one.laddr.port for one in connections if one.status in _BOUND and one.laddr}:
            return holder
        holder = parent


def _bind_unix(bind: Bind, name: str, backlog: int) -> Listener:
    assert bind.path.startswith("/"), f"{bind} is not absolute"
    sock, inode = bind_path(bind.path, bind.mode, backlog, f"listener {name}: unix path {bind.path}")
    return Listener(name, bind, sock, backlog=backlog, inode=inode)


# File descriptors that were passed


def _duplicate_fd(bind: Bind, name: str) -> Listener:
    try:
        fd = fcntl.fcntl(bind.fd, fcntl.F_DUPFD_CLOEXEC, 3)
        os.set_inheritable(bind.fd, False)  # else every worker would hold the given one open, too
    except OSError as error:
        raise UsageError(
            f"bind {bind}: is not open ({os.strerror(error.errno or 0)}); let the parent pass it"
        ) from error
    try:
        return fd_listener(bind, name, fd)
    except BaseException:
        os.close(fd)
        raise


def fd_listener(bind: Bind, name: str, fd: int) -> Listener:
    """A listener around `fd`, which it owns afterwards; UsageError, and the fd left alone, if that does not listen."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        raise UsageError(f"bind {bind}: is not a socket; pass a listening stream socket") from None
    try:
        is_listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and sock.type == socket.SOCK_STREAM
        if not is_listening and not _is_bound_datagram(sock):
            raise UsageError(f"bind {bind}: is not a listening stream socket; pass one after listen(2)")
        sock.setblocking(False)
        if is_listening and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.detach()
        raise
    # The length of the queue cannot be asked for: 0 makes the first generation set its own.
    return Listener(name, bind, sock, backlog=0, is_inherited=True)


def _is_bound_datagram(sock: socket.socket) -> bool:
    """A socket of UDP that has its port."""
    is_udp = sock.type == socket.SOCK_DGRAM and sock.family in (socket.AF_INET, socket.AF_INET6)
    return is_udp and sock.getsockname()[1] != 0
