"""What Prometheus may know: times and counts heard as an Observer, the engine's state read at each scrape.

Names follow vLLM's, with the prefix brigade_, so that dashboards need little change. Own registry, nothing global.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from brigade.engine.messages import StoreStats
from brigade.engine.output import Timings
from brigade.serve.tracer import Tracer
from brigade.serve.units import RankReport, Recent, ServerReport, UnitReport, handovers, unit_reports

if TYPE_CHECKING:
    from brigade.engine.fleet import Fleet

CONTENT_TYPE = CONTENT_TYPE_LATEST

_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_FIRST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0)
_WHOLE_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
_FINISH_REASONS = ("stop", "length", "abort", "error")


class Times:
    """A histogram. Counting takes a tenth of the time that the library's own takes, and it is done for every token."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        """`bounds`: upper ends of the buckets, in seconds; one more has the rest."""
        self._name, self._text, self._bounds = name, text, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def metric(self) -> Metric:
        ends = [*(f"{bound}" for bound in self._bounds), "+Inf"]
        return HistogramMetricFamily(
            f"brigade_{self._name}", self._text, list(zip(ends, accumulate(self._counts), strict=True)), self._sum
        )


class Metrics(Collector):
    """The Observer that an engine is started with; `watch` adds the engine's own numbers."""

    def __init__(self) -> None:
        self._ttft = Times("time_to_first_token_seconds", "Time from submission to the first token.", _FIRST_SECONDS)
        self._tpot = Times(
            "time_per_output_token_seconds",
            "Mean time per output token after the first, one value a request.",
            _TOKEN_SECONDS,
        )
        self._itl = Times("inter_token_latency_seconds", "Time between two tokens of a request.", _TOKEN_SECONDS)
        self._e2e = Times(
            "e2e_request_latency_seconds",
            "Time from submission to the last token of requests that came to their end.",
            _WHOLE_SECONDS,
        )
        self.tracer = Tracer()
        self._recent_ttft, self._recent_tpot = Recent(), Recent()
        self._began, self._version = time.monotonic(), version("brigade")
        self._n_prompt = self._n_cached = self._n_stored = self._n_generated = self._n_restarts = 0
        self._finished = dict.fromkeys(_FINISH_REASONS, 0)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    # Observer

    def first_token(self, seconds: float, n_prompt: int, n_cached: int, n_stored: int) -> None:
        """A request's first token came, `seconds` after it was submitted. Of its cached tokens, `n_stored` were on
        disk."""
        self._ttft.add(seconds)
        self._recent_ttft.add(seconds)
        self._n_prompt += n_prompt
        self._n_cached += n_cached
        self._n_stored += n_stored
        self._n_generated += 1

    def next_token(self, seconds: float) -> None:
        """A further token came, `seconds` after the one before."""
        self._itl.add(seconds)
        self._n_generated += 1

    def finished(self, timings: Timings, reason: str) -> None:
        """A request ended. Times of those cut short would only blur the distributions."""
        self._finished[reason] += 1
        if reason not in ("stop", "length"):
            return
        self._e2e.add(timings.total)
        if timings.n_tokens > 1:
            self._tpot.add(timings.tpot)
            self._recent_tpot.add(timings.tpot)

    def restarted(self) -> None:
        """The worker died and is being replaced."""
        self._n_restarts += 1

    def placed(self, rid: int, part: int) -> None:
        """For traces."""
        self.tracer.placed(rid, part)

    def moved(self, rid: int, state: str) -> None:
        """For traces."""
        self.tracer.moved(rid, state)

    # For the server

    def watch(self, engine: "Fleet") -> None:
        """Read this engine's state at every scrape. Call once."""
        self._registry.register(_EngineState(engine))

    def scrape(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def report(self, engine: "Fleet", model: str) -> ServerReport:
        """The server in one piece, for people: the same numbers, and percentiles of the last minute."""
        health = engine.health()
        return ServerReport(
            model=model,
            version=self._version,
            uptime=time.monotonic() - self._began,
            ready=health.ready,
            reason=health.reason,
            ttft=self._recent_ttft.percentiles(),
            tpot=self._recent_tpot.percentiles(),
            prompt_tokens=self._n_prompt,
            cached_prompt_tokens=self._n_cached,
            generation_tokens=self._n_generated,
            finished=dict(self._finished),
            units=unit_reports(engine),
            handovers=handovers(engine),
        )

    def collect(self) -> Iterator[Metric]:
        """What was heard as an Observer."""
        for times in (self._ttft, self._tpot, self._itl, self._e2e):
            yield times.metric()
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens, cached ones included.", self._n_prompt),
            ("generation_tokens", "Tokens generated.", self._n_generated),
            ("worker_restarts", "Times the worker was replaced.", self._n_restarts),
        ):
            yield CounterMetricFamily(f"brigade_{name}", text, value=value)
        cached = CounterMetricFamily(
            "brigade_cached_prompt_tokens",
            "Prompt tokens found in the prefix cache, by where they were.",
            labels=["tier"],
        )
        cached.add_metric(["memory"], self._n_cached - self._n_stored)
        cached.add_metric(["disk"], self._n_stored)
        yield cached
        finished = CounterMetricFamily("brigade_request_finished", "Requests that ended, by reason.", labels=["reason"])
        for reason, n in self._finished.items():
            finished.add_metric([reason], n)
        yield finished
        hits = self._n_cached / self._n_prompt if self._n_prompt else 0.0
        yield GaugeMetricFamily(
            "brigade_prefix_cache_hit_ratio", "Share of prompt tokens found in a prefix cache, so far.", value=hits
        )


class _EngineState(Collector):
    def __init__(self, engine: "Fleet") -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats, ready = self._engine.stats(), self._engine.ready
        gauges = (
            ("num_requests_running", "Requests in the running batch.", stats.running),
            ("num_requests_waiting", "Requests waiting for their first step.", stats.waiting),
            ("kv_cache_usage_ratio", "Share of KV cache pages in use, 0 to 1.", stats.pages_used / ready.n_pages),
            ("engine_ready", "1 while the engine can answer, else 0.", float(self._engine.health().ready)),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(f"brigade_{name}", text, value=value)
        yield _by_label(
            "brigade_kv_pages_held",
            "Pages of the KV cache by who holds them: running requests, prompts that are coming from elsewhere, "
            "computed prompts that wait to be fetched.",
            "state",
            {
                "running": max(stats.pages_used - stats.pages_reserved - stats.pages_offered, 0),  # some are shared
                "reserved": stats.pages_reserved,
                "offered": stats.pages_offered,
            },
        )
        yield from _by_rank(unit_reports(self._engine))
        states, transfers, seconds = self._engine.handovers()
        yield _by_label("brigade_handover_requests", "Requests by state of their hand-over.", "state", states)
        fetched = CounterMetricFamily(
            "brigade_kv_transfers", "Prompts that went to a decode rank, by how.", labels=["how"]
        )
        for how in ("fetched", "computed"):
            fetched.add_metric([how], transfers[how])
        yield fetched
        waited = "Time that requests waited for rows after their first token."
        yield CounterMetricFamily("brigade_kv_transfer_seconds", waited, value=seconds)
        if stats.store is not None:
            yield from _store(stats.store)
        # These start again from 0 with a new worker, which Prometheus' rate() understands.
        yield CounterMetricFamily("brigade_num_preemptions", "Requests preempted.", value=stats.n_preempted)
        drafted = "Tokens that the model's multi-token-prediction layer guessed and a later step checked."
        yield CounterMetricFamily("brigade_spec_decode_num_draft_tokens", drafted, value=stats.n_drafted)
        accepted = "Those of them that were what the model said."
        yield CounterMetricFamily("brigade_spec_decode_num_accepted_tokens", accepted, value=stats.n_accepted)
        yield CounterMetricFamily("brigade_steps", "Steps run.", value=stats.n_steps)


def _store(store: StoreStats) -> Iterator[Metric]:
    yield GaugeMetricFamily("brigade_kv_disk_well", "1 while all ranks can use the disk store.", value=store.well)
    yield GaugeMetricFamily("brigade_kv_disk_used_bytes", "Bytes of the disk store.", value=store.used_bytes)
    for name, text, value in (
        ("read_bytes", "Bytes read from the disk store.", store.read_bytes),
        ("written_bytes", "Bytes written to the disk store.", store.written_bytes),
        ("evictions", "Entries of the disk store removed to make room.", store.evicted),
        ("dropped", "Requests whose pages were not all written: the disk was too slow, or off.", store.dropped),
    ):
        yield CounterMetricFamily(f"brigade_kv_disk_{name}", text, value=value)
    errors = CounterMetricFamily("brigade_kv_disk_errors", "What went wrong with the disk store.", labels=["kind"])
    for kind, n in (("damaged", store.damaged), ("late", store.late), ("failed", store.failed)):
        errors.add_metric([kind], n)
    yield errors


def _by_label(name: str, text: str, label: str, values: Mapping[str, int]) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        gauge.add_metric([key], value)
    return gauge


_RANK_GAUGES: tuple[tuple[str, str, Callable[[RankReport], int]], ...] = (
    ("requests_running", "Requests in a rank's running batch.", lambda r: r.running),
    ("requests_waiting", "Requests of a rank that wait for their first step.", lambda r: r.waiting),
    ("kv_pages", "Pages of a rank's KV cache.", lambda r: r.kv_pages),
    ("kv_pages_used", "Of these, pages in use.", lambda r: r.kv_pages_used),
)


def _by_rank(units: Sequence[UnitReport]) -> Iterator[Metric]:
    for name, text, value in _RANK_GAUGES:
        gauge = GaugeMetricFamily(f"brigade_rank_{name}", text, labels=["unit", "role", "rank"])
        for unit in units:
            for rank in unit.ranks:
                gauge.add_metric([unit.name, unit.role, str(rank.rank)], value(rank))
        yield gauge
