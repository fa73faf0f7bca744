"""The fds of commands: each is kept once, bounded, and closed when nobody is to get it any more."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from handoff.master.fd_store import MAXIMUM_STORED_FDS, FdStore
from tests.unit.fds import open_fds


@pytest.fixture
def store() -> Iterator[FdStore]:
    before = open_fds()
    found = FdStore()
    yield found
    found.close()
    assert not found
    assert not open_fds() - before


def names(store: FdStore, slot: int = 0) -> list[str]:
    return [name for name, _ in store.of(slot)]


def test_fds_are_kept_in_order_and_for_their_slot(store: FdStore) -> None:
    assert store.add(0, "b", [os.memfd_create("b")]) == 0
    assert store.add(0, "a", [os.memfd_create("a"), os.memfd_create("c")]) == 0
    assert names(store) == ["b", "a", "a"]
    assert names(store, 1) == []
    assert not any(os.get_inheritable(fd) for _, fd in store.of(0))


def test_the_same_thing_is_kept_once(store: FdStore) -> None:
    fd = os.memfd_create("one")
    copies = [os.dup(fd), os.dup(fd)]
    assert store.add(0, "one", [fd, *copies]) == 0
    assert store.add(0, "two", [os.dup(fd)]) == 0
    assert store.of(0) == [("one", fd)]


def test_both_ends_of_a_pipe_and_every_eventfd_are_things_of_their_own(store: FdStore) -> None:
    store.add(0, "pipe", list(os.pipe()))
    store.add(0, "event", [os.eventfd(0), os.eventfd(0)])
    assert names(store) == ["pipe", "pipe", "event", "event"]


def test_what_has_no_room_is_closed(store: FdStore) -> None:
    fds = [os.memfd_create("one") for _ in range(MAXIMUM_STORED_FDS + 2)]
    assert store.add(0, "many", fds) == 2
    assert len(store.of(0)) == MAXIMUM_STORED_FDS
    assert store.add(0, "again", [os.dup(fds[0])]) == 0


def test_a_connection_whose_peer_is_gone_is_not_kept(store: FdStore) -> None:
    ours, theirs = socket.socketpair()
    kept, peer = socket.socketpair()
    store.add(0, "gone", [ours.detach()])
    store.add(0, "held", [kept.detach()], is_polled=False)
    theirs.close()
    peer.close()
    assert names(store) == ["held"]


def test_removing_takes_all_of_a_name(store: FdStore) -> None:
    store.add(0, "a", [os.memfd_create("1"), os.memfd_create("2")])
    store.add(0, "b", [os.memfd_create("3")])
    store.add(1, "a", [os.memfd_create("4")])
    store.remove(0, "a")
    store.remove(0, "never")
    assert names(store) == ["b"]
    store.keep_only({0})
    assert names(store, 1) == []
