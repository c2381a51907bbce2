"""What the text of a published point says: engine, device, precision, grid and setup.

Fields may be written for people: "~3000 avg", "84-93", "1 token, 70% accept".
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from brigade.plan.models import precision_of
from brigade.plan.step import Setup, tokens_per_step
from brigade.spec.device import Device, find_device
from brigade.spec.work import Grid, Precision

ENGINES = (
    ("deepseek inference", "deepseek"), ("v3/r1 inference", "deepseek"), ("profile-data", "deepseek"),
    ("ant group", "sglang"), ("dstack", "vllm"), ("cloudmatrix", "cloudmatrix"),
    ("xdeepserve", "xdeepserve"), ("ktransformers", "ktransformers"),
    ("xeon", "sglang-cpu"), ("tensorrt", "trtllm"), ("trt", "trtllm"), ("nvidia", "trtllm"), ("vllm", "vllm"),
    ("sglang", "sglang"), ("amd", "sglang"), ("rocm", "sglang"),
)  # fmt: skip


def engine_of(p: Mapping[str, Any]) -> str:
    own = p.get("engine") or p.get("workload", {}).get("engine")
    text = str(own or p.get("source", {}).get("title", "")).lower()
    if not own and str(p.get("id", "")).startswith("sgl-"):
        return "sglang"
    return next((engine for key, engine in ENGINES if key in text), text or "unknown")


def number(value: Any, default: float | None = None) -> float | None:
    """The number in a field that may be written for people: 256, "~3000 avg", "84-93" (their mean)."""
    if isinstance(value, bool) or value is None:
        return default
    if isinstance(value, (int, float)):
        return float(value)
    found = [float(x) for x in re.findall(r"\d+(?:\.\d+)?", str(value))][:2]
    if not found:
        return default
    return sum(found) / len(found) if "-" in str(value) else found[0]


def device_of(hardware: Mapping[str, Any]) -> tuple[Device, int]:
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


def model_name(text: str) -> str:
    low = text.lower()
    return next(
        (n for n in ("deepseek-v2", "qwen3-235b-a22b", "kimi-k2", "gpt-oss-120b", "glm-4.5") if n in low),
        "deepseek-v3" if "deepseek" in low else text,
    )


def precision_from(text: str) -> Precision:
    low = text.lower()
    kv = "fp8" if "fp8 kv" in low or "mla/kv" in low or "fp8 mla" in low else ""
    for key, name in ("fp4", "fp4"), ("int8", "int8"), ("int4", "int4"), ("q4", "int4"):
        if key in low.split(",")[0] or key in low.split("/")[0]:
            return precision_of(name, kv)
    found = precision_of("bf16" if low.startswith("bf16") else "fp8", kv)
    return replace(found, attention="fp8") if "fp8 mla" in low or "fp8 fa3" in low else found


def setup_of(p: Mapping[str, Any], device: Device) -> Setup | None:
    flags, work, parallel = p.get("flags", {}), p["workload"], p["parallelism"]
    if parallel.get("MA_disagg") or parallel.get("weight_offload") or parallel.get("PP"):
        return None
    draft, accept = _drafts(flags.get("MTP"))
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


def _drafts(value: Any) -> tuple[int, float | None]:
    """Drafted tokens and the acceptance a source states: "1 token, 70% accept", "steps=2, accept ~2.4-2.7"."""
    if not value or value == "not stated":
        return 0, None
    text = str(value)
    if text == "simulated":
        return 1, 0.6  # the source emulates one drafted token with 60 % acceptance
    n = int(number(re.sub(r"accept.*", "", text), 1.0) or 1)
    if (percent := re.search(r"(\d+)\s*%", text)) is not None:
        return n, float(percent[1]) / 100
    if "accept" in text:
        length = number(text.split("accept", 1)[1])
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


def grid_of(p: Mapping[str, Any], n: int, device: Device, n_experts: int) -> Grid | None:
    hardware, parallel = p["hardware"], p["parallelism"]
    ep, tp = number(parallel.get("EP")), number(parallel.get("TP"))
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
        if tp is None or "DP" in str(parallel.get("attn", "")) or int(number(parallel.get("DP"), 0) or 0) > 1
        else int(tp)
    )
    ep_n = int(ep) if ep else (n if tp_n == 1 and n > 1 else 1)
    nodes = number(hardware.get("nodes"), None)
    per_node = max(1, round(n / nodes)) if nodes and nodes > 1 else min(n, device.domain)
    if device.domain > 8:
        per_node = min(n, device.domain)
    given = number(parallel.get("redundant_experts"))
    spare = -n_experts % ep_n if ep_n > 1 else 0
    if given is not None:
        spare = int(given)
    elif p.get("flags", {}).get("EPLB") and not spare:
        spare = 32
    return Grid(n, per_node, tp_n, ep_n, spare, int(number(parallel.get("shared_expert_ranks"), 0.0) or 0))


def batch_of(work: Mapping[str, Any], grid: Grid, n: int, dies: int) -> float | None:
    """Requests on each attention replica."""
    for key in "batch_per_gpu", "concurrency_per_gpu", "implied_concurrency_per_gpu":
        if (b := number(work.get(key))) is not None:
            return b * grid.tp
    if (b := number(work.get("batch_per_npu"))) is not None:
        return b / dies
    if (b := number(work.get("concurrency"))) is not None:
        return b * grid.tp / n
    return None
