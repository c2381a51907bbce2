"""What a deployment comes to: every value with its reason, ranks, experts, memory, ports. Reads no weights, no torch.

Numbers come from where the engine takes them: the table of parameters, the engine's defaults, the first placement.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from brigade.cli.deployed import Deployed, others_can_read
from brigade.cli.fault import Fault
from brigade.cli.ports import Port, is_fleet, kv_link, ports
from brigade.cli.units import show_size
from brigade.comm.segment import Shape
from brigade.core import placement
from brigade.core.placement import Placement
from brigade.engine.auto import Machine
from brigade.engine.config import EngineConfig
from brigade.spec.deploy import Deployment, Units, unit_names
from brigade.spec.layout import Layout, is_loopback, n_sharing
from brigade.spec.memory import Part, WeightKind, kv_bytes, weight_bytes
from brigade.spec.model import ModelSpec

DEFAULT = "not given: the engine's default"
GIVEN = "as the file says"


@dataclass(frozen=True)
class Value:
    """One setting: what it is, and where it comes from."""

    key: str
    value: str
    why: str


@dataclass(frozen=True)
class Rank:
    """One rank and the routed experts it holds in each layer with experts, before any load is known."""

    rank: int
    host: str
    local_rank: int
    experts: tuple[int, ...]


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank; of the one with most experts where they differ."""

    weights: dict[Part, int]
    weight_type: str
    kv_cache: int | None
    """None: depends on what is free where it runs."""
    kv_token: int
    """Bytes of one position."""
    kv_tokens: int | None
    """Positions the cache holds."""
    segment: int
    """Shared by the ranks of a host, at most: only pages that were written cost memory."""
    available: int | None
    verdict: str

    @property
    def total(self) -> int:
        return sum(self.weights.values()) + (self.kv_cache or 0)


@dataclass(frozen=True)
class Unit:
    name: str
    role: str
    values: tuple[Value, ...]
    hosts: tuple[str, ...]
    ranks: tuple[Rank, ...]
    memory: Memory


@dataclass(frozen=True)
class Explained:
    file: str
    values: tuple[Value, ...]
    units: tuple[Unit, ...]
    ports: tuple[Port, ...]
    notes: tuple[str, ...]


def explain(deployed: Deployed, spec: ModelSpec, machine: Machine) -> Explained:
    """Everything the file leads to, if this machine is `machine`. Raises Fault for numbers that do not fit."""
    d = deployed.what
    each = [(kind, layout) for kind in d.units for layout in kind.layouts()]
    named = zip(unit_names(d), each, strict=True)
    units = [_unit(deployed, spec, machine, kind, layout, name) for name, (kind, layout) in named]
    return Explained(
        file=str(deployed.file),
        values=_values(deployed, spec),
        units=tuple(units),
        ports=ports(d),
        notes=(*cannot_run(deployed, spec), *_notes(deployed)),
    )


def cannot_run(deployed: Deployed, spec: ModelSpec) -> list[str]:
    """Why `brigade up` would not start this deployment; empty if it would."""
    d, out = deployed.what, []
    if spec.moe is None and any(u.redundant_experts for u in d.units):
        out.append("redundant_experts: this model has no routed experts; leave the key out")
    if spec.moe is None and d.wire != "auto":
        out.append("wire: this model has no routed experts whose rows could travel; leave the key out")
    roles = {u.role for u in d.units}
    if not (roles >= {"prefill", "decode"} or "mixed" in roles):
        runs = "units of roles prefill and decode, at least one of each, or one of role mixed"
        out.append(f"units: there are only {roles.pop()} units; a deployment has {runs}")
        return out
    for i, units in enumerate(d.units):
        out += _unit_problems(f"units[{i}]", units, units.layouts()[0], spec)
        try:
            deployed.engine_config(units, units.layouts()[0].n_ranks)
        except Fault as e:
            out.append(str(e))
    return out


def _unit_problems(name: str, units: Units, layout: Layout, spec: ModelSpec) -> list[str]:
    out = []
    if spec.moe is not None and layout.n_ranks > spec.moe.n_experts:
        out.append(
            f"{name}: {layout.n_ranks} ranks, but the model has {spec.moe.n_experts} routed experts a layer; "
            "give fewer hosts or ranks_per_host"
        )
    if units.redundant_experts and layout.n_ranks == 1:
        out.append(f"{name}.redundant_experts: they are copies on other ranks, and there is one; leave the key out")
    return out


def _values(deployed: Deployed, spec: ModelSpec) -> tuple[Value, ...]:
    d = deployed.what
    why_weights = GIVEN if "weights" in d.given else "not given: bf16 on the C++ kernels; without them, what torch fits"
    scaled = ", from FP8 blocks in the checkpoint" if spec.block_scale else ""
    n_experts = f", {spec.moe.n_experts} routed experts of which {spec.moe.top_k} are active" if spec.moe else ""
    return (
        Value("model", str(deployed.model), GIVEN if d.model else "not given: the bundled demo model"),
        Value("model name", deployed.served_name, "the folder's name; clients ask for it"),
        Value("architecture", spec.architecture, f"config.json: {spec.n_layers} layers{n_experts}"),
        Value("drafts", str(d.drafts), GIVEN if "drafts" in d.given else _why_drafts(spec)),
        Value("wire", d.wire, _why("wire" in d.given, "rows reach experts exactly")),
        Value("weights", _kind(d) if d.weights != "auto" else "auto", why_weights + scaled),
        Value("listen", f"{d.listen[0]}:{d.listen[1]}", _why("listen" in d.given, "this machine only")),
        Value("clients' keys", *_key(deployed, d.api_key_file, "api_key_file", "only this machine can reach it")),
        Value("orders to units", *_key(deployed, d.admin_key_file, "admin_key_file", "none are taken")),
        Value("gateway", d.head, _why("gateway" in d.given, "the first host of the first unit")),
        Value("host_port", str(d.host_port), _why("host_port" in d.given, "used where hosts join the gateway")),
        Value("hosts' secret", *_key(deployed, d.secret_file, "secret_file", "no host joins the gateway")),
        Value("roles", *_roles(d)),
        *([Value("KV transfer", *kv_link(d))] if is_fleet(d) else []),
    )


def _roles(d: Deployment) -> tuple[str, str]:
    if (targets := d.change_roles) is None:
        return "change when told to", "change_roles not given"
    aim = f"prompts begin within {targets.prefill_seconds:g} s, room to decode within {targets.decode_seconds:g} s"
    return "change by waiting times", aim


def _why_drafts(spec: ModelSpec) -> str:
    if not spec.n_mtp:
        return "not given: the model has no multi-token-prediction layer"
    return "not given: the engine's default; the model has a multi-token-prediction layer, which could guess"


def _why(given: bool, otherwise: str) -> str:
    return GIVEN if given else f"not given: {otherwise}"


def _key(deployed: Deployed, name: str | None, key: str, without: str) -> tuple[str, str]:
    if name is None:
        return "none", f"{key} not given: {without}"
    return "1", f"from {deployed.path(name)}"


def _kind(d: Deployment) -> WeightKind:
    return "bf16" if d.weights == "auto" else d.weights


def _unit(deployed: Deployed, spec: ModelSpec, machine: Machine, kind: Units, layout: Layout, name: str) -> Unit:
    placed = _placed(spec, kind, layout)
    return Unit(
        name=name,
        role=kind.role,
        values=_unit_values(deployed, spec, kind, layout, placed),
        hosts=tuple(h.address for h in layout.hosts),
        ranks=tuple(_ranks(layout, placed)),
        memory=memory_of(deployed, spec, machine, kind, layout),
    )


def _placed(spec: ModelSpec, kind: Units, layout: Layout) -> Placement | None:
    """Where experts are before any load is known; None for a model without any."""
    if spec.moe is None or layout.n_ranks > spec.moe.n_experts + kind.redundant_experts:
        return None
    return placement.initial(
        spec.n_moe,
        spec.moe.n_experts,
        n_slots=spec.moe.n_experts + kind.redundant_experts,
        n_ranks=layout.n_ranks,
        n_nodes=layout.n_nodes,
        n_groups=spec.moe.n_groups,
    )


def _ranks(layout: Layout, placed: Placement | None) -> list[Rank]:
    out = []
    for h, host in enumerate(layout.hosts):
        for local, rank in enumerate(layout.ranks(h)):
            slots = placed.slots_of_rank[rank] if placed else range(0)
            experts = placed.phy2log[0][slots.start : slots.stop] if placed else ()
            out.append(Rank(rank, host.address, local, tuple(experts)))
    return out


def _unit_values(
    deployed: Deployed, spec: ModelSpec, kind: Units, layout: Layout, placed: Placement | None
) -> tuple[Value, ...]:
    d, config = deployed.what, deployed.engine_config(kind)
    n_hosts, each = len(layout.hosts), kind.ranks_per_host
    out = [
        Value("hosts", str(n_hosts), GIVEN if "hosts" in kind.given else "not given: this machine"),
        Value("ranks_per_host", str(each), _why("ranks_per_host" in kind.given, "one rank uses all cores of its host")),
        Value(
            "ranks",
            str(layout.n_ranks),
            f"{n_hosts} x {each}: each has all of attention and a part of the experts",
        ),
    ]
    if placed is not None:
        sizes = [len(s) for s in placed.slots_of_rank]
        slots = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
        extra = kind.redundant_experts
        why = f"{placed.n_experts} experts + {extra} redundant" if extra else f"{placed.n_experts} experts, each once"
        out.append(Value("expert slots", str(placed.n_slots), why))
        out.append(Value("slots of a rank", slots, f"{placed.n_slots} over {layout.n_ranks} ranks, in each layer"))
        if spec.moe and spec.moe.n_shared:
            out.append(Value("shared experts", f"{spec.moe.n_shared} on every rank", "every token needs them"))
    limits = d.limits_of(kind)
    for name in ("max_running", "max_waiting", "max_step_tokens"):
        per = "for the unit" if name == "max_waiting" else "each rank"
        why = GIVEN if getattr(limits, name) is not None else DEFAULT
        if name == "max_waiting" and kind.role == "prefill":
            why += "; counts while it decodes"
        out.append(Value(name, f"{getattr(config, name)} {per}", why))
    why = GIVEN if limits.rank_deadline is not None else DEFAULT
    out.append(Value("rank_deadline", f"{config.rank_deadline:g} s", why))
    shared = "shared by the ranks of a host; "
    out.append(Value("kv_disk", limits.kv_disk or "none", shared + GIVEN if limits.kv_disk else DEFAULT))
    wanted = limits.max_context or spec.context
    context = min(wanted, spec.context)
    why = GIVEN if limits.max_context else "not given: the model's, or what the KV cache holds"
    out.append(Value("max_context", str(context), why if wanted <= spec.context else f"the model's; {wanted} is more"))
    return tuple(out)


def memory_of(deployed: Deployed, spec: ModelSpec, machine: Machine, kind: Units, layout: Layout) -> Memory:
    """What a rank of one of these units holds, and whether it fits. Raises Fault."""
    d, config, placed = deployed.what, deployed.engine_config(kind), _placed(spec, kind, layout)
    n_slots = max(len(s) for s in placed.slots_of_rank) if placed else 0
    weights = weight_bytes(spec, _kind(d), n_slots)
    available, whose = _available(d, machine, layout)
    page = kv_bytes(spec, config.page)
    context = min(config.max_context or spec.context, spec.context)
    most = -(-context // config.page) * config.max_running
    n_pages: int | None = None
    if config.kv_bytes:
        n_pages = config.kv_bytes // page
    elif available is not None:
        n_pages = min(max(available - sum(weights.values()), 0) // 4 // page, most)
    cache = None if n_pages is None else n_pages * page
    return Memory(
        weights=weights,
        weight_type=_kind(d),
        kv_cache=cache,
        kv_token=kv_bytes(spec, 1),
        kv_tokens=None if n_pages is None else n_pages * config.page,
        segment=_segment(spec, layout, config),
        available=available,
        verdict=_verdict(sum(weights.values()), cache, page, available, whose),
    )


def _available(d: Deployment, machine: Machine, layout: Layout) -> tuple[int | None, str]:
    """Bytes a rank may take, and who says so. Ranks of this machine share what is free."""
    if d.rank_memory is not None:
        return d.rank_memory, "rank_memory"
    if not all(is_loopback(h.address) for h in layout.hosts):
        return None, ""
    n_here = n_sharing([x for u in d.units for x in u.layouts()], layout.hosts[0].address)
    return machine.free_bytes // n_here, f"{show_size(machine.free_bytes)} free here, shared by {n_here} ranks"


def _verdict(weights: int, cache: int | None, page: int, available: int | None, whose: str) -> str:
    if available is None:
        return "not checked: give rank_memory, since these hosts are other machines"
    shown = f"{show_size(available)} ({whose})"
    if weights > available:
        return f"does not fit: weights alone need {show_size(weights)} of {shown}; give more ranks, or smaller weights"
    if weights + (cache or 0) > available:
        return f"does not fit: {show_size(weights + (cache or 0))} of {shown}; give less kv_memory, or more ranks"
    if cache is not None and cache < 2 * page:
        return f"does not fit: {show_size(available - weights)} left of {shown} hold no request; give more ranks"
    return f"fits: {show_size(weights + (cache or 0))} of {shown}"


def _segment(spec: ModelSpec, layout: Layout, config: EngineConfig) -> int:
    """A host's shared memory for the exchange between its ranks, with room for what ranks of other hosts send."""
    if layout.n_ranks == 1:
        return 0
    alike = len(set(layout.sizes)) == 1
    times = len(layout.hosts) if alike else layout.n_ranks
    top_k = spec.moe.top_k if spec.moe else 1
    return Shape(max(layout.sizes), config.max_step_tokens * times, spec.dim, top_k).size


def _notes(deployed: Deployed) -> list[str]:
    d, out = deployed.what, []
    for key in ("api_key_file", "admin_key_file", "secret_file"):
        name = getattr(d, key)
        if name is None:
            continue
        path = deployed.path(name)
        if not path.exists():
            out.append(f"{key}: {path} is not there yet; (umask 077; openssl rand -hex 32 > {path})")
        elif others_can_read(path):
            out.append(f"{key}: others than its owner may use {path}, so it is refused; chmod 600 it")
    if d.other_hosts:
        out.append("traffic between hosts is not encrypted: let them reach each other over a network of your own")
    return out


def ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 7 -> "0-2 7"."""
    if not numbers:
        return "none"
    cuts = [0, *(i for i, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1), len(numbers)]
    parts = [numbers[a:b] for a, b in pairwise(cuts)]
    return " ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
