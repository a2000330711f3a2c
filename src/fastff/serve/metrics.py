"""What the server counts, in the text form of Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = tuple(float(4**power) for power in range(9))


class Metrics:
    """Of one server; several in a process count apart."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter("fastff_requests", "Answers.", ["path", "status"], registry=self.registry)
        self._seconds = Histogram(
            "fastff_request_seconds", "From headers to answer.", ["path"], buckets=_SECONDS, registry=self.registry
        )
        self._in_flight = Gauge("fastff_requests_in_flight", "Requests without an answer.", registry=self.registry)
        self._inputs = Histogram("fastff_batch_inputs", "Inputs a batch.", buckets=_SIZES, registry=self.registry)
        self._tokens = Histogram("fastff_batch_tokens", "Tokens a batch.", buckets=_SIZES, registry=self.registry)
        self._generated = Counter("fastff_generated_tokens", "Tokens generated.", registry=self.registry)

    def began(self) -> None:
        self._in_flight.inc()

    def ended(self, path: str, status: int, seconds: float) -> None:
        """An answer is out. path: of a known route."""
        self._in_flight.dec()
        self._requests.labels(path, status).inc()
        self._seconds.labels(path).observe(seconds)

    def batch(self, inputs: int, tokens: int) -> None:
        self._inputs.observe(inputs)
        self._tokens.observe(tokens)

    def generated(self) -> None:
        self._generated.inc()

    def watch(self, name: str, help: str, value: Callable[[], float]) -> None:
        """A gauge whose value is asked for when the metrics are read."""
        Gauge(name, help, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)
