"""Published measurements beside what the planner says of them: points, ratios, and DeepSeek's fleet of a day."""

from collections.abc import Iterable
from dataclasses import dataclass

from brigade.plan.case import Case
from brigade.plan.fit import error
from brigade.plan.models import find_model
from brigade.plan.points import shipped_points
from brigade.plan.rates import Calibration
from brigade.plan.step import Setup, decode_step, prefill_step, tokens_per_step
from brigade.spec.device import find_device
from brigade.spec.work import FP8, Grid

DAY = 86_400.0


@dataclass(frozen=True)
class Compared:
    """One line."""

    name: str
    what: str
    measured: float
    predicted: float
    low: float
    high: float
    source: str

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def inside(self) -> bool:
        return self.low <= self.measured <= self.high


def compare(cases: Iterable[Case], c: Calibration) -> list[Compared]:
    """Every case with its prediction and 80 % interval."""
    out = []
    for case in cases:
        predicted = case.measured * (1 + error(case, c))
        phase = {"mixed": "decode", "tpot": "decode"}.get(case.phase, case.phase)
        half = c.half_width(case.engine, case.hardware, phase)
        low, high = predicted * 2.718281828**-half, predicted * 2.718281828**half
        out.append(Compared(case.name, case.metric, case.measured, predicted, low, high, case.source))
    return out


def ratios(c: Calibration) -> list[Compared]:
    """The seven ratios that were measured in public."""
    by = {case.name: case.predict(c) for case in shipped_points()}
    f = find_model("deepseek-v3").facts(FP8)
    h200 = find_device("H200")

    def vllm_prefill(ep: int) -> float:
        step = prefill_step(f, Grid(ep, 8, 1, ep, 0), h200, c.rates, 16384, 2000, 0)
        return 16384 / step.seconds

    def long_context(draft: int) -> float:
        grid = Grid(8, 8, 1, 8, 0)  # the ratio's source names no unit: one box, two requests on each card
        step = decode_step(f, grid, h200, c.rates, 2, 65_536, Setup(draft=draft))
        return tokens_per_step(draft, c.rates.accept) / step.seconds

    rows = (
        ("vLLM H200 decode EP96/EP32", 0.90, by["vllm-h200-decode-ep96"] / by["vllm-h200-decode-ep32"]),
        ("SGLang H100 EP72 decode, overlap/none", 1.25, by["sgl-h100-decode-ep72"] / by["sgl-h100-decode-ep72-noTBO"]),
        ("DeepSeek decode, production/profile", 0.80, by["ds-prod-decode"] / by["ds-profile-decode"]),
        ("SGLang prefill, 1k/4k prompts", 1.15, by["sgl-h100-prefill-1024"] / by["sgl-h100-prefill-4096"]),
        ("SGLang prefill, perfect/default balance", 1.18,
         by["sgl-h100-prefill-4096-perfect"] / by["sgl-h100-prefill-4096"]),
        ("vLLM prefill EP32/EP16", 0.73, vllm_prefill(32) / vllm_prefill(16)),
        ("SGLang H200, 64k context, batch 2, MTP-3/none", 1.35, long_context(3) / long_context(0)),
    )  # fmt: skip
    return [Compared(n, "ratio", m, p, m * 0.9, m * 1.1, "within 10 % wanted") for n, m, p in rows]


def fleet(c: Calibration) -> list[Compared]:
    """DeepSeek's day of 608 G input and 168 G output tokens, with published and with predicted rates per node."""
    by = {case.name: case.predict(c) for case in shipped_points()}
    hit, tokens_in, tokens_out, price, revenue = 0.563, 608e9, 168e9, 2.0, 562_027.0
    source = "DeepSeek, inference system overview (day 6)"
    out = []
    for label, per_prefill, per_decode in (
        ("published rates", 73_700.0, 14_800.0),
        ("predicted rates", by["ds-prod-prefill"] * 8 / (1 - hit), by["ds-prod-decode"] * 8),
    ):
        nodes = tokens_in / DAY / per_prefill + tokens_out / DAY / per_decode
        cost = nodes * 8 * 24 * price
        for what, measured, value in (
            ("input tok/s per prefill node, hits counted", 73_700, per_prefill),
            ("of these computed", 32_207, per_prefill * (1 - hit)),
            ("output tok/s per decode node", 14_800, per_decode),
            ("nodes on average", 226.75, nodes),
            ("dollars a day", 87_072, cost),
            ("profit over cost", 5.45, revenue / cost - 1),
        ):
            out.append(Compared(f"fleet, {label}", what, measured, value, 0, 1e12, source))
    return out
