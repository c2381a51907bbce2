"""What a step must compute, read and send on one rank: named ops with FLOPs, bytes and wire bytes. Knows no seconds.

The ops of one step, in their order within a layer (names as in bench/ops.py where that measures them):

    projections     all products of the attention block, and the feed-forward of dense layers
    core attention  scores and values over the context
    gate            choice of experts
    dispatch        rows to the ranks of their experts (or the gathering that stands in for it)
    experts         the routed experts' three products
    shared expert   the shared expert's
    combine         results back (or the all-reduce that stands in for it)
    head            logits of the new positions
    small kernels   norms, quantisation, residuals, permutation: passes over the activations
    host            what is not on the device: scheduling, launching, sampling

Sources: DeepSeek-V2 (arXiv:2405.04434) for latent attention, DeepSeek-V3 (arXiv:2412.19437, section 3.2.2 and 3.4) for
node-limited dispatch and deployment units, DeepEP's README for what its two kinds of kernels send.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from math import comb
from typing import Literal, NamedTuple

from brigade.spec.model import Mla, ModelSpec
from brigade.spec.params import Param, params

BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0, "fp4": 0.5 + 1 / 16, "int4": 0.5 + 1 / 16}
"""Of one number; the 4-bit types carry a scale of one byte for every 16 (NVFP4), the 8-bit ones' scales are ignored
here (4 bytes for 128 x 128 weights)."""
PASSES = 14
"""Reads or writes of a layer's activations by its small kernels: norms, quantisation, residuals, permutation, SiLU."""

Link = Literal["", "scale-up", "scale-out"]
OPS = (
    *("projections", "core attention", "gate", "dispatch", "experts", "shared expert", "combine", "head"),
    *("small kernels", "host"),
)


@dataclass(frozen=True)
class Precision:
    """In which types a deployment keeps weights, caches keys and values, and sends rows."""

    linear: str = "fp8"
    experts: str = "fp8"
    head: str = "bf16"
    gate: str = "bf16"
    kv: str = "bf16"
    attention: str = "bf16"
    dispatch: str = "fp8"
    combine: str = "bf16"

    def of(self, param: Param) -> str:
        """The type a parameter is kept in."""
        if param.exact:
            return self.gate
        if param.per_expert:
            return self.experts
        return self.linear if param.scaled else self.head


FP8 = Precision()
BF16 = Precision(linear="bf16", experts="bf16", dispatch="bf16")
INT8 = Precision(linear="int8", experts="int8", dispatch="int8")
FP4 = Precision(experts="fp4")
INT4 = Precision(linear="int4", experts="int4")
PRECISIONS = {"fp8": FP8, "bf16": BF16, "int8": INT8, "fp4": FP4, "int4": INT4}


class Op(NamedTuple):
    """Work of one kind in one step of one rank, all layers together."""

    name: str
    flops: float = 0.0
    n_bytes: float = 0.0
    """Read from and written to the device's memory."""
    wire: float = 0.0
    """Sent by the rank over `link`."""
    link: Link = ""
    precision: str = "bf16"
    calls: int = 0
    """How often it runs in the step: what a fixed latency multiplies."""
    balanced: bool = True
    """False: the busiest rank's share decides, and the imbalance of experts multiplies it."""
    rows: float = 1.0
    """Rows of one expert's product."""


@dataclass(frozen=True)
class Grid:
    """How the accelerators of one unit share a model: `tp` to each attention replica, experts over `ep`.

    n_gpus = pp x stage, stage = tp x dp = ep x moe_tp. Raises ValueError where they do not divide.
    """

    n_gpus: int
    per_node: int
    """Accelerators of one node in this unit, which `scale_up` joins."""
    tp: int = 1
    ep: int = 1
    redundant: int = 0
    """Copies of busy experts beyond the model's own, over all ranks."""
    shared_ranks: int = 0
    """Ranks that hold nothing but the shared expert, for all others (CloudMatrix384: 32 of 320); 0: every rank holds
    it beside its routed ones."""
    pp: int = 1
    """Pipeline stages, each with its share of the layers on accelerators of its own."""

    def __post_init__(self) -> None:
        if min(self.n_gpus, self.per_node, self.tp, self.ep, self.pp) < 1 or self.redundant < 0:
            raise ValueError("a grid needs at least one of everything")
        if self.n_gpus % self.pp:
            raise ValueError(f"pp {self.pp} must divide {self.n_gpus} accelerators")
        if not 0 <= self.shared_ranks < self.ep:
            raise ValueError(f"shared_ranks must be from 0 to below ep {self.ep}, not {self.shared_ranks}")
        if self.stage % self.tp or self.stage % self.ep:
            raise ValueError(f"tp {self.tp} and ep {self.ep} must divide {self.stage} accelerators")

    @property
    def stage(self) -> int:
        """Accelerators of one pipeline stage."""
        return self.n_gpus // self.pp

    @property
    def dp(self) -> int:
        """Attention replicas."""
        return self.stage // self.tp

    @property
    def routed(self) -> int:
        """Ranks, or groups of `moe_tp` ranks, that hold routed experts."""
        return self.ep - self.shared_ranks

    @property
    def moe_tp(self) -> int:
        return self.stage // self.ep

    @property
    def nodes(self) -> float:
        """Of one pipeline stage."""
        return max(1.0, self.stage / self.per_node)


@dataclass(frozen=True, eq=False)
class Facts:
    """Sums over the table of parameters of one model in one precision: what the ops below multiply."""

    n_layers: int
    n_moe: int
    dim: int
    vocab: int
    n_experts: int
    top_k: int
    n_groups: int
    top_groups: int
    cut: float
    """Parameters of products that TP cuts (by heads or FFN), routed and shared experts aside, all layers."""
    whole: float
    """Parameters of products that every rank holds whole."""
    cut_bytes: float
    whole_bytes: float
    gate: float
    gate_bytes: float
    expert: float
    """Parameters of one routed expert (of one layer)."""
    expert_bytes: float
    shared: float
    """Parameters of the shared experts of one layer."""
    shared_bytes: float
    head: float
    head_bytes: float
    lookup_bytes: float
    """Embedding (0 where it is the head too)."""
    norm_bytes: float
    draft_cut_bytes: float
    """Of the multi-token-prediction layer, where the model has one: attention cut by heads."""
    draft_whole_bytes: float
    """The rest of it, its experts aside: attention, gate, norms, and the projection of its two inputs."""
    kv_bytes: float
    """Of one token, all layers."""
    kv_whole: bool
    """True: every TP rank keeps all of it (a latent has no heads to cut)."""
    n_kv_heads: int
    decode_flops: float
    """Core attention of one new token per position of context, all layers, all heads; the absorbed form for MLA."""
    prefill_flops: float
    """The same, not absorbed."""
    dispatch_row: float
    """Bytes of one row that is sent to one expert or node: values and scales."""
    combine_row: float
    windowed: float
    """Share of layers whose attention looks back `window` positions only."""
    window: int
    precision: Precision


@lru_cache(maxsize=256)
def facts(spec: ModelSpec, precision: Precision = FP8, window: int = 0, windowed: float = 0.0) -> Facts:
    """Adds up the table of parameters. `window`, `windowed`: sliding-window layers (gpt-oss: every second, 128)."""
    total: dict[str, float] = defaultdict(float)

    def add(key: str, p: Param) -> None:
        total[key] += p.size
        total[key + " bytes"] += p.size * BYTES[precision.of(p)]

    last = f"model.layers.{spec.n_layers - 1}."
    for p in params(spec):
        add(_group(p), p)
        if spec.n_mtp and p.name.startswith(last) and _group(p) in ("cut", "whole", "gate", "norm"):
            add("draft cut" if _group(p) == "cut" else "draft whole", p)
    if spec.n_mtp:  # what joins the hidden state and the next token's embedding, and three norms
        add("draft whole", Param("eh_proj.weight", (spec.dim, 2 * spec.dim), (None, None), scaled=True))
        add("draft whole", Param("norms.weight", (3 * spec.dim,), (None,)))
    m, a = spec.moe, spec.attention
    n_moe = spec.n_moe
    experts = m.n_experts if m else 0
    if isinstance(a, Mla):
        decode = 2 * a.n_heads * (2 * a.kv_rank + a.rope)
        prefill = 2 * a.n_heads * (a.qk + a.v)
    else:
        decode = prefill = 2 * a.n_heads * 2 * a.head_dim

    def per_layer(key: str) -> float:
        return total[key] / n_moe if n_moe else 0.0

    head = "lookup" if spec.tied_head else "head"
    scales = spec.dim / 128 * 4 if precision.dispatch in ("fp8", "int8") else 0.0
    return Facts(
        n_layers=spec.n_layers,
        n_moe=n_moe,
        dim=spec.dim,
        vocab=spec.vocab,
        n_experts=experts,
        top_k=m.top_k if m else 0,
        n_groups=m.n_groups if m else 1,
        top_groups=m.top_groups if m else 1,
        cut=total["cut"],
        whole=total["whole"],
        cut_bytes=total["cut bytes"],
        whole_bytes=total["whole bytes"],
        gate=total["gate"],
        gate_bytes=total["gate bytes"],
        expert=per_layer("expert") / max(experts, 1),
        expert_bytes=per_layer("expert bytes") / max(experts, 1),
        shared=per_layer("shared"),
        shared_bytes=per_layer("shared bytes"),
        head=total[head],
        head_bytes=total[head + " bytes"],
        lookup_bytes=0.0 if spec.tied_head else total["lookup bytes"],
        norm_bytes=total["norm bytes"],
        draft_cut_bytes=total["draft cut bytes"],
        draft_whole_bytes=total["draft whole bytes"],
        kv_bytes=spec.kv_width * spec.n_blocks * BYTES[precision.kv],
        kv_whole=isinstance(a, Mla),
        n_kv_heads=1 if isinstance(a, Mla) else a.n_kv_heads,
        decode_flops=float(decode * spec.n_layers),
        prefill_flops=float(prefill * spec.n_layers),
        dispatch_row=spec.dim * BYTES[precision.dispatch] + scales,
        combine_row=spec.dim * BYTES[precision.combine],
        windowed=windowed,
        window=window,
        precision=precision,
    )


def _group(p: Param) -> str:
    if "embed_tokens" in p.name:
        return "lookup"
    if p.name.startswith("lm_head"):
        return "head"
    if p.exact:
        return "gate"
    if p.per_expert:
        return "expert"
    if "shared_experts" in p.name:
        return "shared"
    if not p.scaled:
        return "norm"
    return "cut" if any(p.axes) else "whole"


# Wire -----------------------------------------------------------------------------------------------------------------


def nodes_reached(f: Facts, nodes: float) -> float:
    """Distinct nodes among `nodes` that the chosen experts of one token lie on, in expectation.

    With groups of experts spread evenly over nodes and `top_groups` of them chosen (DeepSeek-V3, section 2.1.2):
    nodes x (1 - C(g - g/nodes, t) / C(g, t)). Without groups each chosen expert counts as a group of its own.
    """
    if nodes <= 1:
        return 1.0
    groups, top = (f.n_groups, f.top_groups) if f.n_groups > 1 else (f.n_experts, f.top_k)
    each = groups / nodes
    if each >= 1 and abs(each - round(each)) < 1e-9:
        missed = comb(groups - round(each), top) / comb(groups, top)
    else:
        missed = (1 - min(1.0, each / groups)) ** top
    return min(nodes * (1 - missed), float(f.top_k), nodes)


def wire_row(f: Facts) -> float:
    """Bytes of one row there and back."""
    return f.dispatch_row + f.combine_row


def remote_nodes(f: Facts, nodes: float) -> float:
    """Copies of a token that cross to other nodes when each node gets one at most (DeepEP's normal kernels)."""
    return nodes_reached(f, nodes) * (nodes - 1) / nodes if nodes > 1 else 0.0


def weights_touched(f: Facts, experts_per_rank: float, tp: int = 1) -> float:
    """Bytes of weights that a step reads on a rank with so many routed experts, all of them in use; W(x)."""
    return (
        f.cut_bytes / tp
        + f.whole_bytes
        + f.gate_bytes
        + f.n_moe * (f.shared_bytes / tp + f.expert_bytes * experts_per_rank)
        + f.head_bytes / tp
    )


def share_touched(f: Facts, tokens: float) -> float:
    """The part of the experts that `tokens` tokens choose at least once, in expectation, routing taken as even."""
    if not f.n_experts:
        return 0.0
    return float(1 - (1 - f.top_k / f.n_experts) ** tokens)


# Steps ----------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1 << 14)
def decode_ops(f: Facts, grid: Grid, requests: float, context: float, per_request: int = 1) -> tuple[Op, ...]:
    """The work of one decode step on one rank: `requests` of its attention replica, each with `context` positions
    behind it and `per_request` new tokens (more than one: drafted ones)."""
    tokens = requests * per_request
    seen = context if not f.windowed else context * (1 - f.windowed) + min(context, f.window) * f.windowed
    kv = requests * seen * f.kv_bytes / kv_cut(f, grid.tp)
    core = Op("core attention", tokens * seen * f.decode_flops / grid.tp, kv, 0, "", f.precision.attention, f.n_layers)
    return _step(f, grid, tokens, core, tokens, direct=True)


@lru_cache(maxsize=1 << 14)
def prefill_ops(f: Facts, grid: Grid, tokens: float, length: float, before: float = 0.0) -> tuple[Op, ...]:
    """The work of prefilling `tokens` tokens on each attention replica, in prompts of `length` new tokens that come
    after `before` cached ones: attention spans all of them, the products only the new."""
    pairs = tokens * (before + length / 2)
    if f.windowed:
        pairs = pairs * (1 - f.windowed) + tokens * min(before + length / 2, f.window) * f.windowed
    cache = tokens * (1 + before / length) * f.kv_bytes / kv_cut(f, grid.tp)
    core = Op("core attention", pairs * f.prefill_flops / grid.tp, cache, 0, "", f.precision.attention, f.n_layers)
    return _step(f, grid, tokens, core, tokens / length, direct=False)


def kv_cut(f: Facts, tp: int) -> float:
    """Into how many parts TP cuts the cache of one request."""
    return 1.0 if f.kv_whole else float(min(tp, f.n_kv_heads))


def _step(f: Facts, grid: Grid, tokens: float, core: Op, head_rows: float, direct: bool) -> tuple[Op, ...]:
    tp, p = grid.tp, f.precision
    products = f.cut / tp + f.whole
    rows = tokens * f.dim * 2 * PASSES * f.n_layers
    everyone = tokens * grid.dp
    ops = [
        Op("projections", 2 * products * tokens, f.cut_bytes / tp + f.whole_bytes, 0, "", p.linear, f.n_layers),
        core,
        Op("head", 2 * f.head / tp * head_rows, f.head_bytes / tp, 0, "", p.head, 1),
        Op("small kernels", 0, rows, 0, "", "bf16", f.n_layers),
        Op("host", calls=1),
    ]
    if f.n_moe:
        slots = (f.n_experts + grid.redundant) / grid.routed
        mine = everyone * f.top_k / grid.routed
        shared = 0.0 if grid.shared_ranks else f.shared / tp
        one = f.expert / grid.moe_tp
        read = min(slots, mine, slots * share_touched(f, everyone) + 0.0) * f.expert_bytes / grid.moe_tp
        ops += [
            Op("gate", 2 * f.gate * tokens, f.gate_bytes, 0, "", p.gate, f.n_moe),
            Op("experts", 2 * one * mine * f.n_moe, read * f.n_moe, 0, "", p.experts, f.n_moe, False,
               max(1.0, mine / slots)),
            Op("shared expert", 2 * shared * tokens * f.n_moe, shared and f.shared_bytes / tp * f.n_moe, 0, "",
               p.linear, f.n_moe if shared else 0),
        ]  # fmt: skip
    return (*ops, *_wires(f, grid, tokens, direct))


def _wires(f: Facts, grid: Grid, tokens: float, direct: bool) -> list[Op]:
    """What the ranks send each other. Each op is one direction of one link; ops of the same name run at once."""
    out: list[Op] = []
    tp, nodes = grid.tp, grid.nodes
    sharing = min(tp, grid.per_node)
    if tp > 1:  # one all-reduce after the attention; another after the feed-forward where no exchange stands in for it
        own = f.n_layers + (f.n_layers if grid.dp == 1 else f.n_layers - f.n_moe)
        n_bytes = tokens * f.dim * 2
        out.append(Op("combine", 0, 0, own * n_bytes * 2 * (sharing - 1) / sharing, "scale-up", "bf16", own))
        if tp > grid.per_node:
            over = own * n_bytes * 2 * (nodes - 1) / nodes / grid.per_node
            out.append(Op("combine", 0, 0, over, "scale-out", "bf16", own))
    if grid.dp == 1 or not f.n_moe:
        return out
    mine = tokens / tp
    if grid.ep == 1:  # gather all rows, reduce and scatter the results
        others = grid.dp - 1
        where: Link = "scale-up" if nodes <= 1 else "scale-out"
        for name in "dispatch", "combine":
            out.append(Op(name, 0, 0, f.n_moe * mine * others * f.dim * 2, where, "bf16", f.n_moe))
        return out
    copies = f.top_k + (1 if grid.shared_ranks else 0)
    far = copies * (1 - 1 / nodes) if direct else remote_nodes(f, nodes)
    ranks = copies * (1 - 1 / grid.ep) if direct else ranks_reached(f, grid) * (1 - 1 / grid.ep)
    near = max(0.0, ranks - far) if direct else ranks
    for name, row in ("dispatch", f.dispatch_row), ("combine", f.combine_row):
        n_bytes = f.n_moe * mine * row
        if near and grid.per_node > 1:
            out.append(Op(name, 0, 0, n_bytes * near, "scale-up", p_of(f, name), f.n_moe, False))
        if far:
            out.append(Op(name, 0, 0, n_bytes * far, "scale-out", p_of(f, name), f.n_moe, False))
    return out


def p_of(f: Facts, name: str) -> str:
    return f.precision.dispatch if name == "dispatch" else f.precision.combine


def ranks_reached(f: Facts, grid: Grid) -> float:
    """Distinct ranks that a token's experts lie on, in expectation."""
    ranks = grid.ep
    nodes = nodes_reached(f, grid.nodes)
    within = nodes * ranks / grid.nodes  # ranks of the nodes that it goes to at all
    if f.n_groups > 1 and ranks <= f.n_groups:
        within = min(within, float(f.top_groups) * ranks / f.n_groups * 1.0) if ranks > f.top_groups else within
        within = max(within, min(float(ranks), float(f.top_groups)))
    return float(within * (1 - (1 - 1 / within) ** f.top_k)) if within > 1 else 1.0
