"""What of a changed file can be taken in place, and what needs new processes. No I/O."""

from __future__ import annotations

import msgspec

from lb.core.model import Balancer, Service

_OF_PROCESSES = (
    "name",
    "relays",
    "admin",
    "admin_token_file",
    "state",
    "freebind",
    "access_log",
    "unready_seconds",
    "desired",
)


def taken_in_place(present: Balancer, wanted: Balancer) -> tuple[Balancer, tuple[str, ...]]:
    """The configuration that can hold at once, and a note for each thing that stays as it is until a reload."""
    said = [key for key in _OF_PROCESSES if key not in present.typed]
    notes = [f"needs a reload: {key}" for key in said if getattr(present, key) != getattr(wanted, key)]
    by_name = {service.name: service for service in wanted.services}
    services = []
    for service in present.services:
        new = by_name.pop(service.name, None)
        if new is None:
            notes.append(f"needs a reload: service {service.name} is not in the file any more")
            services.append(service)
        else:
            services.append(_in_place(service, new, notes))
    notes += [f"needs a reload: service {name} is new" for name in by_name]
    kept = {key: getattr(present, key) for key in (*_OF_PROCESSES, "typed")}
    return msgspec.structs.replace(wanted, services=tuple(services), **kept), tuple(notes)


def _in_place(present: Service, wanted: Service, notes: list[str]) -> Service:
    if present.listen != wanted.listen:
        notes.append(f"needs a reload: listen of {present.name}")
    return msgspec.structs.replace(wanted, listen=present.listen)
