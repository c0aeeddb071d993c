"""Metrics for Prometheus: what the generator counts, under vLLM's names where the meaning is the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from runtime.generator import Generator

# Name, field of `Generator.metrics`, help.
GAUGES = (
    ("num_requests_running", "running", "Requests that run."),
    ("num_requests_waiting", "waiting", "Requests that wait for their turn."),
    ("num_requests_waiting_max", "max_queue", "Requests that may wait."),
)
COUNTERS = (
    ("prompt_tokens", "prompt_tokens", "Tokens of prompts."),
    ("generation_tokens", "chosen_tokens", "Tokens of answers."),
    ("prefix_cache_queries", "prompt_tokens", "Tokens of prompts that were looked for in the cache."),
    ("prefix_cache_hits", "cached_prompt_tokens", "Tokens of prompts that were found in the cache."),
    ("num_preemptions", "preemptions", "Times that a request had to leave its slot."),
    ("requests_finished", "finished_requests", "Requests with their whole answer."),
    ("requests_failed", "failed", "Requests that ended by an error."),
    ("requests_cancelled", "cancelled", "Requests that were cancelled, as when a client leaves."),
    ("prompt_passes", "prompt_passes", "Passes of the engine for prompts."),
    ("decode_passes", "decode_passes", "Passes of the engine for answers."),
    ("spec_decode_num_drafts", "drafts", "Trees of candidates that were verified."),
    ("spec_decode_num_draft_tokens", "candidates", "Candidates that were verified."),
    ("grammars_compiled", "grammars_compiled", "Grammars and schemas that were compiled."),
    ("grammars_refused", "grammars_refused", "Grammars and schemas that could not be compiled, or not within limits."),
    ("grammar_cache_hits", "grammar_hits", "Grammars and schemas that were compiled before."),
    ("grammar_compile_seconds", "grammar_seconds", "Seconds spent on compiling grammars and schemas."),
)
HISTOGRAMS = (
    ("time_to_first_token_seconds", "first_token_seconds", "From a request to its first token."),
    ("inter_token_latency_seconds", "token_seconds", "From one token to the next."),
    ("e2e_request_latency_seconds", "request_seconds", "From a request to its last token."),
    ("request_queue_time_seconds", "queue_seconds", "From a request to its first pass."),
    ("requests_per_pass", "batch_sizes", "Requests in a pass."),
)


class Metrics:
    """The metrics of one server, in a registry of its own: of its `generator`, and of HTTP."""

    def __init__(self, generator: Generator, prefix: str, model: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Collector(generator, prefix, model))

        def counter(name: str, about: str, labels: Sequence[str]) -> Counter:
            return Counter(prefix + name, about, ["model_name", *labels], registry=self._registry)

        self._requests = counter("http_requests", "Answers over HTTP.", ["path", "status"])
        self._finished = counter("request_success", "Answers by how they ended.", ["finished_reason"])
        self._gone = counter("clients_gone", "Clients that left before their answer's end.", [])
        self._open = Gauge(
            prefix + "http_requests_open", "Requests over HTTP under way.", ["model_name"], registry=self._registry
        )
        self._model = model
        self._gone.labels(model)
        self.open = self._open.labels(model)

    def answered(self, path: str, status: int) -> None:
        """Count an answer over HTTP."""
        self._requests.labels(self._model, path, str(status)).inc()

    def finished(self, reason: str) -> None:
        """Count an answer of the model."""
        self._finished.labels(self._model, reason).inc()

    def left(self) -> None:
        """Count a client that has left."""
        self._gone.labels(self._model).inc()

    def text(self) -> tuple[bytes, str]:
        """Return all as Prometheus reads it, and its media type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _Collector:
    """Asks a generator for its metrics when they are wanted."""

    def __init__(self, generator: Generator, prefix: str, model: str) -> None:
        self._generator = generator
        self._prefix = prefix
        self._model = model

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are."""
        found, labels = self._generator.metrics(), ["model_name"]
        for name, field, about in GAUGES:
            gauge = GaugeMetricFamily(self._prefix + name, about, labels=labels)
            gauge.add_metric([self._model], found[field])
            yield gauge
        usage = GaugeMetricFamily(self._prefix + "kv_cache_usage_perc", "Share of the cache in use.", labels=labels)
        usage.add_metric([self._model], found["reserved_rows"] / max(1, found["cache_rows"]))
        yield usage
        failed = GaugeMetricFamily(self._prefix + "engine_failed", "1 once the engine has failed.", labels=labels)
        failed.add_metric([self._model], float(self._generator.failure is not None))
        yield failed
        for name, field, about in COUNTERS:
            counter = CounterMetricFamily(self._prefix + name, about, labels=labels)
            counter.add_metric([self._model], found[field])
            yield counter
        yield from self._accepted(found["accepted_at"])
        for name, field, about in HISTOGRAMS:
            histogram = HistogramMetricFamily(self._prefix + name, about, labels=labels)
            histogram.add_metric([self._model], _buckets(found[field]), found[field]["sum"])
            yield histogram

    def _accepted(self, at: Sequence[int]) -> Iterator[Metric]:
        name = self._prefix + "spec_decode_num_accepted_tokens"
        total = CounterMetricFamily(name, "Candidates that were accepted.", labels=["model_name"])
        total.add_metric([self._model], sum(at))
        yield total
        places = CounterMetricFamily(
            name + "_per_pos",
            "Candidates that were accepted, by their place behind the certain token, from 0.",
            labels=["model_name", "position"],
        )
        for place, count in enumerate(at):
            places.add_metric([self._model, str(place)], count)
        yield places


def _buckets(histogram: dict[str, Any]) -> list[tuple[str, float]]:
    """Return the cumulative counts of a histogram by upper bound."""
    bounds = [*map(str, histogram["bounds"]), "+Inf"]
    return list(zip(bounds, map(float, accumulate(histogram["counts"])), strict=True))
