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


def verify(plan: Mapping[str, Any], metrics: str) -> list[Checked]:
    """Lines for the first option of a plan (the output of --json). Raises BadMetrics."""
    try:
        option = plan["options"][0]
        low, high = option["output_tok_s_card_full_80"]
        half = (high / low) ** 0.5
        tpot, ttft, hit = option["tpot_s"], option["ttft_s"], float(plan["question"]["hit_rate"])
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as e:
        raise BadMetrics(f"the plan lacks {e}; write it with brigade plan --json") from e
    found = samples(metrics)
    out = []
    for what, name, values, slack in (
        ("time per token", "brigade_time_per_output_token_seconds", tpot, half),
        ("time to first token", "brigade_time_to_first_token_seconds", ttft, half * half),
    ):
        for label, q in ("p50", 0.5), ("p90", 0.9):
            measured = histogram_quantile(found, name, q)
            value = float(values[label])
            out.append(Checked(f"{what} {label}, s", value, measured, value / slack, value * slack))
    prompt = sum(v for (n, _), v in found.items() if n == "brigade_prompt_tokens_total")
    cached = sum(v for (n, _), v in found.items() if n == "brigade_cached_prompt_tokens_total")
    if prompt:
        out.append(Checked("prefix cache hit rate", hit, cached / prompt, hit - 0.1, hit + 0.1))
    return out
