"""`--metrics`: what Prometheus is told, and the HTTP that it asks with. Imported only where it is asked for."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import Counter as Count
from collections.abc import Iterator

import httptools
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from handoff.addresses import Bind
from handoff.binding import bind_listener
from handoff.core.supervisor import Supervisor
from handoff.core.vocabulary import Verdict
from handoff.counters import (
    ADOPTED,
    CONNECTIONS,
    DURATION_BOUNDS,
    DURATION_NANOSECONDS,
    DURATIONS,
    FIRST_STATUS,
    IN_PROGRESS,
    MOVED,
    REFUSED,
    STATUS_COUNT,
    STATUSES,
    WAITING,
)
from handoff.master.crew import Crew
from handoff.master.log import MasterLog
from handoff.master.loop import Loop
from handoff.master.peers import MAXIMUM_PEERS, Peer, Peers
from handoff.version import __version__

PATH = b"/metrics"
MAXIMUM_REQUEST_BYTES = 16 * 1024
_RELOAD_BOUNDS = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300)


class Metrics(Collector):
    """One service's, as the master knows them. Borrows what it is given."""

    def __init__(self, name: str, supervisor: Supervisor, crew: Crew) -> None:
        self._name = name
        self._supervisor = supervisor
        self._crew = crew
        self._seen_slots: set[tuple[int, int]] = set()
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(namespace="handoff_master", pid=os.getpid, registry=self.registry)
        self._reloads = Counter(
            "handoff_reloads", "Reloads and rollbacks by how they ended.", ["verdict"], registry=self.registry
        )
        self._reload_seconds = Histogram(
            "handoff_reload_duration_seconds",
            "From the request of a reload to its verdict.",
            buckets=_RELOAD_BOUNDS,
            registry=self.registry,
        )
        self._restarts = Counter(
            "handoff_worker_restarts",
            "Workers started in place of one that had ended by itself.",
            registry=self.registry,
        )

    # --- what happens -----------------------------------------------------------------------------------------------

    def ended(self, verdict: Verdict) -> None:
        """The first start of a service, and requests that were refused at once, are no reloads."""
        if verdict.is_reload and verdict.seconds and verdict.generation != 1:
            self._reloads.labels(verdict.exit_code.name.lower()).inc()
            self._reload_seconds.observe(verdict.seconds)

    def spawned(self, generation: int, slot: int) -> None:
        if (generation, slot) in self._seen_slots:
            self._restarts.inc()
        self._seen_slots = {seen for seen in self._seen_slots if seen[0] in self._supervisor.fleet.generations}
        self._seen_slots.add((generation, slot))

    def drains(self, worker: int) -> None:
        """By a scale down its slot is given up: who comes there later is nobody's replacement."""
        record = self._supervisor.fleet.workers.get(worker)
        generation = None if record is None else self._supervisor.fleet.generations.get(record.generation)
        if record is not None and generation is not None and record.slot >= generation.workers_wanted:
            self._seen_slots.discard((record.generation, record.slot))

    # --- what is ----------------------------------------------------------------------------------------------------

    def collect(self) -> Iterator[Metric]:
        yield _gauge("handoff_info", "This master.", {(self._name, __version__): 1}, ("name", "release"))
        yield from self._fleet()
        totals = self._crew.totals()
        yield from _moves(totals)
        yield from _requests(totals)

    def _fleet(self) -> Iterator[Metric]:
        fleet = self._supervisor.fleet
        generations = Count((record.state.value,) for record in fleet.generations.values())
        yield _gauge("handoff_generations", "Generations by state.", generations, ("state",))
        live = self._supervisor.live
        yield _gauge("handoff_live_generation", "The number of the live generation.", {(): live or 0})
        wanted = fleet.generations[live].workers_wanted if live in fleet.generations else 0
        yield _gauge("handoff_workers_wanted", "Workers that the live generation is to have.", {(): wanted})
        workers: Count[tuple[str]] = Count()
        connections: Count[tuple[str]] = Count()
        waiting = in_progress = 0
        for worker in fleet.workers.values():
            process = self._crew.get(worker.worker)
            if process is None:
                continue
            cells = self._crew.counters(process)
            workers[(worker.state.value,)] += 1
            connections[(worker.state.value,)] += cells[CONNECTIONS]
            waiting += cells[WAITING]
            in_progress += cells[IN_PROGRESS]
        yield _gauge("handoff_workers", "Workers by state.", workers, ("state",))
        yield _gauge("handoff_connections", "Open connections by their worker's state.", connections, ("state",))
        yield _gauge("handoff_moves_waiting", "Connections that wait to be handed over.", {(): waiting})
        yield _gauge("handoff_requests_in_progress", "Requests that are not answered yet.", {(): in_progress})


def _moves(totals: list[int]) -> Iterator[Metric]:
    moves = CounterMetricFamily("handoff_moves", "Connections that left, came, or could not move.", labels=("event",))
    for event, field in (("moved", MOVED), ("adopted", ADOPTED), ("refused", REFUSED)):
        moves.add_metric((event,), totals[field])
    yield moves


def _requests(totals: list[int]) -> Iterator[Metric]:
    requests = CounterMetricFamily("handoff_requests", "Requests by the status of the answer.", labels=("status",))
    for offset, count in enumerate(totals[STATUSES : STATUSES + STATUS_COUNT]):
        if count:
            requests.add_metric((str(FIRST_STATUS + offset),), count)
    yield requests
    counts = itertools.accumulate(totals[DURATIONS : DURATIONS + len(DURATION_BOUNDS) + 1])
    buckets = list(zip((*map(str, DURATION_BOUNDS), "+Inf"), counts, strict=True))
    text = "From the end of a request's head to the end of its answer."
    yield HistogramMetricFamily(
        "handoff_request_duration_seconds", text, buckets=buckets, sum_value=totals[DURATION_NANOSECONDS] / 1e9
    )


def _gauge(
    name: str, text: str, values: dict[tuple[str, ...], int] | Count[tuple[str]], labels: tuple[str, ...] = ()
) -> Metric:
    gauge = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        gauge.add_metric(key, value)
    return gauge


class MetricsServer:
    """HTTP/1.1 for `GET /metrics`, one answer for each connection. Owns its listener."""

    def __init__(self, bind: Bind, metrics: Metrics, loop: Loop, log: MasterLog) -> None:
        """Raises HandoffError: the address cannot be bound."""
        self._metrics = metrics
        self._listener = bind_listener(bind, "metrics", MAXIMUM_PEERS)
        self.address = self._listener.address
        self._peers = Peers(self._listener.socket, loop, log, "metrics", MAXIMUM_REQUEST_BYTES, self._received)
        self.next_deadline = self._peers.next_deadline
        self.check = self._peers.check

    def close(self) -> None:
        self._peers.close()
        self._listener.close()

    def _received(self, peer: Peer) -> None:
        request = _Request()
        try:
            with contextlib.suppress(httptools.HttpParserUpgrade):  # it is a request all the same
                request.parser.feed_data(peer.received)
        except httptools.HttpParserError as error:
            self._peers.refuse(peer, str(error))
            return
        if request.is_complete:
            peer.has_asked = True
            peer.received = b""
            self._peers.finish(peer.number, self._answer(request))

    def _answer(self, request: _Request) -> bytes:
        method = request.parser.get_method()
        if request.target.partition(b"?")[0] != PATH:
            return _response("404 Not Found", "text/plain", b"/metrics is here\n")
        if method not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", "text/plain", b"GET is\n", "Allow: GET, HEAD\r\n")
        encode, content_type = choose_encoder(request.accept)
        body = encode(self._metrics.registry)
        whole = _response("200 OK", content_type, body)
        return whole if method == b"GET" else whole[: -len(body)]


class _Request:
    """What is asked for; callbacks of httptools."""

    def __init__(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        self.target = b""
        self.accept = ""
        self.is_complete = False

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"accept":
            self.accept = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.is_complete = True


def _response(status: str, content_type: str, body: bytes, more: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n{more}"
    return (head + "Connection: close\r\n\r\n").encode() + body
