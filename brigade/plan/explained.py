"""Every number of an option with its formula and source: the terms of a step, the memory of a rank, the rates used."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from brigade.plan.ask import Option, serve
from brigade.plan.memory import memory
from brigade.plan.rates import Calibration
from brigade.plan.search import Unit
from brigade.plan.serving import Workload
from brigade.plan.step import Step
from brigade.spec.device import SOURCES, Device

FORMULAS: dict[str, tuple[str, str]] = {
    "projections": (
        "2 x params x tokens / (peak x share), or weights / memory rate",
        "parameters table; DeepSeek-V2 2.1",
    ),
    "core attention": (
        "FLOPs a token and layer: decode 2 heads (2 r + rope) context, prefill 2 heads (qk + v) context / 2; "
        "or cache bytes / memory rate",
        "DeepSeek-V2 (arXiv:2405.04434), absorbed form for decode",
    ),
    "gate": ("2 x experts x dim x tokens", "DeepSeek-V3 (arXiv:2412.19437) 2.1.2"),
    "dispatch": (
        "rows x (dim x bytes + scales) x copies / link + latency x layers; "
        "copies: each chosen expert (decode), each node once (prefill)",
        "DeepEP README; DeepSeek-V3 3.2.2",
    ),
    "experts": (
        "2 x expert x rows / (peak x share) x (1 + tile / rows) x phi, or touched experts' bytes / memory rate",
        "parameters table; phi: balance.py",
    ),
    "shared expert": ("as projections", "DeepSeek-V3 2.1.2"),
    "combine": (
        "as dispatch with bf16 rows; with TP an all-reduce of 2 (n-1)/n x tokens x dim x 2 bytes",
        "DeepEP README",
    ),
    "head": ("2 x vocab x dim x new positions, or its bytes", "parameters table"),
    "small kernels": ("14 passes over the activations / memory rate + launch gaps x layers", "calibrated"),
    "host": ("a constant between steps", "calibrated"),
}


@dataclass(frozen=True)
class Line:
    """One number: what, how much, by which formula, from where."""

    part: str
    name: str
    value: str
    formula: str
    source: str


def explain(o: Option, c: Calibration, w: Workload) -> list[Line]:
    """All lines of an option at the users it is shown for."""
    served = serve(o.layout, c, w)
    out: list[Line] = []
    for u, _ in o.layout.units:
        label = u.role
        out += memory_lines(label, u, o.device)
        if u.role in ("decode", "mixed"):
            out += step_lines(f"{label}: decode step", served.decode, u, c, "decode")
        if u.role in ("prefill", "mixed"):
            out += step_lines(f"{label}: prefill step", served.prefill, u, c, "prefill")
    out += list(device_lines(o.device))
    out += [
        Line("rates", f.name, f"{getattr(c.rates, f.name):.4g}", "", "calibration.json")
        for f in fields(c.rates)
    ]  # fmt: skip
    out += [
        Line("users", "in flight", f"{served.in_flight:.0f}", "X x output x tpot (Little's law)", "serving.py"),
        Line("users", "prefill load", f"{served.load:.2f}", "prompts/s x prefill time / replicas", "serving.py"),
        Line("users", "time to first token", f"{served.ttft * 1e3:.0f} ms",
             "door + prefill + hand-over + wait; wait = M/D/m estimate or N / X_max - the rest", "serving.py"),
    ]  # fmt: skip
    return out


def step_lines(part: str, step: Step, u: Unit, c: Calibration, phase: str) -> list[Line]:
    factor = u.pool.factor(c, phase)
    lines = [Line(part, f"{t.name} ({t.bound})", f"{t.seconds * 1e3:.2f} ms", *FORMULAS[t.name]) for t in step.terms]
    how = "max(computing, sending) + hidden x min + host" if step.overlapped else "computing + sending + host"
    return [
        *lines,
        Line(
            part,
            "imbalance phi",
            f"{step.phi:.2f}",
            "1 + sqrt(2 ln ranks ((drift^2 + taste^2 / requests) / experts + 1 / rows))",
            "balance.py",
        ),
        Line(part, "factor", f"{factor:.3f}", f"engine x hardware x {phase}, shrunk to 1", "calibration.json"),
        Line(part, "step", f"{step.seconds * factor * 1e3:.2f} ms", how, "step.py"),
    ]


def memory_lines(part: str, u: Unit, device: Device) -> list[Line]:
    m = memory(u.pool.f, u.grid, device, drafts=u.pool.setup.draft)
    rows = (
        ("attention, dense layers, gate", m.dense, "parameters x bytes; heads cut by TP"),
        ("routed experts", m.experts, "ceil(slots / EP) experts a layer"),
        ("shared experts", m.shared, "cut by TP"),
        ("head and embedding", m.head, "cut by TP"),
        ("kept free", m.reserved, "10 % of memory and 6 GB"),
        ("cache", max(m.free, 0.0), f"what is left: {m.tokens:,} tokens of {m.kv_token:,.0f} bytes"),
    )
    return [Line(f"{part}: memory", n, f"{v / 1e9:.2f} GB", f, "parameters table") for n, v, f in rows]


def device_lines(d: Device) -> Iterator[Line]:
    source = "; ".join(SOURCES[s] for s in d.sources) or "given by you"
    for name, value, unit in (
        ("bf16", d.bf16 / 1e12, "TFLOP/s"), ("fp8", d.fp8 / 1e12, "TFLOP/s"), ("hbm", d.hbm / 1e9, "GB"),
        ("hbm_rate", d.hbm_rate / 1e9, "GB/s"), ("scale_up", d.scale_up / 1e9, "GB/s"), ("nic", d.nic / 1e9, "GB/s"),
    ):  # fmt: skip
        yield Line("device", name, f"{value:,.0f} {unit}{' (weak source)' if name in d.weak else ''}", "", source)
