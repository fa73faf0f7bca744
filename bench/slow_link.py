"""Two network namespaces and a slow link between them, made of two TUN devices and a thread that waits.

As netem does it, but for kernels that were built without it. Needs root.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import select
import struct
import subprocess
import threading
import time
from types import TracebackType
from typing import Self

CLONE_NEWNET = 0x40000000  # sched.h
_TUNSETIFF = 0x400454CA  # linux/if_tun.h
_IFF_TUN_NO_PI = 0x0001 | 0x1000
_PACKET_BYTES = 65536
_SIDES = ("server", "client")
libc = ctypes.CDLL(None, use_errno=True)


def enter(namespace: str) -> None:
    """The calling thread, and no other, makes its sockets in the namespace from now on: setns(2)."""
    with open(f"/run/netns/{namespace}") as file:
        if libc.setns(file.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {namespace}")


class SlowLink:
    """A context manager. `namespaces`, `ipv4` and `ipv6` have an entry for "server" and one for "client"."""

    def __init__(self, delay_seconds: float) -> None:
        """`delay_seconds`: each way."""
        self._delay_seconds = delay_seconds
        self.namespaces = {side: f"handoff-{os.getpid()}-{side}" for side in _SIDES}
        self.ipv4 = {"server": "10.77.0.1", "client": "10.77.0.2"}
        self.ipv6 = {"server": "fd77::1", "client": "fd77::2"}
        self._undo = contextlib.ExitStack()
        self._wake_reader, self._wake_writer = os.pipe()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, self._wake_reader)
            undo.callback(os.close, self._wake_writer)
            devices = []
            for side in _SIDES:
                devices.append(self._device(side))
                undo.callback(os.close, devices[-1])
                undo.callback(_ip, "netns", "del", self.namespaces[side])
            thread = threading.Thread(target=self._forward, args=devices, daemon=True)
            thread.start()
            undo.callback(thread.join)
            undo.callback(os.write, self._wake_writer, b"\0")
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def _device(self, side: str) -> int:
        """The fd of a TUN device in a new namespace."""
        namespace = self.namespaces[side]
        _ip("netns", "add", namespace)
        try:
            found: list[int] = []
            thread = threading.Thread(target=lambda: found.append(_open_tun(namespace)))
            thread.start()
            thread.join()
            (fd,) = found
            inside = ("-n", namespace)
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "addr", "add", f"{self.ipv4[side]}/24", "dev", "slow0")
            _ip(*inside, "addr", "add", f"{self.ipv6[side]}/64", "dev", "slow0", "nodad")
            _ip(*inside, "link", "set", "slow0", "up")
        except BaseException:
            _ip("netns", "del", namespace)
            raise
        return fd

    def _forward(self, one: int, other: int) -> None:
        """Packets wait in the order of their times; nothing is dropped, as on a link with room."""
        across = {one: other, other: one}
        waiting: list[tuple[float, int, int, bytes]] = []
        count = 0
        while True:
            timeout = None if not waiting else max(0.0, waiting[0][0] - time.monotonic())
            ready, _, _ = select.select([one, other, self._wake_reader], [], [], timeout)
            if self._wake_reader in ready:
                return
            now = time.monotonic()
            for device in ready:
                count += 1
                heapq.heappush(waiting, (now + self._delay_seconds, count, device, os.read(device, _PACKET_BYTES)))
            while waiting and waiting[0][0] <= now:
                _, _, device, packet = heapq.heappop(waiting)
                with contextlib.suppress(OSError):  # the device is down: a packet is lost
                    os.write(across[device], packet)


def _open_tun(namespace: str) -> int:
    """In a thread of its own, which stays in the namespace until it ends."""
    enter(namespace)
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", b"slow0", _IFF_TUN_NO_PI))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)
