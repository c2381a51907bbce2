"""Rows of InferenceX as cases: closed-loop users on boxes and on small disaggregated clusters."""

from collections.abc import Iterator, Mapping

from brigade.plan.case import ROW_SD, Case
from brigade.plan.models import find_model, precision_of
from brigade.plan.rates import Calibration
from brigade.plan.serving import Pool, Served, Workload, disaggregated, mixed
from brigade.plan.step import Setup
from brigade.spec.device import Device, find_device
from brigade.spec.work import Grid


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
    engine = row["backend"]
    agg = row["mode"] == "agg"
    if agg:
        grid = _row_grid(row, "", device)
        pool = Pool(f, grid, device, Setup(draft=drafts_of(row)), engine)

        def serve(c: Calibration) -> Served:
            return mixed(pool, c, w, min(float(users), 64.0) / grid.dp)

    else:
        prefill, decode = (
            Pool(f, _row_grid(row, f"{role}_", device), device, Setup(), engine, int(row[f"{role}_num_workers"]))
            for role in ("prefill", "decode")
        )
        cap = float(row["decode_batch_size"]) * 1.05

        def serve(c: Calibration) -> Served:
            return disaggregated(prefill, decode, c, w, cap)

    common = {
        "name": row["id"], "source": f"InferenceX {row['measured']}", "engine": engine, "hardware": device.name,
        "kind": "row" if agg else "rows", "workload": f"{n_in}/{n_out}",
    }  # fmt: skip
    yield Case(
        **common, phase="tpot", metric="tpot_ms", measured=float(row["silicon_tpot_ms"]), sd=ROW_SD["tpot"],
        predict=lambda c: serve(c).tpot * 1e3,
    )  # fmt: skip
    yield Case(
        **common, phase="ttft", metric="ttft_ms", measured=float(row["silicon_ttft_ms"]), sd=ROW_SD["ttft"],
        predict=lambda c: serve(c).ttft * 1e3,
    )  # fmt: skip


def _row_grid(row: Mapping[str, str], role: str, device: Device) -> Grid:
    tp, dp = int(row[f"{role}tp_size"]), int(row[f"{role}attention_dp_size"])
    ep = int(row[f"{role}moe_ep_size"])
    n = tp * dp
    return Grid(n, min(n, device.domain), tp, ep, 0 if 256 % ep == 0 else -256 % ep)
