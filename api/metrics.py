"""What Prometheus scrapes: requests of this process, and what the tables say of the plant."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Metrics", "Observed"]

_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
"""Others are the caller's invention, and every label is kept for ever."""

Sample = tuple[str, str, dict[str, str], float]
"""Name, what it is, labels, value."""


class Metrics:
    """The metrics of one server.

    Args:
        plant: Asked at every scrape for what the tables say.
    """

    def __init__(self, plant: Callable[[], Iterable[Sample]]) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("autoeff_http_requests", "Answered requests.", ["method", "route", "status"], registry=self._registry)
        self.seconds = Histogram("autoeff_http_request_seconds", "Until the answer began.", ["route"], registry=self._registry)
        self.streams = Gauge("autoeff_event_streams", "Open event streams.", registry=self._registry)
        self._registry.register(_Plant(plant))

    def text(self) -> bytes:
        """All of them, in Prometheus's own format."""
        return generate_latest(self._registry)


class Observed:
    """The outermost layer: gives every request a trace id, and counts it.

    Args:
        app: What comes behind.
        metrics: Where it is counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, trace = time.perf_counter(), uuid.uuid4().hex[:16]
        scope["autoeff.trace_id"] = trace

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "-")  # never the path itself: every job would be a label
                method = scope["method"] if scope["method"] in _METHODS else "other"
                self._metrics.requests.labels(method, route, str(message["status"])).inc()
                self._metrics.seconds.labels(route).observe(time.perf_counter() - started)
                message["headers"] = [*message["headers"], (b"x-trace-id", trace.encode()), (b"x-content-type-options", b"nosniff")]
            await send(message)

        await self._app(scope, receive, noted)


class _Plant(Collector):
    def __init__(self, samples: Callable[[], Iterable[Sample]]) -> None:
        self._samples = samples

    def collect(self) -> Iterator[Metric]:
        families: dict[str, GaugeMetricFamily] = {}
        for name, meaning, labels, value in self._samples():
            family = families.setdefault(name, GaugeMetricFamily(name, meaning, labels=sorted(labels)))
            family.add_metric([labels[key] for key in sorted(labels)], value)
        yield from families.values()
