"""What a device can do: dense peak rates, memory, links and price of each accelerator and host, with sources.

Numbers are per accelerator and in base units (FLOP/s, bytes, bytes/s, dollars/hour, watts). Links are one direction.
Dense means without structured sparsity. A field named in `weak` rests on one unverified or conflicting source, and the
planner widens its interval for it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches

TERA, GIGA = 1e12, 1e9
MOST_NAME_CHARS = 60
LEAST, MOST = 1e-3, 1e6
"""Of the numbers of a device that a user describes, in the units people write."""

SOURCES = {
    "a": "aiconfigurator-core 0.12.0, systems/*.yaml (PyPI wheel, Apache-2.0)",
    "b": "Ant Group, DeepSeek-R1 on H20 with SGLang, spec table (2025-09-26)",
    "c": "DeepEP docs/legacy.md: NVLink ~160 GB/s usable on H800",
    "d": "FlashMLA docs/20250422: 865 TFLOP/s practical BF16 on H800",
    "e": "DeepSeek open-infra-index, day 6: $2 per H800 GPU hour",
    "f": "Kimi-K2 on 128 H200 blog: $2.3 per H200 hour",
    "g": "shallowsim device/gpu_info.csv",
    "h": "web pages that contradict each other",
    "j": "CloudMatrix384 paper (arXiv:2506.12708)",
    "m": "KTransformers AMX.md: AMX measured per socket",
    "n": "KTransformers tutorial: 8 channels of DDR5-4800 per socket",
    "o": "Intel Xeon 6 with SGLang (lmsys.org, 2025-07-14): 1.45 TB/s effective",
    "p": "llm-d-planner 0.3.3 gpu_catalog.json (list prices)",
    "t": "KTransformers V3-success.md",
    "r": "AMD, win on TCO (2026-05-27)",
    "u": "the file given with --device",
    "v": "vendor data sheet, quoted from memory",
}


class BadDevice(ValueError):
    """A device that is not known or not described fully. The message names the nearest known one or the field."""


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator, or one host whose processors compute."""

    name: str
    bf16: float
    """FLOP/s."""
    fp8: float
    """FLOP/s; where there is no FP8 unit, the rate at which FP8 weights are multiplied (BF16)."""
    hbm: float
    """Bytes of memory."""
    hbm_rate: float
    """Bytes/s of that memory."""
    scale_up: float
    """Bytes/s to the others of its node (NVLink, xGMI, HCCS, PCIe)."""
    nic: float
    """Bytes/s to other nodes."""
    fp4: float = 0.0
    """FLOP/s; 0: FP4 weights are expanded and multiplied at `fp8`."""
    int8: float = 0.0
    """Operations/s; 0: as `fp8`."""
    domain: int = 8
    """Accelerators that `scale_up` joins."""
    price: float | None = None
    """Dollars per accelerator and hour; None: nobody publishes one."""
    watts: float = 700.0
    kind: str = "gpu"
    """'gpu' or 'cpu': a CPU host holds the routed experts in its own memory."""
    sources: str = ""
    """Letters of SOURCES."""
    weak: frozenset[str] = frozenset()

    def rate(self, precision: str) -> float:
        """FLOP/s of a product whose weights have this precision."""
        if precision in ("fp4", "int4"):
            return self.fp4 or self.rate("fp8")
        if precision == "int8":
            return self.int8 or self.fp8
        return self.fp8 if precision == "fp8" else self.bf16

    @property
    def is_weak(self) -> bool:
        return bool(self.weak & {"bf16", "fp8", "hbm_rate", "nic", "scale_up"})


def _d(
    name: str,
    bf16: float,
    fp8: float,
    fp4: float,
    hbm: float,
    hbm_rate: float,
    scale_up: float,
    nic: float,
    sources: str,
    *,
    price: float | None = None,
    watts: float = 700,
    domain: int = 8,
    int8: float = 0,
    weak: str = "watts",
    kind: str = "gpu",
) -> Device:
    """A row of the table in the units people write: TFLOP/s, GB, TB/s, GB/s."""
    return Device(
        name=name,
        bf16=bf16 * TERA,
        fp8=fp8 * TERA,
        fp4=fp4 * TERA,
        int8=int8 * TERA,
        hbm=hbm * GIGA,
        hbm_rate=hbm_rate * TERA,
        scale_up=scale_up * GIGA,
        nic=nic * GIGA,
        domain=domain,
        price=price,
        watts=watts,
        kind=kind,
        sources=sources,
        weak=frozenset(weak.split()),
    )


#      name              BF16   FP8   FP4  GB  TB/s  scale-up NIC  sources
_ROWS = [
    _d("A100", 312, 312, 0, 80, 2.04, 300, 25, "apv", int8=624, price=3.5, watts=400),
    _d("A800", 312, 312, 0, 80, 2.04, 200, 25, "av", int8=624, watts=400, weak="watts scale_up"),
    _d("H800", 989, 1979, 0, 80, 3.35, 200, 50, "bcdev", price=2.0),
    _d("H100", 989, 1979, 0, 80, 3.35, 450, 50, "apv", price=4.5),
    _d("H200", 989, 1979, 0, 141, 4.8, 450, 50, "afpv", price=2.3),
    _d("H20", 148, 296, 0, 96, 4.0, 450, 25, "bv", watts=400),
    _d("L20", 119.5, 239, 0, 48, 0.864, 32, 50, "apv", price=2.0, watts=275, weak="bf16 fp8 nic watts"),
    _d("L40S", 181, 366, 0, 48, 0.864, 32, 50, "av", watts=350, weak="bf16 fp8 nic watts"),
    _d("RTX-PRO-6000", 468, 936, 1871, 96, 1.79, 64, 50, "av", watts=600, weak="nic watts"),
    _d("RTX-4090", 165, 330, 0, 24, 1.0, 32, 12.5, "v", watts=450, weak="bf16 fp8 nic watts"),
    _d("RTX-4090D", 147, 294, 0, 24, 1.0, 32, 12.5, "v", watts=425, weak="bf16 fp8 nic watts"),
    _d("B200", 2250, 4500, 9000, 180, 7.7, 900, 50, "apv", price=7.25, watts=1000),
    _d("B300", 2250, 4500, 14000, 288, 7.75, 900, 100, "av", watts=1200),
    _d("GB200", 2500, 5000, 10000, 186, 8.0, 900, 50, "av", domain=72, watts=1200),
    _d("GB300", 2500, 5000, 15000, 288, 8.0, 900, 100, "av", domain=72, watts=1400, weak="nic watts"),
    _d("MI300X", 1307, 2614, 0, 192, 5.3, 448, 50, "gpv", price=3.75, watts=750),
    _d("MI325X", 1307, 2614, 0, 256, 6.0, 448, 50, "v", watts=1000, weak="bf16 fp8 hbm_rate watts"),
    _d("MI355X", 2500, 5000, 10000, 288, 8.0, 538, 50, "rv", watts=1400, weak="bf16 fp8 hbm_rate scale_up watts"),
    _d("Ascend-910B", 313, 313, 0, 64, 1.6, 196, 25, "h", int8=626, watts=400, weak="bf16 fp8 hbm_rate scale_up watts"),
    _d("Ascend-910C", 752, 752, 0, 128, 3.2, 392, 392, "jv", int8=1504, domain=384, watts=800, weak="watts nic"),
    _d("Xeon-6454S", 42, 70, 0, 1000, 0.61, 20, 12.5, "mnv", int8=70, domain=1, watts=540,
       weak="watts nic", kind="cpu"),
    _d("Xeon-6980P", 200, 400, 0, 1500, 1.45, 20, 12.5, "ov", int8=400, domain=1, watts=1000,
       weak="bf16 fp8 nic watts", kind="cpu"),
    _d("EPYC-9654", 20, 20, 0, 768, 0.92, 20, 12.5, "tv", domain=1, watts=720,
       weak="bf16 fp8 hbm_rate nic watts", kind="cpu"),
]  # fmt: skip
DEVICES: Mapping[str, Device] = {d.name: d for d in _ROWS}

_SAME = {
    "h100_sxm": "H100", "h200_sxm": "H200", "b200_sxm": "B200", "b300_sxm": "B300", "a100_80g": "A100",
    "h20-96g": "H20", "rtx4090": "RTX-4090", "4090": "RTX-4090", "rtxpro6000": "RTX-PRO-6000", "910b": "Ascend-910B",
    "910c": "Ascend-910C", "rtx pro 6000": "RTX-PRO-6000",
}  # fmt: skip


def find_device(name: str, extra: Iterable[Device] = ()) -> Device:
    """The device of a name, whatever its case, blanks or dashes. Raises BadDevice that names the nearest known one."""
    by_key = {_key(d.name): d for d in (*DEVICES.values(), *extra)}
    by_key |= {_key(k): DEVICES[v] for k, v in _SAME.items()}
    found = by_key.get(_key(name))
    if found is not None:
        return found
    near = get_close_matches(_key(name)[:MOST_NAME_CHARS], by_key, 1, 0.0)
    known = ", ".join(sorted({d.name for d in by_key.values()}))
    shown = name if len(name) <= MOST_NAME_CHARS else f"{name[:MOST_NAME_CHARS]}..."
    raise BadDevice(
        f"device '{shown}' is not known; the nearest is {by_key[near[0]].name} "
        f"(known: {known}; describe another with --device my.yaml)"
    )


_UNITS = {
    **dict.fromkeys(("bf16_tflops", "fp8_tflops", "fp4_tflops", "int8_tops"), TERA),
    **dict.fromkeys(("hbm_gb", "scale_up_gbs", "nic_gbs"), GIGA),
    "hbm_tbs": TERA,
}
_FIELD = {
    "bf16_tflops": "bf16", "fp8_tflops": "fp8", "fp4_tflops": "fp4", "int8_tops": "int8", "hbm_gb": "hbm",
    "scale_up_gbs": "scale_up", "nic_gbs": "nic", "hbm_tbs": "hbm_rate", "price_per_hour": "price",
    "watts": "watts", "domain": "domain",
}  # fmt: skip


def device_from(given: Mapping[str, object], where: str) -> Device:
    """A device as a user describes it, complete or as changes to a known one (`like: H800`). Raises BadDevice.

    What is neither given nor taken from a known one (FP8 as BF16, 8 in a domain, 700 W) is marked as weak.

    Keys: name, like, bf16_tflops, fp8_tflops, fp4_tflops, int8_tops, hbm_gb, hbm_tbs, scale_up_gbs, nic_gbs, domain,
    price_per_hour, watts.
    """
    left = dict(given)
    name, like = left.pop("name", None), left.pop("like", None)
    if not isinstance(name, str) or not name:
        raise BadDevice(f"{where}: key 'name' is missing; give the device a name")
    if not _key(name) or not name.isprintable() or "+" in name or len(name) > MOST_NAME_CHARS:
        raise BadDevice(
            f"{where}: key 'name' must be letters, digits and blanks, at most {MOST_NAME_CHARS}, without '+'"
        )
    if like is not None and not isinstance(like, str):
        raise BadDevice(f"{where}: key 'like' must name a known device")
    try:
        base = find_device(like) if like else None
    except BadDevice as e:
        raise BadDevice(f"{where}: key 'like': {e}") from e
    values: dict[str, float] = {}
    for key, value in left.items():
        if key not in _FIELD:
            near = get_close_matches(key, _FIELD, 1, 0.0)[0]
            raise BadDevice(f"{where}: key '{key}' is not known; the nearest is '{near}'")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not LEAST <= value <= MOST:
            raise BadDevice(
                f"{where}: key '{key}' must be a positive number from {LEAST:g} to {MOST:,.0f}, not {value!r}"
            )
        if key == "domain" and value != int(value):
            raise BadDevice(f"{where}: key 'domain' must be a whole number of accelerators, not {value!r}")
        values[_FIELD[key]] = value * _UNITS.get(key, 1.0)
    if base is not None:
        changed = {"sources": base.sources + "u", "weak": base.weak - set(values), **_whole(values)}
        return replace(base, name=name, **changed)  # type: ignore[arg-type]
    must = {"bf16", "hbm", "hbm_rate", "scale_up", "nic"}
    if missing := sorted(must - set(values)):
        keys = [next(k for k, f in _FIELD.items() if f == m) for m in missing]
        raise BadDevice(f"{where}: {', '.join(keys)} missing; give them, or start from a known device with 'like'")
    guessed = frozenset({"fp8", "domain", "watts"} - set(values))  # said as weak, so that nobody takes them for facts
    values.setdefault("fp8", values["bf16"])
    return Device(name=name, sources="u", weak=guessed, **_whole(values))  # type: ignore[arg-type]


def _whole(values: Mapping[str, float]) -> dict[str, float]:
    return {k: int(v) if k == "domain" else v for k, v in values.items()}


def _key(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
