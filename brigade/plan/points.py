"""Published measurements as cases: what was measured, and the prediction to hold beside it.

Two kinds of files are read: points of data/measured.json (a configuration and a few figures from each source) and rows
of data/inferencex.csv (rows.py). A user's own measurements come in the first kind's shape.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from brigade.plan.benched import is_bench, with_bench
from brigade.plan.case import SD, BadPoints, Case
from brigade.plan.described import batch_of, device_of, engine_of, grid_of, model_name, number, precision_from, setup_of
from brigade.plan.memory import memory
from brigade.plan.models import find_model
from brigade.plan.rates import Calibration
from brigade.plan.rows import row_cases
from brigade.plan.serving import DESIGN_LOAD, Pool, Workload, accept_of, mixed
from brigade.plan.step import decode_step, prefill_step, tokens_per_step
from brigade.spec.device import Device

ALL_AT_ONCE = 1000
"""Users where a source says that all requests come at once: as many as its benchmark sends."""
FLEET = "ds-prod-fleet"
TOKENS_PER_STEP = 16384
"""Tokens that a replica prefills in a step where a source does not say."""


def shipped_points() -> list[Case]:
    """Those that are fitted."""
    return [case for p in _shipped() if not p.get("aside") for case in cases_of(p, "measured.json")]


def kept_aside() -> list[Case]:
    """Those that are not: they judge the planner."""
    return [case for p in _shipped() if p.get("aside") for case in cases_of(p, "measured.json")]


def not_predicted() -> list[str]:
    """Names of points that say too little, or of what is not modelled; the fleet is a sum of its own (reproduce.py)."""
    return [p["id"] for p in _shipped() if p["id"] != FLEET and not list(cases_of(p, "measured.json"))]


def _shipped() -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = json.loads(_text("measured.json"))["points"]
    return points


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
            return _some([case for row in csv.DictReader(text.splitlines()) for case in row_cases(row)])
        data = json.loads(text)
    except OSError as e:
        raise BadPoints(f"{path}: cannot be read ({e.strerror})") from e
    except BadPoints as e:
        raise BadPoints(f"{path}: {e}") from e
    except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as e:
        raise BadPoints(f"{path}: cannot be understood ({e}); give JSON with 'points', or InferenceX's CSV") from e
    if is_bench(data):
        raise BadPoints(
            f"{path}: is what brigade bench measured, and does not say on what; name it as 'bench' in a point, see "
            "docs/planning.md"
        )
    points = data.get("points") if isinstance(data, dict) else None
    if not isinstance(points, list) or not points:
        raise BadPoints(f"{path}: key 'points' must be a list of measurements; see docs/planning.md")
    whole = (with_bench(p, path) if isinstance(p, Mapping) and "bench" in p else p for p in points)
    return _some([case for p in whole for case in cases_of(p, str(path))])


def _some(cases: list[Case]) -> list[Case]:
    if not cases:
        raise BadPoints("no point says enough to be predicted; see docs/planning.md")
    return cases


def cases_of(p: Mapping[str, Any], where: str) -> Iterator[Case]:
    """The cases of one point, one for each value named in its 'predict'. Raises BadPoints."""
    if not isinstance(p, Mapping):
        raise BadPoints(f"{where}: a point must be keys with values, not {str(p)[:40]!r}; see docs/planning.md")
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


def _prediction(p: Mapping[str, Any], metric: str) -> tuple[Device, str, str, Callable[[Calibration], float]] | None:
    """How to predict one value, or None where the point does not say enough."""
    hardware, parallel, work = p["hardware"], p["parallelism"], p["workload"]
    gpu, count = hardware.get("gpu"), number(hardware.get("count"))
    if "fleet" in str(p.get("id")) or (gpu and not count):
        return None
    device, dies = device_of(hardware)
    n = int((count or 1) * dies)
    model = find_model(model_name(str(p["model"])))
    f = model.facts(precision_from(str(p.get("precision", ""))))
    setup, grid = setup_of(p, device), grid_of(p, n, device, f.n_experts)
    if setup is None or grid is None:
        return None
    kind = "wide" if grid.ep > grid.per_node and grid.dp > 1 else "unit" if grid.ep > 1 and grid.dp > 1 else "box"
    if parallel.get("hybrid"):
        kind = "hybrid"
    pool = Pool(f, grid, device, setup, engine_of(p))
    n_in, n_out = number(work.get("isl"), 0.0) or 0.0, number(work.get("osl"), 1.0) or 1.0
    node = grid.per_node if metric.split("_")[-1] == "node" or "_node_" in metric else 1
    if metric.endswith("_npu"):
        node = dies
    if metric.endswith("_total"):
        node = n
    if metric.startswith("prefill_tok"):
        if not n_in and "computed" not in metric:
            return None
        tokens = min(
            number(work.get("tokens_per_gpu")) or (number(work.get("tokens_per_npu")) or 0) / dies or TOKENS_PER_STEP,
            1e9,
        )
        tokens *= 1 if grid.dp > 1 else grid.tp
        if kind == "hybrid":
            tokens = n_in
        return device, "prefill", kind, lambda c: node * _prefill_rate(pool, c, tokens, n_in or 4096, work)
    batch = batch_of(work, grid, n, dies)
    if metric.startswith("decode_tok"):
        context = number(work.get("kv_len")) or (n_in + n_out / 2 if n_in else None)
        if context is None:
            return None
        full = batch is None
        return device, "decode", kind, lambda c: node * _decode_rate(pool, c, batch, context, full)
    users = number(work.get("concurrency")) or (ALL_AT_ONCE if "all at once" in str(work.get("rate")) else None)
    if users is None or not n_in or parallel.get("PD_split"):
        return None
    load = Workload(users, int(n_in), int(n_out) if work.get("osl") else 500)
    return device, _phase(metric), kind, lambda c: node * _mixed_value(pool, c, load, metric)


def _phase(metric: str) -> str:
    return {"tpot_ms": "tpot", "ttft_ms": "ttft"}.get(metric, "mixed")


def _prefill_rate(pool: Pool, c: Calibration, tokens: float, length: float, work: Mapping[str, Any]) -> float:
    hit = number(work.get("cache_hit_rate"), 0.0) or 0.0
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
