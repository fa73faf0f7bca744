"""The controller: it holds the three layers, makes the table of them whenever one has changed, and sends it around."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from handoff.addresses import parse_bind
from lb.control.catching_up import LateAnswers
from lb.control.files import boot_id, run_id, write_atomically
from lb.control.names import Names
from lb.control.probes import Probes
from lb.control.relays import Relays
from lb.control.resolver import Resolver
from lb.control.store import Store
from lb.control.stored import (
    BEAT_SECONDS,
    MEMORY_NAME,
    Memory,
    at_start,
    fingerprint,
    offset_of,
    read_memory,
    read_table,
)
from lb.core.catching_up import caught_up
from lb.core.compose import Leaving, Observed, Present, Record, compose, present_backends, recorded
from lb.core.ejection import EjectionRecord, EjectionRules, Ejections
from lb.core.model import Balancer, Service
from lb.core.naming import Answer, is_called_by_name
from lb.core.overrides import Overrides, expired, later, next_expiry, retired, settled
from lb.core.standing import Administrative
from lb.core.table import Closing, Endpoint, Table
from lb.core.wire import TABLE_NAME
from lb.own_addresses import is_own_address, is_vague, own_addresses
from lb.page import CURRENT, Page

TICK_SECONDS = 1.0
MAXIMUM_TIMER_SECONDS = 600.0
"""The wall clock may be set meanwhile: it is looked at again."""

RECONNECT_SECONDS = 3.0
"""Relay workers that run have found a new controller by then."""

_LOG = logging.getLogger("handoff.lb")


class Controller:
    """Made on a running loop. Borrows the store, the page and the relay workers."""

    def __init__(
        self,
        balancer: Balancer,
        generation: int,
        directory: Path,
        store: Store,
        page: Page,
        relays: Relays,
        resolver: Resolver | None = None,
    ) -> None:
        self.generation = generation
        self.file: str | None = None
        """What the service runs; None: what was typed."""
        self.unheard_peers: tuple[str, ...] = ()
        """Those that have not answered since the start."""
        self._resolver = resolver or Resolver()
        self.store, self.page, self.relays = store, page, relays
        self._directory = directory
        self._base, self._run = fingerprint(balancer), run_id()
        memory, last = read_memory(directory), read_table(directory)
        is_own = memory is not None and memory.is_of(balancer, generation)
        self.applied = memory.applied if memory is not None and is_own else None
        self.balancer = self.applied or balancer
        self.wall_offset = offset_of(memory, time.time() - time.monotonic())
        saved = store.load()
        found = later(saved, memory.unsaved if memory is not None else None)
        self.overrides = at_start(found, self.balancer, memory, store.directory, self.wall())
        if self.overrides != saved:
            store.save(self.overrides)
        self._hold(self._settled(self.overrides))
        self.records: dict[str, Record] = dict(memory.records) if memory is not None else {}
        self.leaving: dict[str, Leaving] = dict(memory.leaving) if memory is not None else {}
        self.answers: dict[str, Answer] = dict(memory.answers) if memory is not None else {}
        """What names stand for, by the address as typed."""
        self.ejections: dict[str, Ejections] = {}
        self._remembered_ejections = dict(memory.ejections) if memory is not None else {}
        revision = last.revision if last is not None and last.generation == generation else 0
        routes = last.routes if last is not None and memory is not None else {}
        self.table = Table(generation=generation, revision=revision, routes=routes)
        self.present: dict[str, Present] = {}
        self.departure_seconds: dict[str, float | None] = {}
        """Of backends that are to be removed: until what they have is closed, where it is not as configured."""
        self._left_at: dict[str, int] = {}
        self._left: set[str] = set()
        """Gone for good: the next table is without them."""
        self._is_start = memory is None
        self._is_stirred = False
        self._timer: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()
        self._kept: frozenset[str] | None = None
        self._written_at = 0.0
        self._has_file_problem = False
        self._all_deadline = time.monotonic() + RECONNECT_SECONDS
        self.probes: Probes | None = None
        self.names: Names | None = None
        relays.watcher = self

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Publish the first table, and begin with the checks. Their tasks, and ours, are of the group."""
        self.probes = Probes(tasks, self.records, self._find, self.refresh)
        self.names = Names(tasks, self._resolver, self.refresh, self.is_own)
        self.names.answers = self.answers
        self.page.sweep()
        self.publish(is_forced=True)
        self._is_start = False
        tasks.create_task(self._tick())
        tasks.create_task(self.store.keep_trying())
        LateAnswers(tasks, self, self.store.directory)

    def end(self) -> None:
        """What was observed is kept for the successor."""
        self._remember()
        self._resolver.close()
        if self.probes is not None:
            self.probes.close()
        if self._timer is not None:
            self._timer.cancel()

    # --- what others ask --------------------------------------------------------------------------------------------

    @property
    def has_begun(self) -> bool:
        """There is a table."""
        return self.probes is not None

    def service(self, name: str) -> Service | None:
        return next((service for service in self.balancer.services if service.name == name), None)

    def hurry(self, identity: str) -> None:
        """Have it checked, as soon as that may be."""
        if self.probes is not None:
            self.probes.hurry(identity)

    def passed_since(self, identity: str) -> float:
        """When the latest check began, if it passed; monotonic."""
        return self.probes.passed_from.get(identity, 0.0) if self.probes is not None else 0.0

    def connections(self, identity: str) -> int:
        return self.page.sums(identity)[CURRENT]

    def wall(self) -> float:
        """The time of changes and deadlines: as the wall clock was when this generation began, and monotonic since."""
        return time.monotonic() + self.wall_offset

    async def changed(self) -> None:
        """Until something has."""
        await self._changed.wait()

    async def wait_for(self, is_done: Callable[[], bool], timeout: float) -> bool:
        """Whether it was done in time."""
        try:
            async with asyncio.timeout(timeout):
                while not is_done():
                    await self.changed()
        except TimeoutError:
            return is_done()
        return True

    async def all_taken(self, revision: int, timeout: float) -> bool:
        """Every relay worker that was ever connected, and lives, has this table, or a later one. Shortly after our
        start those count as well that are yet to connect."""

        def is_done() -> bool:
            if self.behind(revision):
                return False
            return self._has_all() or time.monotonic() >= self._all_deadline

        if not self._has_all():
            delay = self._all_deadline - time.monotonic()
            asyncio.get_running_loop().call_later(max(delay, 0.0), self._notify)
        return await self.wait_for(is_done, timeout)

    def behind(self, revision: int) -> list[int]:
        """The pids of those that may go by an older table: also of one that has lost its connection to us."""
        connected = {peer.row for peer in self.relays.connected}
        lost = [pid for row, pid in self.relays.seen.items() if row not in connected and self.page.owner(row) == pid]
        return [*(peer.pid for peer in self.relays.behind(revision)), *lost]

    def _has_all(self) -> bool:
        return set(self.page.rows()) <= {peer.row for peer in self.relays.connected}

    # --- changing ---------------------------------------------------------------------------------------------------

    def override(self, overrides: Overrides) -> int:
        """These hold from now on. Returns the revision of the table that says so, which is on its way."""
        self._hold(overrides)
        return self.publish()

    def catch_up(self, theirs: Overrides, peer: str) -> None:
        """A peer that was silent when we started is there now; what is newer with it holds from now on."""
        overrides, notes = caught_up(self.overrides, theirs, self.balancer.services, peer, is_new=False)
        for note in notes:
            _LOG.info("%s", note)
        self.override(overrides)

    def apply(self, balancer: Balancer) -> tuple[int, tuple[str, ...]]:
        """Another configuration in place of the present one, and notes about overrides that it contradicts."""
        self.balancer = self.applied = balancer
        overrides, notes = settled(self.overrides, balancer, self.wall())
        revision = self.override(overrides)
        self._remember()
        return revision, notes

    def refresh(self) -> None:
        """Something was observed: publish in the next turn of the loop, once for all of this one."""
        if not self._is_stirred:
            self._is_stirred = True
            asyncio.get_running_loop().call_soon(self.publish)

    def publish(self, is_forced: bool = False) -> int:
        """Make the table; where it is another one than the last, write it and send it around. Returns its revision."""
        self._is_stirred = False
        now = time.monotonic()
        self._expire()
        observed = self._observe(now)
        table = compose(
            self.balancer,
            self.overrides,
            observed,
            generation=self.generation,
            revision=self.table.revision,
            wall_offset=self.wall_offset,
        )
        if is_forced or table.routes != self.table.routes:
            self.table = msgspec.structs.replace(table, revision=table.revision + 1)
            self._remember()
            self._write(TABLE_NAME, msgspec.json.encode(self.table))
            self.relays.send(self.table)
            self._left.clear()
        elif self.store.problem is not None:
            self._remember()
        self._check_and_ask()
        self._arm(now)
        self._notify()
        return self.table.revision

    # --- what relay workers tell ------------------------------------------------------------------------------------

    def relay_failed(self, identity: str, reason: str) -> None:
        one = self.present.get(identity)
        service = self.service(one.service) if one is not None else None
        if one is None or service is None:
            return
        self.hurry(identity)
        if service.ejection.failures == 0:
            return
        now = time.monotonic()
        wanted = sum(
            other.standing.administrative is Administrative.READY
            for other in self.present.values()
            if (other.service, other.pool) == (one.service, one.pool)
        )
        until = self._ejections(service, one.pool).failed(identity, wanted, now)
        if until is not None:
            _LOG.warning("%s ejected for %.0f s (%s)", one.key, until - now, reason)
            self.refresh()

    def relay_recovered(self, identity: str) -> None:
        one = self.present.get(identity)
        service = self.service(one.service) if one is not None else None
        if one is not None and service is not None:
            self._ejections(service, one.pool).succeeded(identity)

    def relays_changed(self) -> None:
        self._notify()

    def relay_is_ahead(self, revision: int) -> None:
        self.table = msgspec.structs.replace(self.table, revision=max(revision, self.table.revision))
        self.publish(is_forced=True)

    def process_ended(self) -> None:
        self.page.sweep()
        self._notify()

    # --- what is observed -------------------------------------------------------------------------------------------

    def _find(self, identity: str) -> tuple[Present, Service] | None:
        one = self.present.get(identity)
        service = self.service(one.service) if one is not None else None
        return (one, service) if one is not None and service is not None else None

    async def listeners_known(self) -> None:
        """Where the file does not tell it, a relay worker does: wait for one, shortly after our start."""
        listeners = own_addresses(self.balancer.services, None, None)
        if any(map(is_vague, listeners)):
            await self.wait_for(lambda: bool(self.relays.bound), max(0.0, self._all_deadline - time.monotonic()))

    def is_own(self, address: str) -> bool:
        """What is sent there comes back to us."""
        return is_own_address(self.balancer, parse_bind(address), ".", self.relays.bound)

    def _expire(self) -> None:
        overrides, notes = expired(self.overrides, time.time())
        for note in notes:
            _LOG.info("%s", note)
        self._hold(overrides)

    def _observe(self, now: float) -> Observed:
        """What is known of those that are present, with all that follows from who came and who went."""
        ejected = frozenset(one for each in self.ejections.values() for one in each.ejected(now))
        if self._remembered_ejections:
            ejected |= self._restored_ejections(now)
        observed = Observed(records=self.records, ejected=ejected, answers=self.answers)
        self.present = present_backends(self.balancer, self.overrides, observed, self.wall_offset)
        self._depart(now)
        for identity, one in self.present.items():
            self.records[identity] = recorded(self.records.get(identity), one.standing, now, is_start=self._is_start)
        for identity in [identity for identity in self.records if identity not in self.present]:
            del self.records[identity]
        for each in self.ejections.values():
            each.keep_only(frozenset(self.present))
        return msgspec.structs.replace(observed, leaving=self.leaving)

    def _depart(self, now: float) -> None:
        """Who was in the last table and is not present any more keeps what it has, and gets nothing new."""
        gone = []
        for route in self.table.routes.values():
            service = self.service(route.service)
            for pool, endpoints in route.pools.items():
                for one in endpoints:
                    if one.identity in self.present or one.identity in self.leaving or one.identity in self._left:
                        continue
                    if is_called_by_name(one.address):  # nobody was ever connected to it
                        continue
                    gone.append(one.identity)
                    if service is not None:
                        self._left_at.pop(one.identity, None)
                        leaving = self._leaving(one, service, now)
                        self.leaving[one.identity] = Leaving(service=service.name, pool=pool, endpoint=leaving)
        self._hold(retired(self.overrides, gone))

    def _leaving(self, one: Endpoint, service: Service, now: float) -> Endpoint:
        seconds = self.departure_seconds.pop(one.identity, None)
        seconds = service.timeouts.drain_seconds if seconds is None else seconds
        closing = one.closing
        if closing is None and seconds is not None:
            closing = Closing(at=now + seconds, spread_seconds=service.timeouts.spread_seconds)
        return msgspec.structs.replace(one, is_eligible=False, is_awaited=False, closing=closing)

    def _ejections(self, service: Service, pool: str) -> Ejections:
        said = service.ejection
        rules = EjectionRules(said.failures, said.base_seconds, said.maximum_seconds, said.maximum_percent / 100)
        found = self.ejections.setdefault(f"{service.name}/{pool}", Ejections(rules))
        found.rules = rules
        return found

    def _restored_ejections(self, now: float) -> frozenset[str]:
        """Of before our start."""
        remembered, self._remembered_ejections = self._remembered_ejections, {}
        for service in self.balancer.services:
            for pool in service.pools:
                records = remembered.get(f"{service.name}/{pool}")
                if records:
                    self._ejections(service, pool).records.update(records)
        return frozenset(one for each in self.ejections.values() for one in each.ejected(now))

    def _settled(self, found: Overrides) -> Overrides:
        overrides, notes = settled(found, self.balancer, self.wall())
        for note in notes:
            _LOG.warning("%s", note)
        return overrides

    def _hold(self, overrides: Overrides) -> None:
        """These hold from now on. Where the disk does not take them, the next table's `_remember` keeps them."""
        if overrides == self.overrides:
            return
        self.overrides = msgspec.structs.replace(overrides, number=self.overrides.number + 1)
        self.store.save(self.overrides)

    # --- what follows -----------------------------------------------------------------------------------------------

    def _check_and_ask(self) -> None:
        if self.probes is None or self.names is None:
            return
        self.probes.ask_only(self.present, {one.name: one for one in self.balancer.services}, self.overrides)
        typed = [
            backend.address
            for service in self.balancer.services
            for backends in service.pools.values()
            for backend in backends
        ]
        typed += [added.backend.address for added in self.overrides.added.values()]
        self.names.ask_only(typed, self.balancer.resolve_interval_seconds, self.balancer.resolve_family)

    def _arm(self, now: float) -> None:
        """The next thing that happens by itself: an ejection, or an override, is over."""
        deadlines = [one for each in self.ejections.values() if (one := each.next_deadline()) is not None]
        seconds = [one - now for one in deadlines]
        expiry = next_expiry(self.overrides)
        if expiry is not None:
            seconds.append(expiry - time.time())
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if seconds:
            delay = min(max(min(seconds), 0.001), MAXIMUM_TIMER_SECONDS)
            self._timer = asyncio.get_running_loop().call_later(delay, self.publish)

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._forget_left()
            if self._has_file_problem or time.monotonic() - self._written_at > BEAT_SECONDS:
                self._remember()
            if self._has_file_problem:
                self._write(TABLE_NAME, msgspec.json.encode(self.table))
            self._free_columns()

    def _forget_left(self) -> None:
        """Who left is gone when nothing new can come to it any more, and nothing is left."""
        for identity in list(self.leaving):
            revision = self._left_at.setdefault(identity, self.table.revision)
            if not self.behind(revision) and self.connections(identity) == 0:
                del self.leaving[identity], self._left_at[identity]
                self._left.add(identity)
                self.refresh()

    def _free_columns(self) -> None:
        """Only where every relay worker is known to have the table."""
        if self.behind(self.table.revision) or not self._has_all():
            return
        identities = frozenset(
            one.identity
            for route in self.table.routes.values()
            for endpoints in route.pools.values()
            for one in endpoints
        )
        if identities != self._kept:
            self.page.keep_only(identities)
            self._kept = identities

    def _remember(self) -> None:
        ejections: dict[str, dict[str, EjectionRecord]] = {
            pool: dict(each.records) for pool, each in self.ejections.items() if each.records
        }
        memory = Memory(
            boot=boot_id(),
            run=self._run,
            generation=self.generation,
            base=self._base,
            applied=self.applied,
            written_at=time.monotonic(),
            wall_offset=self.wall_offset,
            records=self.records,
            ejections=ejections,
            leaving=self.leaving,
            answers=self.answers,
            unsaved=self.overrides if self.store.problem is not None else None,
        )
        self._written_at = memory.written_at
        self._write(MEMORY_NAME, msgspec.json.encode(memory))

    def _write(self, name: str, data: bytes) -> None:
        try:
            write_atomically(self._directory / name, data, is_durable=False)
        except OSError as error:
            if not self._has_file_problem:
                _LOG.error("%s cannot be written: %s", self._directory / name, error.strerror)
            self._has_file_problem = True
        else:
            self._has_file_problem = False
