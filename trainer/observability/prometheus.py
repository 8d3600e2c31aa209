"""The scalars of a run as a Prometheus text endpoint, http://ADDRESS:PORT/metrics."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Gauge, start_http_server
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from recpress.data.errors import InputError


class Endpoint:
    """Serves the last value of each scalar from a thread.

    `train/NAME` is the gauge `recpress_train_NAME`, and `stream/NAME` likewise. `evaluate/NAME` is
    `recpress_evaluation{metric="NAME"}`. In addition there are `recpress_step` and the counter
    `recpress_checkpoint_failures_total`, which calls `failures` at each request.

    Raises:
        InputError: the endpoint cannot listen on this address or port.
    """

    def __init__(self, port: int, address: str, failures: Callable[[], int] = lambda: 0) -> None:
        self._registry = CollectorRegistry()  # not the global one, which also has metrics of the Python process
        self._step = Gauge("recpress_step", "Steps done, of all epochs.", registry=self._registry)
        self._evaluation = Gauge("recpress_evaluation", "The last evaluation.", ["metric"], registry=self._registry)
        self._registry.register(_Failures(failures))
        self._train: dict[str, Gauge] = {}
        try:
            self._server, self._thread = start_http_server(port, address, self._registry)
        except OSError as error:
            raise InputError(
                f"watch.port {port} on watch.address {address}: {error.strerror}; choose another, or 0 for no endpoint"
            ) from error

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Replace the values of these scalars."""
        self._step.set(step)
        for name, value in scalars.items():
            kind, _, short = name.partition("/")
            if kind == "evaluate":
                self._evaluation.labels(short).set(value)
                continue
            if name not in self._train:
                series = f"recpress_{re.sub('[^a-zA-Z0-9_]', '_', name)}"
                self._train[name] = Gauge(series, name, registry=self._registry)
            self._train[name].set(value)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Failures(Collector):
    """The counter of checkpoints that could not be written."""

    def __init__(self, count: Callable[[], int]) -> None:
        self._count = count

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(
            "recpress_checkpoint_failures", "Checkpoints that could not be written.", value=self._count()
        )
