"""Datagrams between master and worker: what goes in comes out, and what is not of the protocol harms nobody else."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from handoff.channel import (
    Channel,
    ChannelBroken,
    ChannelClosed,
    channel_pair,
    master_end,
    worker_end,
)
from handoff.core.messages import (
    MAXIMUM_INLINE_BYTES,
    MAXIMUM_MESSAGE_BYTES,
    PROTOCOL,
    AlsoAccept,
    Boot,
    Closed,
    Drain,
    Failed,
    Hello,
    Hold,
    Holds,
    InMemfd,
    Leaving,
    ListenerInfo,
    Message,
    Open,
    Opened,
    Progress,
    Ready,
    ReceiverInfo,
    Receivers,
    Report,
    SlotSocket,
    cut,
)
from handoff.core.vocabulary import FailedSaid, HelloSaid, ProgressSaid, WorkerBroke
from handoff.master.crew import Crew
from handoff.master.log import MasterLog
from handoff.master.loop import Loop, Order
from handoff.master.processes import WorkerProcess, post_mortem_file
from handoff.rights import MAXIMUM_FDS
from handoff.settings import Settings
from tests.unit.fds import open_fds

SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

FROM_WORKER: list[Message] = [
    Hello(protocol=1, release="0.1.0"),
    Progress(step="importing main:app"),
    Ready(interface="asgi", unserved=("metrics",), adopts=("http/1",)),
    Opened(),
    Closed(),
    Leaving(reason="served 100 requests"),
    Failed(reason="application main:app: ValueError: ö €", traceback="line 1\nline 2"),
    Holds(request=7, total=2, holds=(Hold("request", "127.0.0.1:9", "/slow", 1.5), Hold("task", "", "", 0.0))),
]
FROM_MASTER: list[Message] = [
    Boot(
        generation=3,
        label="v3",
        slot=1,
        worker=9,
        settings=Settings(app="main:app", name="web", headers=(("x", "y"),), uvicorn={"h11": [1, None, {"a": 0.5}]}),
        listeners=(ListenerInfo("default", "127.0.0.1:80", 5), ListenerInfo("metrics", "unix:/x", 6)),
        counters_fd=8,
        counters_row=2,
        mailbox_fd=11,
    ),
    Open(),
    Drain(seconds=2.5, ending=("default",), moves=True),
    Receivers(receivers=(ReceiverInfo(mailbox=4, row=7, adopts=("http/1",), is_new=False),)),
    AlsoAccept(sockets=(SlotSocket("web", 3, is_new=False),)),
    Report(request=4),
]


def name_of(message: Message) -> str:
    return type(message).__name__


@pytest.fixture
def pair() -> Iterator[tuple[Channel[Any], Channel[Any]]]:
    """(the master's end, the worker's end); no fd may be left over."""
    before = open_fds()
    ours, theirs = channel_pair()
    master, worker = master_end(ours), worker_end(theirs)
    yield master, worker
    master.close()
    worker.close()
    assert not open_fds() - before, "an fd leaks"


def send_raw(channel: Channel[Any], data: bytes, fds: Sequence[int] = ()) -> None:
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    channel.socket.sendmsg([data], ancillary)


def memfd_of(data: bytes, seals: int = SEALS) -> int:
    memfd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(memfd, data)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, seals)
    return memfd


# --- what goes in comes out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", FROM_WORKER, ids=name_of)
def test_what_a_worker_says_reaches_the_master_unchanged(pair: Any, message: Message) -> None:
    master, worker = pair
    worker.send(message)
    assert master.receive() == (message, [])


@pytest.mark.parametrize("message", FROM_MASTER, ids=name_of)
def test_what_the_master_says_reaches_the_worker_unchanged(pair: Any, message: Message) -> None:
    master, worker = pair
    master.send(message)
    assert worker.receive() == (message, [])


def test_every_message_of_the_protocol_is_tried_here() -> None:
    tried = {type(message) for message in (*FROM_WORKER, *FROM_MASTER, InMemfd(size=1))}
    assert tried == set(Message.__subclasses__())


def test_messages_come_in_their_order_and_one_by_one(pair: Any) -> None:
    master, worker = pair
    for number in range(20):
        worker.send(Progress(step=str(number)))
    assert [master.receive()[0].step for _ in range(20)] == [str(number) for number in range(20)]
    with pytest.raises(BlockingIOError):
        master.receive()


def test_both_ends_are_close_on_exec() -> None:
    for end in channel_pair():
        with end:
            assert not end.get_inheritable()


def test_fds_come_with_their_message_in_order_and_are_close_on_exec(pair: Any) -> None:
    master, worker = pair
    files = [memfd_of(b"first"), memfd_of(b"second")]
    worker.send(Progress(step="x", fds=2), files)
    message, received = master.receive()
    assert message == Progress(step="x", fds=2)
    assert [os.pread(fd, 10, 0) for fd in received] == [b"first", b"second"]
    assert not any(os.get_inheritable(fd) for fd in received)
    for fd in (*files, *received):
        os.close(fd)


def test_a_full_channel_does_not_block_the_sender(pair: Any) -> None:
    master, _ = pair
    with pytest.raises(BlockingIOError):  # noqa: PT012
        while True:
            master.send(Report(request=1))


# --- long messages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [MAXIMUM_INLINE_BYTES - 200, MAXIMUM_INLINE_BYTES, 1024 * 1024])
def test_a_message_of_any_length_arrives(pair: Any, size: int) -> None:
    master, worker = pair
    message = Failed(reason="x" * size, traceback="€")
    worker.send(message)
    assert master.receive() == (message, [])


def test_a_message_of_exactly_the_inline_limit_needs_no_memfd(pair: Any) -> None:
    master, worker = pair
    room = MAXIMUM_INLINE_BYTES - len(msgspec.json.encode(Progress(step="")))
    worker.send(Progress(step="x" * room))
    data, ancillary, _, _ = master.socket.recvmsg(MAXIMUM_INLINE_BYTES + 1, 1000)
    assert (len(data), ancillary) == (MAXIMUM_INLINE_BYTES, [])
    worker.send(Progress(step="x" * (room + 1)))
    message, _ = master.receive()
    assert len(message.step) == room + 1


def test_a_long_message_brings_its_own_fds_along(pair: Any) -> None:
    master, worker = pair
    file = memfd_of(b"mine")
    message = Progress(step="x" * 100_000, fds=1)
    worker.send(message, [file])
    received, fds = master.receive()
    assert received == message
    assert [os.pread(fd, 10, 0) for fd in fds] == [b"mine"]
    for fd in (file, *fds):
        os.close(fd)


LONG = msgspec.json.encode(Progress(step="x" * 100_000))


@pytest.mark.parametrize(
    ("held", "said", "seals", "reason"),
    [
        pytest.param(LONG, len(LONG), 0, "not sealed", id="unsealed"),
        pytest.param(LONG, len(LONG), SEALS & ~fcntl.F_SEAL_WRITE, "not sealed", id="writable"),
        pytest.param(LONG, len(LONG) + 1, SEALS, "its envelope says", id="shorter than it says"),
        pytest.param(LONG, len(LONG) - 1, SEALS, "not a message", id="longer than it says"),
        pytest.param(LONG, 0, SEALS, "0 bytes", id="size zero"),
        pytest.param(LONG, -1, SEALS, "-1 bytes", id="size negative"),
        pytest.param(LONG, MAXIMUM_MESSAGE_BYTES + 1, SEALS, "at most", id="too long"),
        pytest.param(b"garbage", 7, SEALS, "not a message", id="garbage"),
        pytest.param(b'{"type":"in-memfd","size":9}', 28, SEALS, "something else", id="nested"),
        pytest.param(b'{"type":"progress","step":"","fds":1}', 37, SEALS, "something else", id="wants more fds"),
    ],
)
def test_a_memfd_that_is_not_what_its_envelope_says_breaks_the_channel(
    pair: Any, held: bytes, said: int, seals: int, reason: str
) -> None:
    master, worker = pair
    memfd = memfd_of(held, seals)
    worker.send(InMemfd(size=said, fds=1), [memfd])
    os.close(memfd)
    with pytest.raises(ChannelBroken, match=reason):
        master.receive()


def test_a_long_message_in_a_file_that_is_no_memfd_breaks_the_channel(pair: Any) -> None:
    master, worker = pair
    reader, writer = os.pipe()
    worker.send(InMemfd(size=10, fds=1), [reader])
    os.close(reader)
    os.close(writer)
    with pytest.raises(ChannelBroken, match="something else than a memfd"):
        master.receive()


def test_an_envelope_without_an_fd_breaks_the_channel(pair: Any) -> None:
    master, worker = pair
    worker.send(InMemfd(size=10))
    with pytest.raises(ChannelBroken):
        master.receive()


# --- what is not of the protocol ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"garbage",
        b"\xff\xfe\x00",
        b"{}",
        b"[]",
        b"null",
        b'{"type":"unknown"}',
        b'{"type":"hello"}',
        b'{"type":"hello","protocol":"1","release":"x"}',
        b'{"type":"open"}',
        b'{"type":"progress","step":"\xff"}',
        b'{"type":"progress","step":"x"',
        b'{"type":"progress","step":"x","fds":-1}',
        b"[" * 60_000,
    ],
    ids=lambda data: repr(data[:40]),
)
def test_what_is_no_message_breaks_the_channel(pair: Any, data: bytes) -> None:
    master, worker = pair
    send_raw(worker, data)
    with pytest.raises(ChannelBroken):
        master.receive()


def test_fields_of_a_later_release_are_ignored(pair: Any) -> None:
    master, worker = pair
    send_raw(worker, b'{"type":"opened","later":[1,2]}')
    assert master.receive() == (Opened(), [])


@pytest.mark.parametrize(("declared", "sent"), [(0, 1), (1, 0), (1, 2), (2, 1), (0, MAXIMUM_FDS)])
def test_a_wrong_number_of_fds_breaks_the_channel_and_leaks_none(pair: Any, declared: int, sent: int) -> None:
    master, worker = pair
    file = memfd_of(b"")
    send_raw(worker, msgspec.json.encode(Opened(fds=declared)), [file] * sent)
    os.close(file)
    with pytest.raises(ChannelBroken, match=f"Opened came with {sent} fds, declares {declared}"):
        master.receive()


def test_fds_that_come_with_garbage_are_closed(pair: Any) -> None:
    master, worker = pair
    file = memfd_of(b"")
    send_raw(worker, b"garbage", [file] * 5)
    os.close(file)
    with pytest.raises(ChannelBroken):
        master.receive()


def test_an_empty_datagram_with_fds_is_broken_and_its_fds_are_closed(pair: Any) -> None:
    master, worker = pair
    file = memfd_of(b"")
    send_raw(worker, b"", [file])
    os.close(file)
    with pytest.raises(ChannelBroken):
        master.receive()


@pytest.mark.parametrize("size", [MAXIMUM_INLINE_BYTES + 1, MAXIMUM_INLINE_BYTES + 2, MAXIMUM_INLINE_BYTES + 5000])
def test_a_datagram_that_is_too_long_is_broken_and_its_fds_are_closed(pair: Any, size: int) -> None:
    master, worker = pair
    file = memfd_of(b"")
    send_raw(worker, b" " * size, [file])
    os.close(file)
    with pytest.raises(ChannelBroken, match="cut short"):
        master.receive()


def test_a_channel_says_only_what_it_was_made_for(pair: Any) -> None:
    master, worker = pair
    worker.send(Open())
    with pytest.raises(ChannelBroken):
        master.receive()


# --- the end --------------------------------------------------------------------------------------------------------


def test_a_closed_peer_is_an_end_and_not_a_message(pair: Any) -> None:
    master, worker = pair
    worker.close()
    for _ in range(2):
        with pytest.raises(ChannelClosed):
            master.receive()


def test_the_last_messages_of_a_dead_peer_are_read_before_its_end(pair: Any) -> None:
    master, worker = pair
    worker.send(Failed(reason="last words"))
    worker.close()
    assert master.receive() == (Failed(reason="last words"), [])
    with pytest.raises(ChannelClosed):
        master.receive()


def test_a_peer_that_died_with_unread_input_is_still_heard_to_its_end(pair: Any) -> None:
    """unix(7): the kernel says ECONNRESET once, before the messages that are still queued."""
    master, worker = pair
    master.send(Report(request=1))
    worker.send(Progress(step="1"))
    worker.send(Failed(reason="last words"))
    worker.close()
    assert master.receive() == (Progress(step="1"), [])
    assert master.receive() == (Failed(reason="last words"), [])
    with pytest.raises(ChannelClosed):
        master.receive()


def test_sending_to_a_peer_that_is_gone_raises_and_no_signal_comes(pair: Any) -> None:
    master, worker = pair
    worker.close()
    with pytest.raises(BrokenPipeError):
        master.send(Open())


def test_what_is_cut_keeps_its_end_and_its_limit() -> None:
    assert cut("abc", 3) == "abc"
    assert cut("abcdef", 4) == "…def"


# --- a worker of another release ------------------------------------------------------------------------------------


class HeardCrew:
    """A crew with one process, whose worker's end of the channel is ours. Owns both ends."""

    def __init__(self) -> None:
        self.events: list[object] = []
        self.loop = Loop()
        log = MasterLog(fd=os.open(os.devnull, os.O_WRONLY))
        self.crew = Crew(self.loop, log, self.events.append, Path(os.devnull))
        ours, theirs = channel_pair()
        boot = FROM_MASTER[0]
        assert isinstance(boot, Boot)
        pidfd = os.pidfd_open(os.getpid())
        self.process = WorkerProcess(boot.worker, boot, os.getpid(), pidfd, master_end(ours), post_mortem_file())
        self.crew._processes[boot.worker] = self.process
        self.worker = worker_end(theirs)
        self.loop.watch(self.process.channel, Order.CHANNEL, lambda: self.crew._hear(self.process))

    def close(self) -> None:
        self.loop.close()
        self.process.close()
        self.worker.close()


@pytest.fixture
def heard() -> Iterator[HeardCrew]:
    found = HeardCrew()
    yield found
    found.close()


def test_a_worker_of_this_protocol_is_greeted_with_its_boot_message(heard: HeardCrew) -> None:
    heard.worker.send(Hello(protocol=PROTOCOL, release="0.1.0"))
    heard.loop.turn(0)
    assert heard.events == [HelloSaid(9)]
    assert heard.worker.receive() == (FROM_MASTER[0], [])


def test_a_worker_that_cannot_be_sent_its_boot_message_is_ended_at_once(
    heard: HeardCrew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long one travels in a memfd, for which the master may have no fd: nobody is to wait for the boot timeout."""

    def refuse(end: socket.socket, data: bytes, fds: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    heard.worker.send(Hello(protocol=PROTOCOL, release="0.1.0"))
    monkeypatch.setattr("handoff.channel.send_datagram", refuse)
    heard.loop.turn(0)
    assert heard.events == [HelloSaid(9), WorkerBroke(9, "its boot message could not be sent; out of fds or memory")]


@pytest.mark.parametrize("protocol", [0, 2, 999])
def test_a_worker_of_another_protocol_is_a_failed_boot_that_names_both_versions(
    heard: HeardCrew, protocol: int
) -> None:
    heard.worker.send(Hello(protocol=protocol, release="9.9.9"))
    heard.loop.turn(0)
    (event,) = heard.events
    assert isinstance(event, FailedSaid)
    assert f"handoff 9.9.9 speaks protocol {protocol}, this master serves 1" in event.reason
    assert "\n" not in event.reason
    with pytest.raises(BlockingIOError):
        heard.worker.receive()


@pytest.mark.parametrize("data", [b"garbage", b'{"type":"in-memfd","size":9}', b'{"type":"ready"}', b"x" * 66_000])
def test_a_worker_that_sends_garbage_breaks_alone_and_is_not_heard_again(heard: HeardCrew, data: bytes) -> None:
    send_raw(heard.worker, data)
    heard.worker.send(Opened())
    heard.loop.turn(0)
    heard.loop.turn(0)
    (event,) = heard.events
    assert isinstance(event, WorkerBroke)
    heard.crew.send(9, Open())
    with pytest.raises(BlockingIOError):
        heard.worker.receive()


def test_fds_that_a_worker_sends_are_closed(heard: HeardCrew) -> None:
    before = open_fds()
    heard.worker.send(Progress(step="x", fds=1), [heard.process.pidfd])
    heard.loop.turn(0)
    assert heard.events == [ProgressSaid(9, "x")]
    assert not open_fds() - before


def test_a_worker_that_closes_its_channel_and_lives_on_is_broken_when_its_time_is_over(heard: HeardCrew) -> None:
    heard.worker.send(Progress(step="last"))
    heard.worker.close()
    heard.loop.turn(0)
    assert heard.events == [ProgressSaid(9, "last")]
    deadline = heard.crew.next_deadline()
    assert deadline is not None
    heard.crew.check(deadline - 0.001)
    assert len(heard.events) == 1
    heard.crew.check(deadline)
    assert heard.events[1:] == [WorkerBroke(9, "it closed its channel and lives on")]
    assert heard.crew.next_deadline() is None
