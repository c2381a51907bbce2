"""What software makes of a device's peaks: the calibrated numbers, and how far a prediction may be off.

`Rates` are the physics terms' efficiencies and latencies, the same for every engine and device. On top of the summed
time stands one factor per engine, engine x hardware and engine x hardware x phase, shrunk to 1 where few points speak.
calibrate.py fits both and writes data/calibration.json, which is read here.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from importlib import resources
from math import exp
from typing import Any


@dataclass(frozen=True)
class Rates:
    """Shares of peak, latencies in microseconds, and pure numbers. The values here are the priors' means."""

    gemm: float = 0.65
    """Share of the peak that large products reach in 8 and 16 bits in prefill steps."""
    gemm_decode: float = 0.6
    """The same in decode steps, where batches are large enough to leave the memory's limit."""
    falloff: float = 0.25
    """Exponent with which these shares fall as the peak rises: fixed costs weigh more on a faster device. Shares are
    those of a device with 1,979 TFLOP/s in FP8 (H100)."""
    gemm4: float = 0.45
    """The same with FP4 weights."""
    memory: float = 0.8
    """Share of the memory's peak rate."""
    stream: float = 0.6
    """The same for the routed experts' weights, which few rows use in an order that routing decides."""
    host_memory: float = 0.5
    """Share of a CPU host's memory rate, over its sockets."""
    tile: float = 64.0
    """Rows of an expert's product that take no less time than one: half of full speed is reached with so many."""
    core_decode: float = 0.6
    """Share of the BF16 peak in core attention of decode steps."""
    core_prefill: float = 0.45
    passes: float = 1.0
    """Times the counted passes of small kernels over the activations."""
    up: float = 0.6
    """Share of the scale-up link in all-reduces."""
    fan: float = 0.7
    """Share of the scale-up link in dispatch and combine (DeepEP: 153 GB/s of H800's 200)."""
    out: float = 0.85
    """Share of the NIC."""
    layer_us: float = 60.0
    """Small kernels and launch gaps of a layer in a decode step."""
    host_ms: float = 2.0
    """Between two steps: scheduling, sampling."""
    draft_ms: float = 1.0
    """Scheduling and launching of each drafting pass."""
    exchange_us: float = 30.0
    """Beyond its wire time, of one dispatch or one combine that crosses to other nodes over NICs."""
    near_us: float = 20.0
    """The same where the scale-up link joins all ranks: loads and stores, no messages."""
    reduce_us: float = 12.0
    """Beyond its wire time, of one all-reduce among TP ranks."""
    hidden: float = 0.25
    """With two-batch overlap: the part of the shorter of computing and sending that is not hidden."""
    drift: float = 0.14
    """Spread of expert loads that moves after balancing."""
    taste: float = 2.5
    """Spread of the expert loads of a single request."""
    felt: float = 0.7
    """Share of the busiest rank's excess that sending feels: links take up some of it between layers."""
    accept: float = 0.7
    """Chance that a drafted token is accepted, given that those before it were (CloudMatrix384 reports 70 %)."""
    mixing: float = 1.0
    """On mixed boxes: how much of a prefill's own time it adds to the decode steps it runs beside."""
    stagger: float = 1.4
    """With several attention replicas in step: how much longer prefills that do not coincide hold up all of them."""
    ttft_ms: float = 80.0
    """Door, tokenizer, first scheduling."""
    alone: float = 1.0
    """Of the prefill time that a prompt costs among others: what it waits for its own when it is first in line on a
    mixed unit."""
    alone_apart: float = 1.3
    """The same on a prefill unit: two engines schedule it, and a gateway between them."""
    gather: float = 1.5
    """Times the time to first token of replicas in step on a mixed box: prompts wait to be prefilled together."""
    waiting: float = 1.0
    """Times the queueing time of the approximation."""
    burst: float = 0.06
    """Of the queue that users who all start at once form: its weight in a benchmark's mean."""
    transfer: float = 1.0
    """Times the wire time of a handed-over KV cache."""
    chunk_us: float = 30.0
    """Small kernels and launch gaps of a layer in a prefill step."""


PRIOR_SD: Mapping[str, float] = {
    "gemm": 0.25, "gemm4": 0.4, "gemm_decode": 0.25, "falloff": 0.5, "host_memory": 0.3, "memory": 0.12,
    "stream": 0.2, "tile": 0.5, "felt": 0.3, "gather": 0.5, "core_decode": 0.2, "core_prefill": 0.12, "passes": 0.5,
    "up": 0.3, "fan": 0.08, "draft_ms": 0.3, "out": 0.15, "layer_us": 0.6, "host_ms": 0.8, "exchange_us": 0.6,
    "near_us": 0.6, "reduce_us": 0.6, "hidden": 0.5, "drift": 0.2, "taste": 0.3, "alone": 0.4, "alone_apart": 0.4,
    "accept": 0.04, "mixing": 0.4, "stagger": 0.3, "ttft_ms": 0.6, "waiting": 0.6, "burst": 0.6,
    "transfer": 0.6, "chunk_us": 0.8,
}  # fmt: skip
"""Of the logarithm of each: how far the fit may move it from its mean at one standard deviation."""

LEVELS = (("engine", 0.2), ("hardware", 0.15), ("phase", 0.12))
"""Prior standard deviation of the logarithm of each level's factor: engine, engine x hardware, and x phase."""


TTFT_SD = 0.3
"""Of the factor of engine x hardware on time to first token."""


@dataclass(frozen=True)
class Calibration:
    """Fitted rates, factors by group, and the spread of the residuals."""

    rates: Rates = field(default_factory=Rates)
    factors: Mapping[str, float] = field(default_factory=dict)
    """Logarithms by group name: 'sglang', 'sglang/H100', 'sglang/H100/decode'."""
    spread: Mapping[str, float] = field(default_factory=dict)
    """Half widths of the 80 % interval, as logarithms, by what is known: 'decode/engine+hardware', 'decode/engine',
    'decode/nothing', and so for prefill, ttft."""
    about: str = "priors only"

    def factor(self, engine: str, hardware: str, phase: str) -> float:
        """What the summed time of physics is multiplied by. An unknown engine counts as the mean of the known ones,
        an unknown group of a known engine as 1."""
        get = self.factors.get
        if engine not in self.factors:
            return exp(get(average(phase), 0.0))
        return exp(sum(get(g, 0.0) for g in group_names(engine, hardware, phase)))

    def ttft_factor(self, engine: str, hardware: str, apart: bool) -> float:
        """The same for time to first token, on mixed units or (apart) with prefill units."""
        return exp(self.factors.get(ttft_name(engine, hardware, apart), 0.0))

    def with_average(self, well_known: Collection[str]) -> "Calibration":
        """With the mean over well known engines of each phase's factor: what an engine nobody measured is taken for."""
        groups: dict[tuple[str, str], list[float]] = {}
        for name in self.factors:
            parts = name.split("/")
            if len(parts) == 3 and parts[0] in well_known and parts[2] in ("prefill", "decode"):
                total = sum(self.factors.get(g, 0.0) for g in group_names(parts[0], parts[1], parts[2]))
                groups.setdefault((parts[0], parts[2]), []).append(total)
        means: dict[str, list[float]] = {"prefill": [], "decode": []}
        for (_, phase), totals in groups.items():
            means[phase].append(sum(totals) / len(totals))
        found = {average(phase): sum(v) / len(v) for phase, v in means.items() if v}
        return replace(self, factors={**self.factors, **found})

    def knows(self, engine: str, hardware: str, phase: str) -> str:
        groups = group_names(engine, hardware, phase)
        if groups[2] in self.factors:
            return "engine+hardware"
        return "engine" if groups[0] in self.factors else "nothing"

    def half_width(self, engine: str, hardware: str, phase: str) -> float:
        """Of the 80 % interval, as a logarithm: measured on held-out points that knew as much as this one does."""
        known = self.knows(engine, hardware, phase)
        return self.spread.get(f"{phase}/{known}", {"engine+hardware": 0.2, "engine": 0.3, "nothing": 0.45}[known])

    def ttft_half_width(self, engine: str, hardware: str, apart: bool) -> float:
        """The same of time to first token, on mixed units or (apart) with prefill units."""
        known = "engine" if engine in self.factors else "nothing"
        if ttft_name(engine, hardware, apart) in self.factors:
            known = "engine+hardware"
        return self.spread.get(f"ttft/{known}", 0.9)


def average(phase: str) -> str:
    return f"*/*/{phase}"


def ttft_name(engine: str, hardware: str, apart: bool) -> str:
    return f"{engine}/{hardware}/ttft{' apart' if apart else ''}"


def group_names(engine: str, hardware: str, phase: str) -> tuple[str, str, str]:
    return engine, f"{engine}/{hardware}", f"{engine}/{hardware}/{phase}"


@lru_cache(maxsize=1)
def shipped() -> Calibration:
    """The calibration that comes with the planner."""
    text = (resources.files("brigade.plan") / "data/calibration.json").read_text(encoding="utf-8")
    return from_json(json.loads(text))


def from_json(data: Mapping[str, Any]) -> Calibration:
    return Calibration(
        Rates(**{f.name: float(data["rates"][f.name]) for f in fields(Rates)}),
        dict(data["factors"]),
        dict(data["spread"]),
        str(data["about"]),
    )


def to_json(c: Calibration) -> dict[str, Any]:
    return {"about": c.about, "rates": asdict(c.rates), "factors": dict(c.factors), "spread": dict(c.spread)}


def moved(rates: Rates, name: str, log_step: float) -> Rates:
    """`rates` with one of them multiplied by exp(log_step)."""
    return replace(rates, **{name: getattr(rates, name) * exp(log_step)})
