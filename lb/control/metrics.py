"""What `GET /metrics` tells Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lb.control.controller import Controller
from lb.control.status import status_of
from lb.core.admin import Status
from lb.core.standing import Health, Outcome
from lb.page import CONNECT_NANOSECONDS

_BACKEND = ["service", "pool", "backend"]
_GAUGES = {
    "eligible": "1: it may get new connections.",
    "up": "1: its checks pass, or it has none.",
    "ejected": "1: out for a while, for it failed clients.",
    "weight": "The share it gets, relative to the others of its pool.",
    "connections": "Connections now.",
    "check_seconds": "How long its latest check took.",
}
_COUNTERS = {
    "connections": "Connections that were made.",
    "connect_failures": "Connections that could not be made.",
    "resets": "Connections that ended by a reset, or a limit.",
    "sent_bytes": "From clients to the backend.",
    "received_bytes": "From the backend to clients.",
    "connect_seconds": "What it took to connect, the sum.",
}


class Metrics(Collector):
    """Borrows the controller."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The text, and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        status = status_of(self._controller)
        yield from self._of_the_whole(status)
        yield from self._of_backends(status)

    def _of_the_whole(self, status: Status) -> Iterator[Metric]:
        yield _one("table_revision", "Of the table that relay workers go by.", status.revision)
        yield _one("generation", "As handoff numbers them.", status.generation)
        yield _one("durable", "1: all changes are on the disk.", status.is_durable)
        behind = len(self._controller.behind(status.revision))
        yield _one("relays_behind", "Relay workers that have not taken the latest table.", behind)
        relays = GaugeMetricFamily("handoff_lb_relays", "Relay workers that are connected.", labels=["state"])
        draining = sum(relay.is_draining for relay in status.relays)
        relays.add_metric(["serving"], len(status.relays) - draining)
        relays.add_metric(["draining"], draining)
        yield relays
        revisions = GaugeMetricFamily("handoff_lb_service_revision", "Of its active pool.", labels=["service"])
        shares = GaugeMetricFamily(
            "handoff_lb_pool_percent", "The pool's share of new connections.", labels=["service", "pool"]
        )
        for name, service in status.services.items():
            revisions.add_metric([name], service.revision)
            for pool, one in service.pools.items():
                shares.add_metric([name, pool], one.percent)
        yield revisions
        yield shares

    def _of_backends(self, status: Status) -> Iterator[Metric]:
        gauges = {
            name: GaugeMetricFamily(f"handoff_lb_backend_{name}", text, labels=_BACKEND)
            for name, text in _GAUGES.items()
        }
        counters = {
            name: CounterMetricFamily(f"handoff_lb_backend_{name}", text, labels=_BACKEND)
            for name, text in _COUNTERS.items()
        }
        checks = CounterMetricFamily("handoff_lb_backend_checks", "Checks.", labels=[*_BACKEND, "outcome"])
        page, probes = self._controller.page, self._controller.probes
        for service, service_status in status.services.items():
            for pool, pool_status in service_status.pools.items():
                for name, one in pool_status.backends.items():
                    labels = [service, pool, name]
                    gauges["eligible"].add_metric(labels, one.is_eligible)
                    gauges["up"].add_metric(labels, one.health == Health.UP.value)
                    gauges["ejected"].add_metric(labels, one.is_ejected)
                    gauges["weight"].add_metric(labels, one.weight)
                    gauges["connections"].add_metric(labels, one.connections)
                    counters["connections"].add_metric(labels, one.total)
                    counters["connect_failures"].add_metric(labels, one.failed)
                    counters["resets"].add_metric(labels, one.reset)
                    counters["sent_bytes"].add_metric(labels, one.sent_bytes)
                    counters["received_bytes"].add_metric(labels, one.received_bytes)
                    nanoseconds = page.sums(one.identity)[CONNECT_NANOSECONDS]
                    counters["connect_seconds"].add_metric(labels, nanoseconds / 1e9)
                    if probes is not None and (seconds := probes.seconds.get(one.identity)) is not None:
                        gauges["check_seconds"].add_metric(labels, seconds)
                    for outcome in Outcome:
                        counts = {} if probes is None else probes.counts.get(one.identity, {})
                        count = counts.get(outcome.value, 0)
                        checks.add_metric([*labels, outcome.value], count)
        yield from gauges.values()
        yield from counters.values()
        yield checks


def _one(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"handoff_lb_{name}", text, value=value)
