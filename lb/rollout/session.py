"""One deployer at work: the file, the store, the lock, the fleet; and what each command does with them."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Collection, Iterator, Sequence

import msgspec

from handoff.errors import ExitCode, HandoffError, UsageError
from lb.core.rollout.model import Deploy, Host
from lb.core.rollout.plan import Plan, Seen, filled, pooled, rolling, values_of
from lb.core.rollout.progress import Run, Verdict, tried_again
from lb.core.rollout.returning import go_back
from lb.rollout.balancers import client_for
from lb.rollout.fleet import Fleet
from lb.rollout.journal import Journal
from lb.rollout.report import Report
from lb.rollout.runner import STORE_RETRY_SECONDS, Runner
from lb.rollout.stores import Lease, Locked, RemoteStore, Store, StoreError, open_store
from lb.rollout.transport import transport_for

STORE_SECONDS = 45.0
"""For one call of a store that a balancer or a host keeps."""


class Session:
    """What a command of `handoff deploy` works with. Make it with `opened`."""

    def __init__(self, deploy: Deploy, store: Store, fleet: Fleet, report: Report) -> None:
        self.deploy, self.store, self.fleet, self.report = deploy, store, fleet, report
        self.journal = Journal(store, deploy.service)
        self._lease: Lease | None = None

    # --- looking ----------------------------------------------------------------------------------------------------

    async def plan(self, version: str) -> tuple[Seen, Plan]:
        """What a rollout of the version would do, as things stand."""
        versions = await asyncio.to_thread(self.journal.versions)
        seen = await self.fleet.look(versions, self._current)
        make = rolling if self.deploy.strategy == "rolling" else pooled
        return seen, make(self.deploy, version, self.deploy.balancers, seen)

    def _current(self, host: Host) -> str | None:
        """The command that tells which version it has."""
        return None if self.deploy.current is None else filled(self.deploy.current, values_of(host, ""))

    async def latest(self) -> Run:
        """Raises HandoffError where there is none."""
        name = await asyncio.to_thread(self.journal.latest)
        if name is None:
            raise HandoffError(f"service {self.deploy.service}: no rollout yet", exit_code=ExitCode.NO_SUCH_SERVICE)
        return await asyncio.to_thread(self.journal.run, name)

    async def is_at_work(self) -> bool:
        """Somebody has the lock."""
        return await asyncio.to_thread(self.store.holder, self.journal.lock_name) is not None

    # --- doing ------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def locked(self) -> AsyncIterator[Lease]:
        """The lock of the service. Raises Locked."""
        name, seconds = self.journal.lock_name, self.deploy.lock_seconds
        self._lease = await asyncio.to_thread(self.store.lock, name, owner(), seconds)
        try:
            yield self._lease
        finally:
            with contextlib.suppress(HandoffError):  # it ends by itself
                await asyncio.to_thread(self.store.release, self._lease)

    async def _locked_anew(self) -> Lease:
        """With a token of its own. A store that does not answer is asked again, as long as the lease was to last.

        Raises Locked where somebody has come in between, who goes on then; StoreError.
        """
        assert self._lease is not None
        name, former = self.journal.lock_name, self._lease
        ours = f"{owner()}, on the way back {os.urandom(4).hex()}"  # so that we know a lock whose answer was lost
        deadline = time.monotonic() + former.seconds
        while True:
            try:
                await asyncio.to_thread(self.store.release, former)
                self._lease = await asyncio.to_thread(self.store.lock, name, ours, self.deploy.lock_seconds)
                return self._lease
            except Locked as error:
                if error.holder.owner != ours:
                    raise
                self._lease = Lease(name, ours, error.holder.token, self.deploy.lock_seconds)
                return self._lease
            except StoreError:
                if time.monotonic() >= deadline:
                    raise
            await asyncio.sleep(STORE_RETRY_SECONDS)

    async def begin(self, version: str, without: Collection[str] = ()) -> Run:
        """A new run of this version. Raises HandoffError where another one is not finished."""
        await self._refuse_unfinished()
        left_out = self._left_out(self.deploy, without)
        used = self._without(left_out)
        seen, plan = await Session(used, self.store, Fleet.like(self.fleet, used), self.report).plan(version)
        return self._run("deploy", version, plan, seen, left_out)

    async def begin_rollback(self, without: Collection[str] = ()) -> Run:
        """A run that leads back behind the newest one that was committed."""
        await self._refuse_unfinished()
        left_out = self._left_out(self.deploy, without)
        used = self._without(left_out)
        runs = await asyncio.to_thread(self.journal.runs)
        committed = [one for one in runs if one.verdict is Verdict.COMMITTED]
        versions = await asyncio.to_thread(self.journal.versions)
        seen = await Fleet.like(self.fleet, used).look(versions, self._current)
        version, plan = go_back(used, committed, seen)
        return self._run("rollback", version, plan, seen, left_out)

    async def work(self, lease: Lease, run: Run, is_new: bool, aborted_by: str | None = None) -> Verdict:
        """To its verdict. Signals stop it at a safe point."""
        if is_new:
            await asyncio.to_thread(self.journal.begin, lease, run)
            records = {}
        else:
            await asyncio.to_thread(self.journal.clear_request, lease)
            await asyncio.to_thread(self.journal.save, lease, run)
            records = await asyncio.to_thread(self.journal.records, run.id)
        fleet = Fleet.like(self.fleet, run.deploy)
        runner = Runner(run, records, self.store, lease, fleet, self.report, self._locked_anew)
        if aborted_by is not None:
            runner.abort(aborted_by)
        try:
            with _signals(runner):
                verdict = await runner.work()
        finally:
            self.report.close()
        note = f": {runner.run.note}" if runner.run.note else ""
        self.report.says(f"{run.deploy.service}: {run.kind} of {run.version}: {verdict.value}{note}")
        return verdict

    async def resumable(self, without: Collection[str]) -> Run:
        """The newest run, to go on with; if it stopped, with what failed. Raises HandoffError where it is over."""
        run = await self.latest()
        if without:
            run = msgspec.structs.replace(run, without={**run.without, **self._left_out(run.deploy, without)})
        if run.verdict is None:
            return run
        if run.verdict is Verdict.PARTIAL:
            return tried_again(run)
        raise HandoffError(
            f"rollout {run.id} of {run.deploy.service}: {run.verdict.value}, nothing to resume", ExitCode.REFUSED
        )

    async def _refuse_unfinished(self) -> None:
        name = await asyncio.to_thread(self.journal.latest)
        if name is None:
            return
        run = await asyncio.to_thread(self.journal.run, name)
        if run.verdict is None:
            raise HandoffError(
                f"rollout {run.id} of {run.deploy.service} to {run.version}, begun by {run.who}, is not finished; "
                f"handoff deploy resume, or abort",
                ExitCode.REFUSED,
            )

    def _left_out(self, deploy: Deploy, without: Collection[str]) -> dict[str, str]:
        """And by whom. Raises UsageError."""
        for one in without:
            if one not in deploy.balancers:
                raise UsageError(f"--without-balancer {one}: there are {', '.join(deploy.balancers) or 'none'}")
        return dict.fromkeys(without, owner())

    def _without(self, left_out: Collection[str]) -> Deploy:
        kept = tuple(one for one in self.deploy.balancers if one not in left_out)
        return msgspec.structs.replace(self.deploy, balancers=kept)

    def _run(self, kind: str, version: str, plan: Plan, seen: Seen, left_out: dict[str, str]) -> Run:
        now = time.time()
        return Run(
            id=time.strftime("%Y%m%dT%H%M%S", time.gmtime(now)) + f"{int(now % 1 * 1e6):06d}",
            version=version,
            deploy=self.deploy,
            plan=plan,
            seen=seen,
            who=owner(),
            began_at=now,
            kind=kind,
            without=left_out,
        )


@contextlib.asynccontextmanager
async def opened(deploy: Deploy, report: Report, without: Collection[str] = ()) -> AsyncIterator[Session]:
    """The fleet and the store of the file, closed at the end. Raises HandoffError. `without`: balancers that are dead,
    and keep no store."""
    fleet = Fleet(deploy, client_for, lambda host: transport_for(host.ssh, host.handoff))
    try:
        kept = tuple(one for one in deploy.balancers if one not in without)
        if deploy.store == "balancer" and kept[:1] != deploy.balancers[:1]:
            where = f"balancer {kept[0]}" if kept else f"host {deploy.hosts[0].name}"
            report.says(f"without {deploy.balancers[0]}, which keeps the journal: {where} keeps one for now")
        store = await asyncio.to_thread(_store, deploy, kept, fleet, asyncio.get_running_loop())
        try:
            yield Session(deploy, store, fleet, report)
        finally:
            await asyncio.to_thread(store.close)
    finally:
        await fleet.aclose()


def _store(deploy: Deploy, balancers: Sequence[str], fleet: Fleet, loop: asyncio.AbstractEventLoop) -> Store:
    """As the file names it: a URL; or what the first balancer keeps, without balancers the first host."""

    async def call(request: bytes) -> bytes:
        async with asyncio.timeout(STORE_SECONDS):
            if balancers:
                return await fleet.balancer(balancers[0]).store_call(request, STORE_SECONDS)
            host = deploy.hosts[0]
            return await fleet.transport(host).request(["handoff", "host", "store"], request, STORE_SECONDS)

    def blocking(request: bytes) -> bytes:
        return asyncio.run_coroutine_threadsafe(call(request), loop).result()

    if deploy.store != "balancer":
        return open_store(deploy.store)
    keeper = f"balancer {balancers[0]}" if balancers else f"host {deploy.hosts[0].name}"
    return RemoteStore(blocking, keeper)


def owner() -> str:
    """For others to see: who, where, which process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a uid without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()} (pid {os.getpid()})"


@contextlib.contextmanager
def _signals(runner: Runner) -> Iterator[None]:
    """The first INT or TERM stops at the next safe point; a second one ends this process, and `resume` goes on."""
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        runner.stop(signal.Signals(number).name)
        loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
