"""What Prometheus scrapes. Counters of tokens and requests move with the ledger's rows, so they agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from bise import __version__

if TYPE_CHECKING:
    from bise.engine.load import LoadedModel
    from bise.store.ledger import LedgerRow

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "bise_requests", "Requests that were admitted, by how they ended.",
            ["endpoint", "model", "finish_reason", "error_code"], registry=registry,
        )  # fmt: skip
        self._tokens = Counter(
            "bise_tokens", "Tokens by kind: prompt (cached ones included), cached, completion.",
            ["model", "kind"], registry=registry,
        )  # fmt: skip
        self._refused = Counter(
            "bise_refused", "Requests refused at the gate.", ["reason"], registry=registry
        )
        self._energy = Counter("bise_energy_joules", "Energy of requests.", ["model"], registry=registry)
        self._energy_sources = Gauge(
            "bise_energy_source", "1 where this machine's energy can be read from it.", ["source"],
            registry=registry,
        )  # fmt: skip
        self._queue = self._histogram("bise_queue_seconds", "Wait before the first step.", _SECONDS)
        self._first = self._histogram(
            "bise_time_to_first_token_seconds", "From admission to the first token.", _SECONDS
        )
        self._between = self._histogram(
            "bise_inter_token_seconds", "Mean time between tokens, one observation a request.", _TOKEN_SECONDS
        )
        self._gauges = {
            name: Gauge(f"bise_{name}", help_text, ["model"], registry=registry)
            for name, help_text in {
                "running_requests": "Sequences in the engine's batch.",
                "waiting_requests": "Sequences that wait for the engine.",
                "kv_blocks": "KV cache blocks.",
                "kv_blocks_free": "KV cache blocks that are free.",
                "kv_bytes": "Bytes of the KV cache.",
                "preemptions": "Sequences put back for want of memory.",
                "experts_wanted": "Experts that steps wanted, where not all fit the device.",
                "experts_found": "Of these, experts that were on the device.",
                "experts_copied": "Experts copied to the device.",
                "experts_guessed": "Of these, copied before they were wanted.",
                "experts_guessed_right": "Of these, wanted before they gave way.",
                "experts_copied_bytes": "Bytes of experts copied to the device.",
            }.items()
        }
        Gauge("bise_info", "Version of this server.", ["version"], registry=registry).labels(__version__).set(
            1
        )

    def tell_energy(self, sources: Sequence[str]) -> None:
        """Tell which counters of energy can be read here."""
        for name in ("rapl", "nvml"):
            self._energy_sources.labels(name).set(name in sources)

    def count(self, row: LedgerRow) -> None:
        """Count a row that was written to the ledger."""
        self._requests.labels(row.endpoint, row.model, row.finish_reason or "", row.error_code or "").inc()
        for kind, count in (
            ("prompt", row.prompt_tokens),
            ("cached", row.cached_tokens),
            ("completion", row.completion_tokens),
        ):
            self._tokens.labels(row.model, kind).inc(count)
        if row.energy_j is not None:
            self._energy.labels(row.model).inc(row.energy_j)
        if row.completion_tokens:
            self._queue.labels(row.model).observe(row.queue_s)
            self._first.labels(row.model).observe(row.queue_s + row.prefill_s)
        if row.completion_tokens > 1:
            self._between.labels(row.model).observe(row.decode_s / (row.completion_tokens - 1))

    def refuse(self, reason: str) -> None:
        """Count a request that was not let in."""
        self._refused.labels(reason).inc()

    def page(self, engines: Mapping[str, LoadedModel]) -> bytes:
        """Return all metrics in Prometheus' text form."""
        for gauge in self._gauges.values():
            gauge.clear()
        for model, loaded in engines.items():
            stats = loaded.engine.stats()
            values = {
                "running_requests": stats.num_running,
                "waiting_requests": stats.num_waiting,
                "kv_blocks": sum(stats.num_blocks),
                "kv_blocks_free": sum(stats.num_free_blocks),
                "kv_bytes": stats.kv_bytes,
                "preemptions": stats.num_preemptions,
            }
            counts = loaded.expert_counts()
            if counts is not None:
                values |= {f"experts_{name}": value for name, value in asdict(counts).items()}
            for name, value in values.items():
                self._gauges[name].labels(model).set(value)
        return generate_latest(self._registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, help_text, ["model"], buckets=buckets, registry=self._registry)
