"""A balancer that starts asks its peers for newer revisions: before it accepts, and those that were silent later on.

Only at a start: while all of them run, a rollout switches one after the other, each by its own revision.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from handoff.errors import HandoffError
from lb.control.files import read_decoded, write_atomically
from lb.control.store import Store
from lb.control.stored import OVERRIDES_NAME
from lb.core.catching_up import caught_up
from lb.core.model import Balancer
from lb.core.overrides import VERSION, Overrides
from lb.rollout.balancers import DirectBalancer, RemoteBalancer, client_for
from lb.token_file import read_token

UNHEARD_NAME = "unheard-peers.json"
"""In the state directory: the peers that did not answer at the start."""
ANSWER_SECONDS = 3.0
"""For all of them: one that is dead holds up nobody's start for longer."""
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 1.0, 30.0

_LOG = logging.getLogger("handoff.lb")
_UNHEARD = msgspec.json.Decoder(tuple[str, ...])

T = TypeVar("T")
Client = DirectBalancer | RemoteBalancer


class Taking(Protocol):
    """Who takes what a peer has."""

    balancer: Balancer
    unheard_peers: tuple[str, ...]

    def catch_up(self, theirs: Overrides, peer: str) -> None: ...


def catch_up_before_start(balancer: Balancer, state: Path, near: str) -> tuple[str, ...]:
    """The revisions that peers know stand in the state directory after it; a line for each thing worth knowing.

    `near`: the directory of the balancer's file. Raises HandoffError for a token that cannot be read.
    """
    is_new = not (state / OVERRIDES_NAME).exists()
    store = Store(state)
    before = overrides = store.load()
    clients = [_client(balancer, peer, near) for peer in balancer.peers]
    notes: list[str] = []
    unheard = []
    for client, answer in zip(clients, _run(_ask_all(clients)), strict=True):
        if isinstance(answer, HandoffError):
            unheard.append(client.name)
            notes.append(f"{answer.message}; whether it knows a newer revision will be asked on")
            continue
        overrides, taken = caught_up(overrides, answer, balancer.services, client.name, is_new=is_new)
        is_new = False
        notes += taken
    if overrides != before:
        store.save(msgspec.structs.replace(overrides, number=before.number + 1))
        if store.problem is not None:
            notes.append(f"what peers know could not be taken: {store.problem}")
    _write_unheard(state, unheard)
    return tuple(notes)


class LateAnswers:
    """Asks those that were silent when we started, until each has answered once. Tasks are of the group."""

    def __init__(self, tasks: asyncio.TaskGroup, taking: Taking, state: Path) -> None:
        self._taking, self._state = taking, state
        silent = read_decoded(state / UNHEARD_NAME, _UNHEARD.decode) or ()
        self._set([peer for peer in silent if peer in taking.balancer.peers])
        for peer in taking.unheard_peers:
            tasks.create_task(self._until_heard(peer))

    async def _until_heard(self, peer: str) -> None:
        delay = FIRST_RETRY_SECONDS
        told = ""
        while peer in self._taking.balancer.peers:
            try:
                [answer] = await _ask_all([_client(self._taking.balancer, peer, "")])
            except HandoffError as error:
                answer = error
            if not isinstance(answer, HandoffError):
                _LOG.info("peer %s: is heard", peer)
                self._taking.catch_up(answer, peer)
                break
            if answer.message != told:
                _LOG.warning("peer %s: %s; asked on", peer, answer.message)
                told = answer.message
            await asyncio.sleep(delay)
            delay = min(delay * 2, LAST_RETRY_SECONDS)
        self._set([one for one in self._taking.unheard_peers if one != peer])

    def _set(self, unheard: Iterable[str]) -> None:
        self._taking.unheard_peers = tuple(unheard)
        _write_unheard(self._state, self._taking.unheard_peers)


async def _ask_all(clients: Iterable[Client]) -> list[Overrides | HandoffError]:
    return await asyncio.gather(*map(_ask, clients))


def _run(asking: Coroutine[Any, Any, T]) -> T:
    """Not with `asyncio.run`, which waits for a thread that hangs in the lookup of a name."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(asking)
    finally:
        loop.close()


async def _ask(client: Client) -> Overrides | HandoffError:
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            found = await client.overrides(ANSWER_SECONDS)
    except TimeoutError:
        return HandoffError(f"balancer {client.name}: no answer within {ANSWER_SECONDS:g} s")
    except HandoffError as error:
        return error
    finally:
        await client.aclose()
    if found.version != VERSION:
        return HandoffError(
            f"balancer {client.name}: overrides of version {found.version}; this release knows {VERSION}"
        )
    return found


def _client(balancer: Balancer, peer: str, near: str) -> Client:
    """Without a token of its own the peer is asked with ours: a pair shares one. Raises HandoffError."""
    file = balancer.admin_token_file
    token = None if file is None else read_token(os.path.join(near, file))
    return client_for(peer, near, token)


def _write_unheard(state: Path, unheard: Iterable[str]) -> None:
    """Where it cannot be written, the state directory is told of as not durable anyway."""
    path = state / UNHEARD_NAME
    listed = list(unheard)
    with contextlib.suppress(OSError):
        if listed:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(path, msgspec.json.encode(listed), is_durable=False)
        else:
            path.unlink(missing_ok=True)
