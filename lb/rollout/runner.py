"""Working off a run: what comes next by the journal is journalled as begun, taken, and journalled with its outcome."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Concatenate, ParamSpec

import msgspec

from handoff.errors import ExitCode, HandoffError
from lb.core.desired import Desired
from lb.core.rollout.plan import ON_HOSTS, Kind, Step, filled
from lb.core.rollout.progress import (
    Do,
    End,
    Record,
    Run,
    State,
    TurnBack,
    Verdict,
    can_turn_back,
    how_far,
    past,
    seen_again,
    turned_back,
    unsettled,
    versions_after,
    what_next,
)
from lb.core.rollout.undo import switched_balancers
from lb.rollout.actions import Actions, Outcome, hook_environment
from lb.rollout.fleet import Fleet
from lb.rollout.journal import Journal, Request
from lb.rollout.local import command_here
from lb.rollout.report import Report
from lb.rollout.stores.base import Fenced, Lease, Store, StoreError

P = ParamSpec("P")
STORE_RETRY_SECONDS = 1.0
REQUEST_SECONDS = 2.0
"""How often the requests of others are looked for, while something is waited for."""


class Stopped(Exception):
    """A wait was left, as the run is to pause or to be aborted."""


class Paused(HandoffError):
    """The run stands at a safe point; somebody goes on with it."""

    def __init__(self, run: Run, why: str) -> None:
        super().__init__(f"rollout {run.id} is paused: {why}; go on with handoff deploy resume", ExitCode.ABORTED)


class Runner:
    """One deployer at work on one run, with the lock. Borrows the store and the fleet."""

    def __init__(
        self,
        run: Run,
        records: dict[str, Record],
        store: Store,
        lease: Lease,
        fleet: Fleet,
        report: Report,
        locked_anew: Callable[[], Awaitable[Lease]],
    ) -> None:
        self.run = run
        self._records = seen_again(run, records)
        self._store, self._lease, self._fleet, self._report = store, lease, fleet, report
        self._journal = Journal(store, run.deploy.service)
        self._actions = Actions(fleet, lease.token, self._sleep)
        self._locked_anew, self._leasing = locked_anew, asyncio.Lock()
        self._stopping = asyncio.Event()
        self._request: Request | None = None
        self._parallel = asyncio.Semaphore(run.deploy.parallel)
        self._writing, self._unwritten = asyncio.Lock(), list[Record]()

    def stop(self, why: str) -> None:
        """From a signal: at the next safe point."""
        self._request = Request(run=self.run.id, wants="pause", who=why)
        self._stopping.set()
        self._report.says(f"{why}: stops at the next safe point; a second one ends this deployer at once")

    def abort(self, who: str) -> None:
        """Lead back, in place of going on."""
        self._request = Request(run=self.run.id, wants="abort", who=who)
        self._stopping.set()

    async def work(self) -> Verdict:
        """To the verdict. Raises Paused, Fenced, StoreError: the run is not over then, and `resume` goes on."""
        working = asyncio.ensure_future(self._work())
        helpers = [asyncio.ensure_future(self._renew()), asyncio.ensure_future(self._listen())]
        try:
            await asyncio.wait((working, *helpers), return_when=asyncio.FIRST_COMPLETED)
            for helper in helpers:
                if helper.done() and not working.done():
                    helper.result()  # raises: they have no other end
            return await working
        finally:
            for task in (working, *helpers):
                task.cancel()
            await asyncio.gather(working, *helpers, return_exceptions=True)

    async def _work(self) -> Verdict:
        if self.run.back is not None:
            await self._desire_former()
        while True:
            if self._request is not None and await self._obeyed(self._request):
                continue
            match what_next(self.run, self._records):
                case Do(title, steps):
                    with contextlib.suppress(Stopped):
                        await self._do(title, steps)
                case TurnBack(reason):
                    await self._turn_back(reason)
                case End(verdict, note):
                    return await self._end(verdict, note)

    async def _obeyed(self, request: Request) -> bool:
        """True: something was done for it. Raises Paused."""
        if request.wants == "pause":
            raise Paused(self.run, f"by {request.who}")
        self._request = None
        self._stopping.clear()
        if self.run.back is not None:
            return False
        if not can_turn_back(self.run, self._records):
            self._report.says("not aborted: the old pool is being retired already")
            return False
        open_steps = unsettled(self.run, self._records)
        if open_steps is not None:
            await self._do(open_steps.title, open_steps.steps)
        await self._turn_back(f"aborted by {request.who}", is_aborted=True)
        return True

    async def _turn_back(self, reason: str, is_aborted: bool = False) -> None:
        self._report.says(f"back: {reason}")
        self.run = turned_back(self.run, self._records, reason, is_aborted)
        await self._kept(self._journal.save, self.run)
        # What is still on its way to a host or a balancer, and what still runs there, is of an older token from now on.
        async with self._leasing:
            self._lease = await self._locked_anew()
        self._actions = Actions(self._fleet, self._lease.token, self._sleep)
        await self._desire_former()

    async def _desire_former(self) -> None:
        """Also of those balancers that are not there."""
        if switched_balancers(self.run.plan, past(self._records)) and self.run.seen.active is not None:
            await self._kept(self._journal.write, self.run, [], self._desired(self.run.seen.active, 100))

    def _desired(self, pool: str, percent: int) -> Desired:
        who, why = f"rollout {self.run.id}", f"{self.run.kind} {self.run.version}"
        return Desired(pool=pool, percent=percent, token=self._lease.token, who=who, why=why)

    async def _end(self, verdict: Verdict, note: str) -> Verdict:
        self.run = msgspec.structs.replace(self.run, verdict=verdict, note=note, ended_at=time.time())
        versions = versions_after(self.run, self._records)
        if verdict is Verdict.PARTIAL:  # who failed on the way may have the one or the other
            failed = {one.step for one in self._records.values() if one.state is not State.DONE}
            steps = [step for group in (*self.run.plan, *(self.run.back or ())) for step in group.steps]
            versions |= {step.host: "" for step in steps if step.kind in ON_HOSTS and step.id in failed}
        await self._kept(self._journal.end, self.run, versions)
        await self._after()
        return verdict

    async def _after(self) -> None:
        if self.run.deploy.after is None:
            return
        command = filled(self.run.deploy.after, {"version": self.run.version})
        environment = hook_environment(self.run, self._lease.token)
        try:
            code, output = await command_here(command, environment, self.run.deploy.step_timeout_seconds)
        except TimeoutError:
            code, output = -1, "it took too long"
        if code != 0:
            self._report.says(f"after: exited with status {code}; the verdict stands\n{output}".rstrip())

    # --- steps ------------------------------------------------------------------------------------------------------

    async def _do(self, title: str, steps: Sequence[Step]) -> None:
        """Side by side. Raises Stopped when one of them was left; the others have come to their end then."""
        self._report.begins(title, steps, how_far(self.run, self._records))
        now = time.time()
        begun = [Record(step=one.id, state=State.BEGUN, attempt=self.run.attempt, at=now) for one in steps]
        switch = next((one for one in steps if one.kind is Kind.SWITCH), None)
        desired = None if switch is None else self._desired(switch.pool, switch.percent)
        await self._kept(self._journal.write, self.run, begun, desired)
        self._records.update({one.step: one for one in begun})
        results = await asyncio.gather(*(self._take(one) for one in steps), return_exceptions=True)
        failures = [one for one in results if isinstance(one, BaseException)]
        for failure in sorted(failures, key=lambda one: isinstance(one, Stopped)):  # the worst first
            raise failure

    async def _take(self, step: Step) -> None:
        async with self._parallel:
            outcome = await self._actions.take(step, self.run, self._records)
        record = self._record(step, outcome)
        await self._write(record)
        self._records[step.id] = record
        self._report.ended(step, record)
        if outcome.output and not outcome.is_good:
            self._report.output(step, outcome.output)

    def _record(self, step: Step, outcome: Outcome) -> Record:
        return Record(
            step=step.id,
            state=State.DONE if outcome.is_good else State.FAILED,
            attempt=self.run.attempt,
            at=time.time(),
            note=outcome.note,
            revision=outcome.revision,
            is_overtaken=outcome.is_overtaken,
        )

    async def _write(self, record: Record) -> None:
        """What comes while another one is being written is written with the next, together."""
        self._unwritten.append(record)
        async with self._writing:
            if record in self._unwritten:
                records, self._unwritten = self._unwritten, []
                await self._kept(self._journal.write, self.run, records)

    async def _kept(self, write: Callable[Concatenate[Lease, P], None], *arguments: P.args, **named: P.kwargs) -> None:
        """Written down. Each of our writes may be made twice: a store that does not answer is asked again, as long as
        the lease may last. Raises Fenced, StoreError."""
        deadline = time.monotonic() + self._lease.seconds
        for attempt in itertools.count():
            try:
                await asyncio.to_thread(write, self._lease, *arguments, **named)
                return
            except StoreError as error:
                if time.monotonic() >= deadline or self._stopping.is_set():
                    raise
                if not attempt:
                    self._report.says(f"{error.message}; asked again for {self._lease.seconds:g} s")
            await asyncio.sleep(STORE_RETRY_SECONDS)

    async def _sleep(self, seconds: float) -> None:
        """Raises Stopped."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)
            raise Stopped

    # --- beside it --------------------------------------------------------------------------------------------------

    async def _renew(self) -> None:
        """Hold the lock. Raises Fenced where it is lost, StoreError where the store was gone for a whole lease."""
        held_until = time.monotonic() + self._lease.seconds
        while True:
            await asyncio.sleep(self._lease.seconds / 4)
            try:
                async with self._leasing:
                    asked_at = time.monotonic()
                    await asyncio.to_thread(self._store.renew, self._lease)
                    held_until = asked_at + self._lease.seconds
            except Fenced:
                raise
            except StoreError:
                if time.monotonic() >= held_until:
                    raise

    async def _listen(self) -> None:
        """For the requests of others."""
        while True:
            with contextlib.suppress(StoreError):  # the work itself will say so
                request = await asyncio.to_thread(self._journal.request, self.run.id)
                if request is not None and self._request is None and not self._is_old(request):
                    self._request = request
                    self._stopping.set()
            await asyncio.sleep(REQUEST_SECONDS)

    def _is_old(self, request: Request) -> bool:
        """An abort is obeyed once; a pause that was resumed is over: `resume` takes it out of the store."""
        return request.wants == "abort" and self.run.back is not None
