"""Preparing a generation: paths resolved, settings read, listeners bound, before anything old is touched."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from handoff.addresses import Bind, absolute_bind, check_binds, listener_names, parse_bind
from handoff.binding import Listener
from handoff.config import DESCRIPTION, ServiceOptions, load_service_options
from handoff.core.generation import CompanionTimings, Timings
from handoff.errors import HandoffError, UsageError
from handoff.inherited import InheritedSocket, effective_binds
from handoff.listeners import ListenerSet
from handoff.resolve import companion_pins, resolve, service_changes
from handoff.settings import Launch, Pins, Settings


@dataclass(slots=True, frozen=True)
class PreparedCompanion:
    """What a companion is pinned to; its listeners are borrowed."""

    pins: Pins
    listeners: Mapping[str, Listener]

    @property
    def timings(self) -> CompanionTimings:
        settings = self.pins.settings
        return CompanionTimings(settings.boot_timeout_seconds, settings.stop_timeout_seconds)


@dataclass(slots=True, frozen=True)
class PreparedGeneration:
    """What a generation is pinned to. The listeners are the set's; this borrows them."""

    generation: int
    label: str
    pins: Pins
    listeners: Mapping[str, Listener]
    """Of its workers."""
    companions: Mapping[str, PreparedCompanion]

    @property
    def timings(self) -> Timings:
        settings = self.pins.settings
        return Timings(
            workers=settings.workers,
            surge=settings.surge,
            boot_timeout_seconds=settings.boot_timeout_seconds,
            probation_seconds=settings.probation_seconds,
            drain_timeout_seconds=settings.drain_timeout_seconds,
            stop_timeout_seconds=settings.stop_timeout_seconds,
            max_generations=settings.max_generations,
        )


class Preparer:
    """Makes generations from what the operator typed, or from the pins of an earlier one. Borrows the listener set."""

    def __init__(
        self,
        launch: Launch,
        options: ServiceOptions,
        inherited: Sequence[InheritedSocket],
        listeners: ListenerSet,
    ) -> None:
        self._launch = launch
        self._options = options
        self._inherited = inherited
        self._listeners = listeners
        self._first_settings: Settings | None = None
        listeners.adopt_inherited(inherited)

    @property
    def launch(self) -> Launch:
        return self._launch

    def described(self, values: dict[str, Any]) -> None:
        """What the description command printed just now, for the generations that are prepared from now on."""
        self._launch = msgspec.structs.replace(self._launch, described=values)

    def prepare(self, generation: int, source: PreparedGeneration | None, label: str | None) -> PreparedGeneration:
        """Raises HandoffError, with everything as it was before."""
        pins = self._fresh_pins() if source is None else _checked(source.pins)
        if label is None:
            label = pins.settings.label if source is None else source.label
        own = effective_binds(pins.settings.binds, self._inherited, pins.directory)
        free = pins.settings.freebind
        names = listener_names(own)
        own = [msgspec.structs.replace(bind, name=name, is_free=free) for bind, name in zip(own, names, strict=True)]
        all_pins = {name: companion_pins(pins, name) for name in pins.settings.companions}
        binds = {name: _companion_binds(name, one) for name, one in all_pins.items()}
        together = [*own, *(bind for some in binds.values() for bind in some.values())]
        check_binds(together)
        _refuse_check_without_tcp(pins.settings, own)
        per_slot = [str(bind.name) for bind in own] if pins.settings.listen_mode == "reuseport" else []
        listeners = self._listeners.acquire(generation, together, pins.settings.backlog, per_slot)
        companions = {
            name: PreparedCompanion(one, {inner: listeners[str(bind.name)] for inner, bind in binds[name].items()})
            for name, one in all_pins.items()
        }
        workers_listeners = {str(bind.name): listeners[str(bind.name)] for bind in own}
        return PreparedGeneration(generation, label, pins, workers_listeners, companions)

    @property
    def _source(self) -> str | None:
        return self._launch.config if self._launch.described is None else DESCRIPTION

    def _fresh_pins(self) -> Pins:
        pins = resolve(self._launch)
        if self._first_settings is None:
            self._first_settings = pins.settings
            typed = {key: value for key, value in self._launch.overrides.items() if key != "label"}  # of the first one
            self._launch = msgspec.structs.replace(self._launch, overrides=typed)
        options = load_service_options(self._launch, pins.directory)
        changes = service_changes(self._first_settings, self._options, pins.settings, options, self._source)
        if changes:
            raise UsageError(changes[0])
        return pins


def _refuse_check_without_tcp(settings: Settings, binds: Sequence[Bind]) -> None:
    if settings.command and settings.check is not None and not any(bind.kind in ("tcp", "fd") for bind in binds):
        raise UsageError("check: a command is asked through a TCP listener, and has none; leave it out, or bind one")


def _companion_binds(companion: str, pins: Pins) -> dict[str, Bind]:
    """By the name that the companion knows; the bind's own name tells it from those of others."""
    binds = [absolute_bind(parse_bind(text), pins.directory) for text in pins.settings.binds]
    names = listener_names(binds)
    return {
        name: msgspec.structs.replace(bind, name=f"{companion}.{name}") for name, bind in zip(names, binds, strict=True)
    }


def _checked(pins: Pins) -> Pins:
    if not os.path.isdir(pins.directory):
        raise HandoffError(f"directory {pins.directory}: is gone, so there is nothing to roll back to; reload instead")
    if not os.access(pins.python, os.X_OK):
        raise HandoffError(f"python {pins.python}: is gone, so there is nothing to roll back to; reload instead")
    return pins
