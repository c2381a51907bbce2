"""Every number of an option with its formula and source: the terms of a step, the memory of a rank, the rates used."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

from brigade.plan.ask import serve
from brigade.plan.memory import kept_bytes, memory
from brigade.plan.question import Option
from brigade.plan.rates import Calibration
from brigade.plan.reasons import ROLES
from brigade.plan.say import Say, say
from brigade.plan.serving import Workload
from brigade.plan.step import Step, Term
from brigade.plan.units import Unit
from brigade.spec.device import SOURCES, Device

Text = Say | str
TABLE = say("table of parameters")
CALIBRATED = say("calibrated on measurements")
FORMULAS: Mapping[str, tuple[Text, Text]] = {
    "projections": (
        say("2 x parameters x tokens / (peak x share), or weights / memory rate"),
        say("table of parameters; DeepSeek-V2 2.1"),
    ),
    "core attention": (
        say(
            "FLOPs a token and layer: decode 2 heads (2 r + rope) context, prefill 2 heads (qk + v) context / 2; cache "
            "bytes / memory rate; both together as the root of their squares"
        ),
        say("DeepSeek-V2 (arXiv:2405.04434), absorbed form for decode"),
    ),
    "gate": ("2 x experts x dim x tokens", "DeepSeek-V3 (arXiv:2412.19437) 2.1.2"),
    "dispatch": (
        say(
            "rows x (dim x bytes + scales) x copies / link + latency x layers; copies: each chosen expert (decode), "
            "each node once (prefill)"
        ),
        "DeepEP README; DeepSeek-V3 3.2.2",
    ),
    "experts": (
        say(
            "2 x expert x rows / (peak x share) x (1 + tile / rows) x phi, or bytes of the experts in use / memory rate"
        ),
        say("table of parameters; phi: balance.py"),
    ),
    "shared expert": (say("as projections"), "DeepSeek-V3 2.1.2"),
    "combine": (
        say("as dispatch with bf16 rows; with TP an all-reduce of 2 (n-1)/n x tokens x dim x 2 bytes"),
        "DeepEP README",
    ),
    "head": (say("2 x vocabulary x dim x new positions, or its bytes / memory rate"), TABLE),
    "small kernels": (say("14 passes over the activations / memory rate + launch gaps x layers"), CALIBRATED),
    "host": (say("a constant between two steps"), CALIBRATED),
    "stages": (say("(stages - 1) x (tokens x dim x 2 bytes / NIC + latency)"), CALIBRATED),
}


@dataclass(frozen=True)
class Line:
    """One number: what, how much, by which formula, from where."""

    part: Text
    name: Text
    value: Text
    formula: Text
    source: Text


def explain(o: Option, c: Calibration, w: Workload) -> list[Line]:
    """All lines of an option at the users it is shown for."""
    served = serve(o.layout, c, w)
    out: list[Line] = []
    for u, _ in o.layout.units:
        out += memory_lines(u)
        if u.role in ("decode", "mixed"):
            out += step_lines(served.decode, u, c, "decode")
        if u.role in ("prefill", "mixed"):
            out += step_lines(served.prefill, u, c, "prefill")
    for device in o.devices:
        out += list(device_lines(device))
    out += [
        Line(say("rates"), f.name, f"{getattr(c.rates, f.name):.4g}", RATES.get(f.name, ""), "calibration.json")
        for f in fields(c.rates)
    ]
    users = say("users")
    return [
        *out,
        Line(users, say("in flight"), f"{served.in_flight:.0f}", say("X x output x tpot (Little's law)"), "serving.py"),
        Line(
            users, say("prefill load"), f"{served.load:.2f}", say("prompts/s x prefill time / replicas"), "serving.py"
        ),
        Line(
            users, say("time to first token"), f"{served.ttft * 1e3:.0f} ms",
            say("door + prefill + hand-over + wait; wait = M/D/m estimate or N / X_max - the rest"), "serving.py",
        ),
        Line(
            users, say("time per token"), f"{served.tpot * 1e3:.1f} ms",
            say("decode step / tokens a step, and on mixed units the prefills that it meets"), "serving.py",
        ),
    ]  # fmt: skip


def step_lines(step: Step, u: Unit, c: Calibration, phase: str) -> list[Line]:
    part = say("{role}: a {phase} step", role=ROLES[u.role], phase=ROLES[phase])
    factor = u.pool.factor(c, phase)
    lines = [
        Line(part, say("{term} ({bound})", term=say(t.name), bound=say(t.bound)), _time(t), *FORMULAS[t.name])
        for t in step.terms
    ]
    how = say("max(computing, sending) + hidden x min + host") if step.overlapped else say("computing + sending + host")
    return [
        *lines,
        Line(part, say("imbalance phi"), f"{step.phi:.2f}",
             "1 + sqrt(2 ln ranks ((drift^2 + taste^2 / requests) / experts + 1 / rows))", "balance.py"),
        Line(part, say("factor"), f"{factor:.3f}",
             say("engine x hardware x {phase}, shrunk to 1", phase=ROLES[phase]), "calibration.json"),
        Line(part, say("step"), f"{step.seconds * factor * 1e3:.2f} ms", how, "step.py"),
    ]  # fmt: skip


def _time(t: Term) -> str:
    """A term's time, and its work: products, bytes of memory or of the link; of a half where two micro-batches run."""
    parts = [f"{t.op.flops / 1e12:.3g} TFLOP"] if t.op.flops else []
    n_bytes = t.op.n_bytes + t.op.wire
    parts += [f"{n_bytes / 1e9:.3g} GB"] if n_bytes else []
    return f"{t.seconds * 1e3:.2f} ms" + (f" ({', '.join(parts)})" if parts else "")


def memory_lines(u: Unit) -> list[Line]:
    m = memory(u.pool.f, u.grid, u.pool.device, drafts=u.pool.setup.draft)
    rows = (
        ("attention, dense, gate", m.dense, say("parameters x bytes; heads cut by TP, layers by PP")),
        ("routed experts", m.experts, say("ceil(slots / EP) experts a layer")),
        ("shared experts", m.shared, say("cut by TP")),
        ("head and embedding", m.head, say("cut by TP")),
        ("kept free", m.reserved, say("10 % of memory and {kept:g} GB", kept=kept_bytes(u.pool.device) / 1e9)),
        ("cache", max(m.free, 0.0),
         say("what is left: {tokens:,} tokens of {each:,.0f} bytes", tokens=m.tokens, each=m.kv_token)),
    )  # fmt: skip
    part = say("{role}: memory", role=ROLES[u.role])
    kept = say("a common setting of engines")
    return [Line(part, say(n), f"{v / 1e9:.2f} GB", f, kept if n == "kept free" else TABLE) for n, v, f in rows]


def device_lines(d: Device) -> Iterator[Line]:
    source: Text = "; ".join(SOURCES[s] for s in d.sources) or say("given by you")
    for name, value, unit in (
        ("bf16", d.bf16 / 1e12, "TFLOP/s"), ("fp8", d.fp8 / 1e12, "TFLOP/s"), ("fp4", d.fp4 / 1e12, "TFLOP/s"),
        ("int8", d.int8 / 1e12, "TOP/s"), ("hbm", d.hbm / 1e9, "GB"), ("hbm_rate", d.hbm_rate / 1e9, "GB/s"),
        ("scale_up", d.scale_up / 1e9, "GB/s"), ("nic", d.nic / 1e9, "GB/s"), ("watts", d.watts, "W"),
        ("price", d.price or 0.0, "$/h"),
    ):  # fmt: skip
        if value:
            text = f"{value:,.5g} {unit}"
            shown = say("{text} (weak source)", text=text) if name in d.weak else text
            yield Line(say("device {name}", name=d.name), name, shown, "", source)


RATES: Mapping[str, Say] = {
    "gemm": say("share of peak, large products of prefill steps"),
    "gemm_decode": say("share of peak, products of decode steps"),
    "falloff": say("exponent with which shares fall as the device grows"),
    "gemm4": say("share of peak with FP4 weights"),
    "memory": say("share of the memory's rate"),
    "stream": say("share of the memory's rate, routed experts"),
    "host_memory": say("share of a CPU host's memory rate"),
    "tile": say("rows at which an expert's product reaches half of its speed"),
    "core_decode": say("share of peak, core attention of decode steps"),
    "core_prefill": say("share of peak, core attention of prefill steps"),
    "passes": say("times the 14 passes of small kernels"),
    "up": say("share of the scale-up link in all-reduces"),
    "fan": say("share of the scale-up link in dispatch and combine"),
    "out": say("share of the NIC"),
    "layer_us": say("small kernels and gaps of a layer in a decode step, microseconds"),
    "host_ms": say("between two steps, milliseconds"),
    "draft_ms": say("scheduling of a drafting pass, milliseconds"),
    "exchange_us": say("latency of a dispatch or combine over NICs, microseconds"),
    "near_us": say("latency of a dispatch or combine over the scale-up link, microseconds"),
    "reduce_us": say("latency of an all-reduce, microseconds"),
    "hidden": say("with overlap: part of the shorter that is not hidden"),
    "drift": say("spread of expert loads that is left after balancing"),
    "taste": say("spread of the expert loads of one request"),
    "felt": say("part of the busiest rank's excess that sending feels"),
    "accept": say("chance that a drafted token is accepted"),
    "mixing": say("mixed units: what a prefill adds to the decode steps beside it, in its own time"),
    "stagger": say("replicas in step: how much longer prefills hold up all of them"),
    "ttft_ms": say("door, tokenizer, first scheduling, milliseconds"),
    "alone": say("prefill time that counts for the first token, mixed units"),
    "alone_apart": say("prefill time that counts for the first token, prefill units"),
    "gather": say("replicas in step: times the time to first token"),
    "waiting": say("times the queueing estimate"),
    "burst": say("weight of the queue when all users start at once (benchmarks only)"),
    "transfer": say("times the wire time of a handed-over cache"),
    "chunk_us": say("small kernels and gaps of a layer in a prefill step, microseconds"),
}
