"""Published measurements as cases: what was measured, and the prediction to hold beside it.

Two kinds of files are read: points of data/measured.json (a configuration and a few figures from each source) and rows
of data/inferencex.csv (InferenceX: closed-loop users on boxes and on small disaggregated clusters). A user's own
measurements come in the first kind's shape.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from brigade.plan.memory import memory
from brigade.plan.models import find_model, precision_of
from brigade.plan.rates import Calibration
from brigade.plan.serving import DESIGN_LOAD, Pool, Workload, accept_of, disaggregated, mixed, prefill_time
from brigade.plan.step import Setup, decode_step, prefill_step, tokens_per_step
from brigade.spec.device import Device, find_device
from brigade.spec.work import Grid

ALL_AT_ONCE = 1000
"""Users where a source says that all requests come at once: as many as its benchmark sends."""
TOKENS_PER_STEP = 16384
"""Tokens that a replica prefills in a step where a source does not say."""
SD = {"A": 0.035, "B": 0.06, "C": 0.25}
"""Standard deviation of the logarithm of a measured value, by the point's grade."""
ROW_SD = {"tpot": 0.16, "ttft": 0.35}


class BadPoints(ValueError):
    """A file of measurements that cannot be read. The message names the file, the point and the field."""


@dataclass(frozen=True)
class Case:
    """One measured value and how to predict it."""

    name: str
    source: str
    engine: str
    hardware: str
    phase: str
    """prefill, decode, mixed (a rate), tpot or ttft."""
    kind: str
    """wide (an EP unit over several nodes), unit (a single phase), box, row (agg), rows (disagg)."""
    workload: str
    metric: str
    measured: float
    sd: float
    predict: Callable[[Calibration], float]


def shipped_points() -> list[Case]:
    data = json.loads(_text("measured.json"))
    return [case for p in data["points"] for case in cases_of(p, "measured.json")]


def shipped_rows() -> list[Case]:
    rows = csv.DictReader(_text("inferencex.csv").splitlines())
    return [case for row in rows for case in row_cases(row)]


def _text(name: str) -> str:
    return (resources.files("brigade.plan") / "data" / name).read_text(encoding="utf-8")


def read_points(path: Path) -> list[Case]:
    """Cases of a user's file: {"points": [...]} or a CSV with InferenceX's columns. Raises BadPoints."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            return [case for row in csv.DictReader(text.splitlines()) for case in row_cases(row)]
        data = json.loads(text)
    except OSError as e:
        raise BadPoints(f"{path}: cannot be read ({e.strerror})") from e
    except (ValueError, KeyError) as e:
        raise BadPoints(f"{path}: cannot be understood ({e}); give JSON with 'points', or InferenceX's CSV") from e
    points = data.get("points") if isinstance(data, dict) else None
    if not isinstance(points, list) or not points:
        raise BadPoints(f"{path}: key 'points' must be a list of measurements; see docs/planning.md")
    return [case for p in points for case in cases_of(p, str(path))]


# Points ---------------------------------------------------------------------------------------------------------------

ENGINES = (
    ("deepseek inference", "deepseek"), ("v3/r1 inference", "deepseek"), ("profile-data", "deepseek"),
    ("ant group", "sglang"), ("dstack", "vllm"), ("cloudmatrix", "cloudmatrix"),
    ("xdeepserve", "xdeepserve"), ("ktransformers", "ktransformers"),
    ("xeon", "sglang-cpu"), ("tensorrt", "trtllm"), ("trt", "trtllm"), ("nvidia", "trtllm"), ("vllm", "vllm"),
    ("sglang", "sglang"), ("amd", "sglang"), ("rocm", "sglang"),
)  # fmt: skip


def cases_of(p: Mapping[str, Any], where: str) -> Iterator[Case]:
    """The cases of one point, one for each value named in its 'predict'. Raises BadPoints."""
    name = str(p.get("id", "?"))
    try:
        measured, work = p["measured"], p["workload"]
        for metric in p.get("predict") or list(measured):
            if metric in measured:
                predict = _prediction(p, metric)
                if predict is None:
                    continue
                device, phase, kind, fn = predict
                load = f"{work.get('isl', work.get('kv_len', '?'))}/{work.get('osl', '?')}"
                yield Case(
                    *(name, str(p.get("source", {}).get("title", where)), engine_of(p), device.name, phase, kind),
                    *(load, metric, float(measured[metric]), SD.get(str(p.get("grade", "B")), 0.1), fn),
                )
    except (KeyError, TypeError, AttributeError) as e:
        raise BadPoints(f"{where}: point '{name}' lacks or misstates {e}; see docs/planning.md") from e
    except ValueError as e:
        raise BadPoints(f"{where}: point '{name}': {e}") from e


def engine_of(p: Mapping[str, Any]) -> str:
    own = p.get("engine") or p.get("workload", {}).get("engine")
    text = str(own or p.get("source", {}).get("title", "")).lower()
    if not own and str(p.get("id", "")).startswith("sgl-"):
        return "sglang"
    return next((engine for key, engine in ENGINES if key in text), text or "unknown")


def _number(value: Any, default: float | None = None) -> float | None:
    """The number in a field that may be written for people: 256, "~3000 avg", "84-93" (their mean)."""
    if isinstance(value, bool) or value is None:
        return default
    if isinstance(value, (int, float)):
        return float(value)
    found = [float(x) for x in re.findall(r"\d+(?:\.\d+)?", str(value))][:2]
    if not found:
        return default
    return sum(found) / len(found) if "-" in str(value) else found[0]


def _prediction(p: Mapping[str, Any], metric: str) -> tuple[Device, str, str, Callable[[Calibration], float]] | None:
    """How to predict one value, or None where the point does not say enough."""
    hardware, parallel, work = p["hardware"], p["parallelism"], p["workload"]
    gpu, count = hardware.get("gpu"), _number(hardware.get("count"))
    if "fleet" in str(p.get("id")) or (gpu and not count):
        return None
    device, dies = _device(hardware)
    n = int((count or 1) * dies)
    model = find_model(_model_name(str(p["model"])))
    f = model.facts(_precision(str(p.get("precision", ""))))
    setup, grid = _setup(p, device), _grid(p, n, device, f.n_experts)
    if setup is None or grid is None:
        return None
    kind = "wide" if grid.ep > grid.per_node and grid.dp > 1 else "unit" if grid.ep > 1 and grid.dp > 1 else "box"
    if parallel.get("hybrid"):
        kind = "hybrid"
    pool = Pool(f, grid, device, setup, engine_of(p))
    n_in, n_out = _number(work.get("isl"), 0.0) or 0.0, _number(work.get("osl"), 1.0) or 1.0
    node = grid.per_node if metric.split("_")[-1] == "node" or "_node_" in metric else 1
    if metric.endswith("_npu"):
        node = dies
    if metric.endswith("_total"):
        node = n
    if metric.startswith("prefill_tok"):
        if not n_in and "computed" not in metric:
            return None
        tokens = min(
            _number(work.get("tokens_per_gpu")) or (_number(work.get("tokens_per_npu")) or 0) / dies or TOKENS_PER_STEP,
            1e9,
        )
        tokens *= 1 if grid.dp > 1 else grid.tp
        if kind == "hybrid":
            tokens = n_in
        return device, "prefill", kind, lambda c: node * _prefill_rate(pool, c, tokens, n_in or 4096, work)
    batch = _batch(work, grid, n, dies)
    if metric.startswith("decode_tok"):
        context = _number(work.get("kv_len")) or (n_in + n_out / 2 if n_in else None)
        if context is None:
            return None
        full = batch is None
        return device, "decode", kind, lambda c: node * _decode_rate(pool, c, batch, context, full)
    users = _number(work.get("concurrency")) or (ALL_AT_ONCE if "all at once" in str(work.get("rate")) else None)
    if users is None or not n_in or parallel.get("PD_split"):
        return None
    load = Workload(users, int(n_in), int(n_out) if work.get("osl") else 500)
    return device, _phase(metric), kind, lambda c: node * _mixed_value(pool, c, load, metric)


def _phase(metric: str) -> str:
    return {"tpot_ms": "tpot", "ttft_ms": "ttft"}.get(metric, "mixed")


def _prefill_rate(pool: Pool, c: Calibration, tokens: float, length: float, work: Mapping[str, Any]) -> float:
    hit = _number(work.get("cache_hit_rate"), 0.0) or 0.0
    new = length * (1 - hit)
    load = DESIGN_LOAD if "production" in str(work.get("traffic")) else 1.0
    step = prefill_step(pool.f, pool.grid, pool.device, c.rates, tokens, new, length - new, pool.setup)
    return load * tokens / (step.seconds * pool.factor(c, "prefill")) / pool.grid.tp


def _decode_rate(pool: Pool, c: Calibration, batch: float | None, context: float, full: bool) -> float:
    if full or batch is None:
        batch = max(1.0, memory(pool.f, pool.grid, pool.device).tokens / context)
    step = decode_step(pool.f, pool.grid, pool.device, c.rates, batch, context, pool.setup)
    per = tokens_per_step(pool.setup.draft, accept_of(pool.setup, c.rates))
    return batch * per / (step.seconds * pool.factor(c, "decode")) / pool.grid.tp


def _mixed_value(pool: Pool, c: Calibration, w: Workload, metric: str) -> float:
    s = mixed(pool, c, w)
    if metric == "tpot_ms":
        return s.tpot * 1e3
    if metric == "ttft_ms":
        return s.ttft * 1e3
    if metric.startswith("user_tok"):
        return 1 / s.tpot
    tokens = w.n_out + (w.n_in if metric.startswith(("total_tok", "tok_s_total")) else 0)
    return s.rate * tokens / pool.grid.n_gpus


def _device(hardware: Mapping[str, Any]) -> tuple[Device, int]:
    """The device of a point, and into how many dies its accelerators are cut where the source counts dies."""
    if not hardware.get("gpu"):
        return find_device("Xeon-6980P" if "6980P" in str(hardware.get("cpu")) else str(hardware.get("cpu"))), 1
    name = str(hardware["gpu"]).replace(" 24G", "").replace(" 48G", "").split(" non")[0].split("/")[0]
    device = find_device(name.replace(" ", "-") if name.startswith(("RTX", "Ascend")) else name.split("-")[0])
    if not hardware.get("dies"):
        return device, 1
    return halved(device), 2


def halved(d: Device) -> Device:
    """One die of an accelerator of two."""
    return replace(
        d, bf16=d.bf16 / 2, fp8=d.fp8 / 2, int8=d.int8 / 2, hbm=d.hbm / 2, hbm_rate=d.hbm_rate / 2,
        scale_up=d.scale_up / 2, nic=d.nic / 2, domain=d.domain * 2,
    )  # fmt: skip


def _model_name(text: str) -> str:
    low = text.lower()
    return next(
        (n for n in ("deepseek-v2", "qwen3-235b-a22b", "kimi-k2", "gpt-oss-120b", "glm-4.5") if n in low),
        "deepseek-v3" if "deepseek" in low else text,
    )


def _precision(text: str) -> Any:
    low = text.lower()
    kv = "fp8" if "fp8 kv" in low or "mla/kv" in low or "fp8 mla" in low else ""
    for key, name in ("fp4", "fp4"), ("int8", "int8"), ("int4", "int4"), ("q4", "int4"):
        if key in low.split(",")[0] or key in low.split("/")[0]:
            return precision_of(name, kv)
    found = precision_of("bf16" if low.startswith("bf16") else "fp8", kv)
    return replace(found, attention="fp8") if "fp8 mla" in low or "fp8 fa3" in low else found


def _setup(p: Mapping[str, Any], device: Device) -> Setup | None:
    flags, work, parallel = p.get("flags", {}), p["workload"], p["parallelism"]
    if parallel.get("MA_disagg") or parallel.get("weight_offload") or parallel.get("PP"):
        return None
    draft, accept = _draft(flags.get("MTP"))
    text = f"{work.get('eplb', '')} {work.get('routing', '')}"
    cpu = str(p["hardware"].get("cpu", ""))
    host = next((h for h in ("Xeon-6454S", "Xeon-6980P", "EPYC-9654") if h.split("-")[1] in cpu), None)
    on = find_device(host) if parallel.get("hybrid") and host else None
    return Setup(
        overlap=bool(flags.get("TBO") or flags.get("DBO")),
        draft=draft,
        perfect="perfect" in text,
        accept=accept,
        experts_on=on,
    )


def _draft(value: Any) -> tuple[int, float | None]:
    """Drafted tokens and the acceptance a source states: "1 token, 70% accept", "steps=2, accept ~2.4-2.7"."""
    if not value or value == "not stated":
        return 0, None
    text = str(value)
    if text == "simulated":
        return 1, 0.6  # the source emulates one drafted token with 60 % acceptance
    n = int(_number(re.sub(r"accept.*", "", text), 1.0) or 1)
    if (percent := re.search(r"(\d+)\s*%", text)) is not None:
        return n, float(percent[1]) / 100
    if "accept" in text:
        length = _number(text.split("accept", 1)[1])
        if length and length > 1:
            return n, _acceptance(n, length)
    return n, None


def _acceptance(n: int, length: float) -> float:
    """The chance a for which 1 + a + ... + a^n is `length`."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if tokens_per_step(n, middle) < length else (low, middle)
    return low


def _grid(p: Mapping[str, Any], n: int, device: Device, n_experts: int) -> Grid | None:
    hardware, parallel = p["hardware"], p["parallelism"]
    ep, tp = _number(parallel.get("EP")), _number(parallel.get("TP"))
    if parallel.get("hybrid"):
        return Grid(n, n, n, 1)
    if hardware.get("gpu") is None:
        return Grid(1, 1, 1, 1)
    if ep is None and tp is None:
        return None
    if ep and not parallel.get("PP") and n != ep and not tp and n % int(ep) == 0:
        n = int(ep)
    n = n if not (parallel.get("P") and tp) else int(tp)
    tp_n = (
        1
        if tp is None or "DP" in str(parallel.get("attn", "")) or int(_number(parallel.get("DP"), 0) or 0) > 1
        else int(tp)
    )
    ep_n = int(ep) if ep else (n if tp_n == 1 and n > 1 else 1)
    nodes = _number(hardware.get("nodes"), None)
    per_node = max(1, round(n / nodes)) if nodes and nodes > 1 else min(n, device.domain)
    if device.domain > 8:
        per_node = min(n, device.domain)
    given = _number(parallel.get("redundant_experts"))
    spare = -n_experts % ep_n if ep_n > 1 else 0
    if given is not None:
        spare = int(given)
    elif p.get("flags", {}).get("EPLB") and not spare:
        spare = 32
    return Grid(n, per_node, tp_n, ep_n, spare)


def _batch(work: Mapping[str, Any], grid: Grid, n: int, dies: int) -> float | None:
    """Requests on each attention replica."""
    for key in "batch_per_gpu", "concurrency_per_gpu", "implied_concurrency_per_gpu":
        if (b := _number(work.get(key))) is not None:
            return b * grid.tp
    if (b := _number(work.get("batch_per_npu"))) is not None:
        return b / dies
    if (b := _number(work.get("concurrency"))) is not None:
        return b * grid.tp / n
    return None


# InferenceX rows ------------------------------------------------------------------------------------------------------


def drafts_of(row: Mapping[str, str]) -> int:
    """Tokens drafted in a row. The file does not say; these releases and days halve the time per token of otherwise
    equal rows, so they are taken as InferenceX's runs with multi-token prediction: 3 tokens with TP, 1 with DP."""
    is_draft = row["backend_version"] == "1.2.0rc6.post3" or (
        row["backend_version"] == "1.1.0rc2.post2" and row["measured"].startswith("2026-01-14")
    )
    if row["mode"] != "agg" or not is_draft:
        return 0
    return 3 if int(row["attention_dp_size"]) == 1 else 1


def row_cases(row: Mapping[str, str]) -> Iterator[Case]:
    """Time per output token and time to first token of one row."""
    device = find_device(row["system"])
    precision = precision_of("fp4" if row["precision"] == "fp4" else "fp8", "fp8")
    f = find_model("deepseek-v3").facts(precision)
    users, n_in, n_out = int(row["conc"]), int(row["isl"]), int(row["osl"])
    w = Workload(users, n_in, n_out)
    agg = row["mode"] == "agg"
    if agg:
        grid = _row_grid(row, "", device)
        pool = Pool(f, grid, device, Setup(draft=drafts_of(row)), row["backend"])
        serve = lambda c: mixed(pool, c, w, min(float(users), 64.0) / grid.dp)  # noqa: E731
    else:
        setup = Setup()
        prefill = Pool(
            f, _row_grid(row, "prefill_", device), device, setup, row["backend"], int(row["prefill_num_workers"])
        )
        decode = Pool(
            f, _row_grid(row, "decode_", device), device, setup, row["backend"], int(row["decode_num_workers"])
        )
        cap = float(row["decode_batch_size"])
        serve = lambda c: disaggregated(prefill, decode, c, w, cap * 1.05)  # noqa: E731
    kind, load = ("row" if agg else "rows"), f"{n_in}/{n_out}"
    source = f"InferenceX {row['measured']}"
    for phase, value in ("tpot", row["silicon_tpot_ms"]), ("ttft", row["silicon_ttft_ms"]):
        pick = (lambda c, s=serve: s(c).tpot * 1e3) if phase == "tpot" else (lambda c, s=serve: s(c).ttft * 1e3)
        yield Case(
            *(row["id"], source, row["backend"], device.name, phase, kind, load, f"{phase}_ms", float(value)),
            *(ROW_SD[phase], pick),
        )


def _row_grid(row: Mapping[str, str], role: str, device: Device) -> Grid:
    tp, dp = int(row[f"{role}tp_size"]), int(row[f"{role}attention_dp_size"])
    ep = int(row[f"{role}moe_ep_size"])
    n = tp * dp
    return Grid(n, min(n, device.domain), tp, ep, 0 if 256 % ep == 0 else -256 % ep)


__all__ = [
    "BadPoints",
    "Case",
    "cases_of",
    "prefill_time",
    "read_points",
    "row_cases",
    "shipped_points",
    "shipped_rows",
]
