# SPDX-License-Identifier: Apache-2.0
"""What `/metrics` shows, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client import generate_latest as _latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
_TOKENS = tuple(2**power for power in range(4, 21, 2))


class Monitor:
    """Counters of one server.

    Args:
        num_requests: returns those that wait or run.
    """

    def __init__(self, num_requests: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self.requests = self._make(
            Counter, "opd_requests", "Requests by endpoint and status", ["endpoint", "status"]
        )
        self.seconds = self._make(
            Histogram,
            "opd_request_seconds",
            "From the first byte of a request to its reply",
            ["endpoint"],
            buckets=_SECONDS,
        )
        self.rows = self._make(Counter, "opd_rows", "Laws sent, by signal", ["signal"])
        self.reply_bytes = self._make(Counter, "opd_reply_bytes", "Bytes of replies")
        self.cancelled = self._make(
            Counter, "opd_cancelled_requests", "Requests whose client went away"
        )
        self.batch_tokens = self._make(
            Histogram, "opd_batch_tokens", "Tokens of a forward pass", buckets=_TOKENS
        )
        self.padded_tokens = self._make(
            Counter, "opd_padding_tokens", "Tokens of padding in forward passes"
        )
        self.batch_seconds = self._make(
            Histogram, "opd_batch_seconds", "Seconds of a forward pass", buckets=_SECONDS
        )
        queue = self._make(Gauge, "opd_queued_requests", "Requests that wait or run")
        queue.set_function(num_requests)

    def _make(self, kind: type, name: str, text: str, *labels: object, **settings: object):
        return kind(name, text, *labels, registry=self._registry, **settings)

    def observe_batch(self, sequences: int, tokens: int, padded: int, seconds: float) -> None:
        """One forward pass."""
        self.batch_tokens.observe(tokens)
        self.padded_tokens.inc(padded - tokens)
        self.batch_seconds.observe(seconds)

    def text(self) -> bytes:
        """The page."""
        return _latest(self._registry)
