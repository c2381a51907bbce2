"""A plan beside a running fleet: predicted times and hit rate, and what Prometheus metrics say. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{([^}]*)\})?\s+(\S+)")


class BadMetrics(ValueError):
    """Metrics or a plan that cannot be compared. The message says what is missing."""


@dataclass(frozen=True)
class Checked:
    """One prediction beside its measurement."""

    what: str
    predicted: float
    measured: float
    low: float
    high: float

    @property
    def inside(self) -> bool:
        return self.low <= self.measured <= self.high


def samples(text: str) -> dict[tuple[str, str], float]:
    """Prometheus text format: (name, labels) -> value; lines that are no numbers are left out."""
    out: dict[tuple[str, str], float] = {}
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match is None:
            continue
        try:
            out[match[1], match[2] or ""] = float(match[3])
        except ValueError:
            continue
    return out


def histogram_quantile(found: Mapping[tuple[str, str], float], name: str, q: float) -> float:
    """As Prometheus computes it: linear within the bucket. Raises BadMetrics where nothing was observed."""
    sums: dict[float, float] = {}
    for (metric, labels), value in found.items():
        found_edge = re.search(r'le="([^"]+)"', labels)
        if metric == f"{name}_bucket" and found_edge is not None:
            upper = float(found_edge[1])
            sums[upper] = sums.get(upper, 0.0) + value
    edges = sorted(sums)
    total = sums[edges[-1]] if edges else 0.0
    if not total:
        raise BadMetrics(f"the metrics hold no observation of {name}; send the fleet requests first")
    below, start = 0.0, 0.0
    for edge in edges:
        if sums[edge] >= q * total:
            if edge == float("inf"):
                return start
            share = (q * total - below) / (sums[edge] - below) if sums[edge] > below else 1.0
            return start + share * (edge - start)
        below, start = sums[edge], edge
    return start


def verify(plan: Any, metrics: str) -> list[Checked]:
    """Lines for the first option of a plan (the output of --json). Raises BadMetrics."""
    found = samples(metrics)
    out = []
    for what, key, name in (
        ("time per token", "tpot", "brigade_time_per_output_token_seconds"),
        ("time to first token", "ttft", "brigade_time_to_first_token_seconds"),
    ):
        slack = _number(plan, "options", 0, f"{key}_factor_80")
        for label, q in ("p50", 0.5), ("p90", 0.9):
            value = _number(plan, "options", 0, f"{key}_s", label)
            measured = histogram_quantile(found, name, q)
            out.append(Checked(f"{what} {label}, s", value, measured, value / slack, value * slack))
    hit = _number(plan, "question", "hit_rate", least=0.0)
    prompt = sum(v for (n, _), v in found.items() if n == "brigade_prompt_tokens_total")
    cached = sum(v for (n, _), v in found.items() if n == "brigade_cached_prompt_tokens_total")
    if prompt:
        out.append(Checked("prefix cache hit rate", hit, cached / prompt, hit - 0.1, hit + 0.1))
    return out


def _number(plan: Any, *path: str | int, least: float = 1e-12) -> float:
    """A finite number of at least `least` in a plan. Raises BadMetrics."""
    value = plan
    try:
        for key in path:
            value = value[key]
    except (KeyError, IndexError, TypeError):
        value = None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < 1e12:
        where = ".".join(map(str, path))
        raise BadMetrics(f"the plan lacks {where}, or it is no such number; write it with brigade plan --json")
    return float(value)
