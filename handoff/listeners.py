"""The listening sockets of a service: bound, reused over reloads, closed by their one owner."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Collection, Iterator, Sequence

import psutil

from handoff.addresses import MAX_UNIX_PATH_BYTES, Bind, listener_names
from handoff.errors import HandoffError, UsageError
from handoff.inherited import InheritedSocket
from handoff.reuseport import IP_FREEBIND, SlotSockets

_WILDCARDS = {"0.0.0.0", "::"}
_BOUND = (psutil.CONN_LISTEN, psutil.CONN_NONE)  # of TCP, of UDP
_Inode = tuple[int, int]  # st_dev, st_ino


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
        inode: _Inode | None = None,
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
        return self._inode is not None and _inode_of(self.bind.path) == self._inode


class ListenerSet:
    """All listeners of a master, and which generations hold them. Owns every one of them.

    A listener lives as long as a generation holds it; inherited ones live on, since nobody could bind them again.
    """

    def __init__(self) -> None:
        self._open: dict[str, Listener] = {}
        self._held: dict[int, dict[str, str]] = {}  # generation → name → identity
        self._is_started = False

    def adopt_inherited(self, sockets: Sequence[InheritedSocket]) -> None:
        """Take ownership of the sockets that the parent passed; UsageError, and none taken, if one does not listen."""
        with contextlib.ExitStack() as undo:
            adopted = {}
            for inherited in sockets:
                bind = Bind(name=inherited.name, kind="fd", fd=inherited.fd)
                listener = _fd_listener(bind, inherited.name, inherited.fd)
                undo.callback(listener.socket.detach)
                adopted[_identity(bind, inherited.name)] = listener
            undo.pop_all()
        self._open.update(adopted)

    def acquire(
        self, generation: int, binds: Sequence[Bind], backlog: int, per_slot: Collection[str] = ()
    ) -> dict[str, Listener]:
        """The listeners for `binds` by name, bound now or already open; borrowed until `release(generation)`.

        All or nothing: if one cannot be had, those newly bound are closed again, the others were not touched, and
        the HandoffError of that one goes to the caller. The path of a unix socket must be absolute. `per_slot`: names
        of those that get a socket for each slot, where they are bound now and are TCP.
        """
        assert generation not in self._held, f"generation {generation} holds listeners already"
        listeners: dict[str, Listener] = {}
        fresh: dict[str, Listener] = {}
        held: dict[str, str] = {}
        with contextlib.ExitStack() as undo:
            for name, bind in zip(listener_names(binds), binds, strict=True):
                identity = _identity(bind, name)
                listener = self._open.get(identity) or fresh.get(identity)
                if listener is None:
                    others = [*self._open.values(), *fresh.values()]
                    listener = self._bind(bind, name, backlog, others, name in per_slot)
                    undo.callback(listener.close)
                    fresh[identity] = listener
                listeners[name] = listener
                held[name] = identity
            for (name, listener), bind in zip(listeners.items(), binds, strict=True):
                _update(listener, name, bind, backlog)
            undo.pop_all()
        self._open.update(fresh)
        self._held[generation] = held
        self._is_started = True
        return listeners

    def release(self, generation: int) -> None:
        """Let go of a generation's listeners, and close those that no other generation holds. May be called again."""
        held = self._held.pop(generation, {})
        still_held = self._held_identities()
        for identity in set(held.values()) - still_held:
            if not self._open[identity].is_inherited:
                self._open.pop(identity).close()

    def close_unclaimed(self) -> list[str]:
        """Close the inherited sockets that no generation holds, and return their names.

        To be called when the first generation is ready: connections to a socket that nobody accepts from would hang.
        """
        unclaimed = [self._open.pop(identity) for identity in sorted(self._open.keys() - self._held_identities())]
        for listener in unclaimed:
            listener.close()
        return [listener.name for listener in unclaimed]

    def addresses(self, generation: int | None = None) -> dict[str, str]:
        """The bound addresses by name, of one generation, or of the newest that holds any."""
        if generation is None:
            generation = max(self._held, default=0)
        return {name: self._open[identity].address for name, identity in self._held.get(generation, {}).items()}

    def close_all(self) -> None:
        """Close every listener, inherited ones too."""
        self._held.clear()
        while self._open:
            self._open.popitem()[1].close()

    def _held_identities(self) -> set[str]:
        return {identity for held in self._held.values() for identity in held.values()}

    def _bind(self, bind: Bind, name: str, backlog: int, others: Sequence[Listener], is_per_slot: bool) -> Listener:
        if bind.kind == "fd" and self._is_started:
            # By now that number may be any file of our own.
            raise UsageError(f"bind {bind}: was not passed when the service started; restart the service with it")
        try:
            return bind_listener(bind, name, backlog, is_per_slot)
        except HandoffError as error:
            own = next((other for other in others if _overlaps(bind, other)), None)
            if own is None or not isinstance(error.__cause__, OSError) or error.__cause__.errno != errno.EADDRINUSE:
                raise
            raise HandoffError(
                f"listener {name}: {bind} overlaps with {own.address} of listener {own.name} of this service;"
                " choose another port or restart the service"
            ) from error


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


def _identity(bind: Bind, name: str) -> str:
    # Port 0 is another port for each listener: there the name tells them apart.
    return f"{bind.key}={name}" if bind.is_any_port else bind.key


def _overlaps(bind: Bind, listener: Listener) -> bool:
    """Whether a bind cannot be had beside the listener: the same port, and one of the two takes every address."""
    kind = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}.get(bind.kind)
    if kind is not listener.socket.type or listener.socket.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    host, port = listener.socket.getsockname()[:2]
    is_same_family = (":" in bind.host) == (":" in host)
    return is_same_family and port == bind.port and (bind.host == host or {bind.host, host} & _WILDCARDS != set())


def _update(listener: Listener, name: str, bind: Bind, backlog: int) -> None:
    """Bring a listener, whether reused or new, to what the newest generation asks for."""
    listener.name = name
    if listener.backlog != backlog:
        listener.listen(backlog)
    if bind.mode != listener.bind.mode:
        listener.set_mode(bind.mode)
    listener.bind = bind


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
            if host in _WILDCARDS or local.ip in {host.partition("%")[0], *_WILDCARDS}:
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


# Unix


def _bind_unix(bind: Bind, name: str, backlog: int) -> Listener:
    """Bind under a temporary name beside the path, then rename: the path always leads to a socket that listens."""
    assert bind.path.startswith("/"), f"{bind} is not absolute"
    subject = f"listener {name}: unix path {bind.path}"
    with contextlib.ExitStack() as undo:
        try:
            directory_fd = undo.enter_context(_locked_directory(os.path.dirname(bind.path), subject))
            _refuse_what_lives(bind.path, subject)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            undo_socket = undo.enter_context(contextlib.ExitStack())
            undo_socket.enter_context(sock)
            sock.setblocking(False)
            temporary = f".{os.path.basename(bind.path)[:32]}.{os.urandom(4).hex()}"
            sock.bind(_bindable(os.path.dirname(bind.path), directory_fd, temporary))
            undo_socket.callback(_unlink_quietly, temporary, directory_fd)
            os.chmod(temporary, bind.mode, dir_fd=directory_fd)  # bind(2) took the umask off
            sock.listen(backlog)
            os.rename(temporary, os.path.basename(bind.path), src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
        except OSError as error:
            raise HandoffError(_unix_problem(bind.path, subject, error)) from error
        undo_socket.pop_all()
        return Listener(name, bind, sock, backlog=backlog, inode=_inode_of(bind.path))


@contextlib.contextmanager
def _locked_directory(directory: str, subject: str) -> Iterator[int]:
    """An fd of the directory, locked: no other master probes and replaces a socket in it meanwhile."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HandoffError(
                f"{subject}: {directory} is locked by another process that binds there; try again"
            ) from None
        yield fd
    finally:
        os.close(fd)


def _refuse_what_lives(path: str, subject: str) -> None:
    """Return if nothing is there, or a socket that nobody listens on any more; HandoffError for anything else."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise HandoffError(f"{subject}: is a directory; choose another path")
    if not stat.S_ISSOCK(mode):
        raise HandoffError(f"{subject}: is not a socket; remove it or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        # unix(7): refused if nobody listens, EAGAIN if the queue is full, EPROTOTYPE if it is another type of socket.
        if probe.connect_ex(path) not in (errno.ECONNREFUSED, errno.ENOENT):
            raise HandoffError(f"{subject}: belongs to a living server; stop it or choose another path")


def _bindable(directory: str, directory_fd: int, name: str) -> str:
    """A path to the new name that fits into an address, also where the directory's own path leaves no room."""
    path = os.path.join(directory, name)
    return path if len(os.fsencode(path)) <= MAX_UNIX_PATH_BYTES else f"/proc/self/fd/{directory_fd}/{name}"


def _unlink_quietly(name: str, directory_fd: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory_fd)


def _unix_problem(path: str, subject: str, error: OSError) -> str:
    directory = os.path.dirname(path)
    match error.errno:
        case errno.ENOENT:
            return f"{subject}: directory {directory} does not exist; create it or choose another path"
        case errno.ENOTDIR:
            return f"{subject}: {directory} is not a directory; choose another path"
        case errno.EACCES | errno.EPERM:
            return f"{subject}: no permission to create it in {directory}; grant it or choose another path"
        case _:
            return f"{subject}: cannot be bound ({os.strerror(error.errno or 0)}); choose another path"


def _inode_of(path: str) -> _Inode | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


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
        return _fd_listener(bind, name, fd)
    except BaseException:
        os.close(fd)
        raise


def _fd_listener(bind: Bind, name: str, fd: int) -> Listener:
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
