"""What a controller leaves behind in files, and the table that is made of it at the start.

In the state directory: the overrides, which outlive a reboot. In the runtime directory: the last table, and what was
observed. The latter is of use to a successor of the same boot, and for so long as it is fresh.
"""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path

import msgspec

from lb.control.files import boot_id, read_decoded, run_id
from lb.core.compose import Leaving, Observed, Record, compose
from lb.core.desired import Wanted, taken
from lb.core.ejection import EjectionRecord
from lb.core.model import Balancer
from lb.core.naming import Answer
from lb.core.overrides import VERSION, Overrides, expired, later, settled
from lb.core.table import Table
from lb.core.wire import TABLE_NAME

OVERRIDES_NAME = "overrides.json"
MEMORY_NAME = "observed.json"
DESIRED_NAME = "desired.json"
"""What rollouts wanted when the balancer was last started, or reloaded."""
FRESH_SECONDS = 300.0
"""What was observed longer ago, and not confirmed since, is of an earlier run: it counts for nothing."""
BEAT_SECONDS = 10.0
"""So often a controller confirms it."""

_LOG = logging.getLogger("handoff.lb")


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """What a controller knows that stands nowhere else."""

    boot: str
    run: str
    """`run_id` of the master."""
    generation: int
    base: str
    """`fingerprint` of the configuration of this generation."""
    applied: Balancer | None
    """What took its place since."""
    written_at: float
    """Monotonic."""
    wall_offset: float
    """The wall clock less the monotonic one, as this generation has it."""
    records: dict[str, Record]
    ejections: dict[str, dict[str, EjectionRecord]]
    """By `SERVICE/POOL`, then identity."""
    leaving: dict[str, Leaving]
    answers: dict[str, Answer] = {}
    """What names stand for."""
    unsaved: Overrides | None = None
    """Overrides that hold, and could not be made durable."""

    def observed(self, now: float) -> Observed:
        out = {
            identity
            for records in self.ejections.values()
            for identity, record in records.items()
            if record.until is not None and record.until > now
        }
        return Observed(records=self.records, ejected=frozenset(out), leaving=self.leaving, answers=self.answers)

    def is_of(self, balancer: Balancer, generation: int) -> bool:
        """It is of the same run and generation of the service: of a controller that ours takes the place of."""
        is_same = self.generation == generation and self.run == run_id()
        return is_same and self.base == fingerprint(balancer)


_MEMORY = msgspec.json.Decoder(Memory)
_OVERRIDES = msgspec.json.Decoder(Overrides)
_TABLE = msgspec.json.Decoder(Table)
_WANTED = msgspec.json.Decoder(list[Wanted])


def initial_table(balancer: Balancer, generation: int, runtime_directory: Path, state_directory: Path) -> Table:
    """The table to begin with, before a controller has sent one; the next one it sends is newer, or the same.

    Health that is known is taken over; what was never checked is awaited. Raises nothing for what is in the files.
    """
    memory = read_memory(runtime_directory)
    last = read_table(runtime_directory)
    if memory is not None and last is not None and memory.is_of(balancer, generation):
        if last.generation == generation:
            return last
        balancer = memory.applied or balancer
    now, wall = time.monotonic(), time.time()
    saved = later(read_overrides(state_directory), memory.unsaved if memory is not None else None)
    found = at_start(saved, balancer, memory, state_directory, wall)
    overrides, _ = settled(expired(found, wall)[0], balancer, wall)
    observed = memory.observed(now) if memory is not None else Observed()
    return compose(
        balancer, overrides, observed, generation=generation, revision=0, wall_offset=offset_of(memory, wall - now)
    )


def at_start(
    overrides: Overrides, balancer: Balancer, memory: Memory | None, state_directory: Path, now: float
) -> Overrides:
    """Who was not there takes what was decided meanwhile. Who was has been told, or is about to be."""
    if balancer.desired is None or (memory is not None and memory.run == run_id()):
        return overrides
    return taken(overrides, balancer, read_decoded(state_directory / DESIRED_NAME, _WANTED.decode) or (), now)


def fingerprint(balancer: Balancer) -> str:
    return hashlib.blake2b(msgspec.json.encode(balancer), digest_size=16).hexdigest()


def offset_of(memory: Memory | None, measured: float) -> float:
    """A predecessor's, so that its deadlines stay where they were."""
    return measured if memory is None else memory.wall_offset


def read_memory(runtime_directory: Path) -> Memory | None:
    """None where there is none of this boot that is fresh. Corrupt ones are logged."""
    memory = read_decoded(runtime_directory / MEMORY_NAME, _MEMORY.decode)
    if memory is None or memory.boot != boot_id():
        return None
    return memory if 0 <= time.monotonic() - memory.written_at <= FRESH_SECONDS else None


def read_table(runtime_directory: Path) -> Table | None:
    return read_decoded(runtime_directory / TABLE_NAME, _TABLE.decode)


def read_overrides(state_directory: Path) -> Overrides:
    """Empty where there are none, or they cannot be used, which is logged."""
    return read_decoded(state_directory / OVERRIDES_NAME, decode_overrides) or Overrides()


def decode_overrides(data: bytes) -> Overrides:
    """Raises msgspec.DecodeError, ValueError."""
    found = _OVERRIDES.decode(data)
    if found.version != VERSION:
        raise ValueError(f"version {found.version}; this release knows {VERSION}")
    return found
