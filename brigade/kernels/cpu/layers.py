"""Layers of a model on the C++ kernels: they hold packed weights and call C++. Torch only holds memory.

The residual stream is float32 [tokens, stride], padded with zeros to a multiple of 64 numbers; layers add to it in
place. Weights come as torch tensors, under the names of the checkpoint, from a function that reads one when it is asked
for, and experts one by one, so that an original is gone before much else is read.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from brigade.kernels.cpu import structs
from brigade.kernels.cpu.packed import GROUP, Kind, LargePages, Packed, pack, repack, room
from brigade.spec.model import Gqa, Mla, ModelSpec, Moe

Read = Callable[[str], Tensor]
"""The weights of a name. A name with a `*` is that of all experts, stacked."""


class Each(Protocol):
    """Experts one after the other: a stacked tensor, or what reads them one at a time."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Tensor]: ...


ReadEach = Callable[[str], Each]
PARTS = ("gate", "up", "down")
MOST_LATENT = 1 << 14
MOST_GROUPS = 1 << 10
LATENT_NORM_EPS = 1e-6


def unsupported(spec: ModelSpec) -> str | None:
    """Why the kernels cannot run this model, or None if they can."""
    a, m = spec.attention, spec.moe
    widths = (a.head_dim,) if isinstance(a, Gqa) else (a.kv_rank, a.nope, a.rope, a.v)
    if any(n % 2 for n in widths):
        return "a width of its attention is odd"
    if (isinstance(a, Mla) and a.kv_rank > MOST_LATENT) or (m is not None and m.n_groups > MOST_GROUPS):
        return "its latent or its number of expert groups is too large"
    return None


class Kernels:
    """The library and its threads, which live as long as the process. One caller at a time, except for packing."""

    def __init__(self, path: Path, n_threads: int) -> None:
        self.library = structs.open_library(path)
        self.pool = self.library.pool_new(n_threads)
        self._memory = LargePages()

    def normalise(self, x_TD: Tensor, norm: Tensor, eps: float, dim: int) -> Tensor:
        """bf16 rows [T, stride] of float32 ones, of which `dim` numbers count."""
        stride = x_TD.stride(0)
        out = torch.empty(x_TD.shape, dtype=torch.bfloat16)
        self.library.norm_and_route(
            *(self.pool, x_TD.data_ptr(), stride, norm.data_ptr(), eps, dim, len(x_TD)),
            *(out.data_ptr(), stride, None, None, None, 0),
        )
        return out

    def pack(self, weights: list[Tensor], kind: Kind, paired: bool = False) -> Packed:
        return pack(self.library, weights, kind, paired, self._memory)

    def room(self, n: int, outs: int, ins: int, kind: Kind, paired: bool = False) -> Packed:
        """Memory for n matrices [outs, ins], with anything in it."""
        return room(n, outs, ins, kind, paired, self._memory)


def has_expanded_form(a: Mla | Gqa) -> bool:
    """Whether rows of a prompt's whole pages are computed with expanded keys and values: where a pair of positions then
    costs less than half of the multiplications, so that expanding the keys is soon paid for. It rounds differently."""
    return isinstance(a, Mla) and 2 * (a.qk + a.v) < 2 * a.kv_rank + a.rope


class Place(NamedTuple):
    """Memory that holds one packed expert. All experts of a model have one shape, so any place fits any layer."""

    gate_up: Packed
    down: Packed


def padded(n: int) -> int:
    """Numbers of a row of activations that holds n."""
    return -(-n // GROUP) * GROUP


def for_linear(kind: Kind) -> Kind:
    """What projections and the head are packed as where experts are `kind`: int4 is for feed-forward layers only.

    They are a small part of a sparse model's weights, and the most sensitive one.
    """
    return "int8" if kind == "int4" else kind


class MlaLayer:
    """residual += latent attention of the normalised residual. Its projections may be int8; the small matrices into and
    out of the latent space stay bf16."""

    def __init__(self, kernels: Kernels, spec: ModelSpec, read: Read, at: str, scale: float, kind: Kind) -> None:
        a, kind = spec.attention, for_linear(kind)
        assert isinstance(a, Mla)
        self._kernels = kernels
        mine = f"{at}.self_attn"
        up = read(f"{mine}.kv_b_proj.weight").view(a.n_heads, a.nope + a.v, a.kv_rank)
        low = [read(f"{mine}.q_a_proj.weight" if a.q_rank else f"{mine}.q_proj.weight")]
        low.append(read(f"{mine}.kv_a_proj_with_mqa.weight"))
        self._norms = [read(f"{at}.input_layernorm.weight").float(), read(f"{mine}.kv_a_layernorm.weight").float()]
        q_up = torch.empty(0, 2)
        if a.q_rank:
            self._norms.append(read(f"{mine}.q_a_layernorm.weight").float())
            q_up = read(f"{mine}.q_b_proj.weight")
        keys = list(up[:, : a.nope])
        self._packed = {
            "down": kernels.pack([torch.cat(low)], kind),
            "q_up": kernels.pack([q_up], kind),
            "key": kernels.pack([head.T for head in keys], "bf16"),
            "expand_key": kernels.pack(keys if has_expanded_form(a) else [torch.empty(0, 2)], "bf16"),
            "value": kernels.pack(list(up[:, a.nope :]), "bf16"),
            "out": kernels.pack([read(f"{mine}.o_proj.weight")], kind),
        }
        self._struct = structs.Mla(
            norm=self._norms[0].data_ptr(),
            kv_norm=self._norms[1].data_ptr(),
            q_norm=self._norms[2].data_ptr() if a.q_rank else None,
            **{name: packed.matrix for name, packed in self._packed.items()},
            **{"dim": spec.dim, "n_heads": a.n_heads, "q_rank": a.q_rank or 0, "kv_rank": a.kv_rank},
            **{"nope": a.nope, "rope": a.rope, "v": a.v},
            **{"eps": spec.norm_eps, "latent_eps": LATENT_NORM_EPS, "scale": scale},
            interleaved=int(spec.rope.interleaved),
        )

    def __call__(self, residual: Tensor, step: structs.Step, cache_PSW: Tensor) -> None:
        k = self._kernels
        k.library.mla(k.pool, self._struct, step, residual.data_ptr(), residual.stride(0), cache_PSW.data_ptr())


class GqaLayer:
    """residual += grouped-query attention of the normalised residual."""

    def __init__(self, kernels: Kernels, spec: ModelSpec, read: Read, at: str, scale: float, kind: Kind) -> None:
        a, kind = spec.attention, for_linear(kind)
        assert isinstance(a, Gqa)
        self._kernels = kernels
        mine, names = f"{at}.self_attn", ("q_proj", "k_proj", "v_proj")
        self._norm = read(f"{at}.input_layernorm.weight").float()
        self._bias = torch.cat([read(f"{mine}.{name}.bias").float() for name in names]) if a.qkv_bias else None
        self._packed = {
            "qkv": kernels.pack([torch.cat([read(f"{mine}.{name}.weight") for name in names])], kind),
            "out": kernels.pack([read(f"{mine}.o_proj.weight")], kind),
        }
        self._struct = structs.Gqa(
            norm=self._norm.data_ptr(),
            bias=self._bias.data_ptr() if self._bias is not None else None,
            **{name: packed.matrix for name, packed in self._packed.items()},
            **{"dim": spec.dim, "n_kv": a.n_kv_heads, "group": a.n_heads // a.n_kv_heads, "head_dim": a.head_dim},
            **{"eps": spec.norm_eps, "scale": scale},
        )

    def __call__(self, residual: Tensor, step: structs.Step, cache_PSW: Tensor) -> None:
        k = self._kernels
        k.library.gqa(k.pool, self._struct, step, residual.data_ptr(), residual.stride(0), cache_PSW.data_ptr())


class Routed(NamedTuple):
    """Rows of a feed-forward layer and where they go."""

    x_TD: Tensor
    """Normalised residual, bf16 [T, stride]."""
    ids_TK: Tensor
    """int32: the chosen experts, then the shared ones as the layer itself counts them."""
    weights_TK: Tensor


class FeedForward:
    """residual += feed-forward of the normalised residual: routed and shared experts, or one plain network.

    Shared experts of n times an expert's width are n more experts with weight 1, and a plain network is one expert.
    Where `read` gives only some of the routed experts, the layer runs in parts: route, then routed_experts on rows of
    all ranks, then add_routed and add_shared, which add what one call of the whole layer adds, in the same order.
    """

    def __init__(
        self, kernels: Kernels, spec: ModelSpec, read: Read, layer: int, kind: Kind, read_each: ReadEach | None = None
    ) -> None:
        """`read_each`: reads experts one by one; None: `read` gives them stacked."""
        self._kernels, self._dim, self._eps = kernels, spec.dim, spec.norm_eps
        at = f"model.layers.{layer}"
        self._norm = read(f"{at}.post_attention_layernorm.weight").float()
        moe = spec.moe if spec.is_moe(layer) else None
        self._gate = self._read_gate(moe, read, f"{at}.mlp") if moe else None
        self._n_fixed = (moe.n_shared if moe else 1) or 0
        self.top_k = moe.top_k if moe else 0
        self._k = self.top_k + self._n_fixed
        originals = _Experts(moe, spec, read, read_each or read, f"{at}.mlp")
        self.n_experts = n = len(originals)
        self._kind: Kind = kind
        all_gate_up = kernels.room(n, 2 * originals.ffn, spec.dim, kind, paired=True)
        all_down = kernels.room(n, spec.dim, originals.ffn, kind)
        self._gate_up, self._down = all_gate_up.each, all_down.each
        self._places = [Place(all_gate_up.one(i), all_down.one(i)) for i in range(n)]
        for place, original in zip(self._places, originals, strict=True):
            self._fill(place, *original)
        self._ids_K = torch.arange(self.n_experts - self._k, self.n_experts, dtype=torch.int32)
        self._weights_K = torch.ones(self._k)
        """What a row's ids and weights are before the gate chooses: the last ones are the shared experts'."""

    def _read_gate(self, moe: Moe, read: Read, at: str) -> structs.Gate:
        weight = read(f"{at}.gate.weight").float()
        self._gate_weight = torch.zeros(moe.n_experts, padded(self._dim))
        self._gate_weight[:, : self._dim] = weight
        self._gate_bias = read(f"{at}.gate.e_score_correction_bias").float().contiguous()
        return structs.Gate(
            weight=self._gate_weight.data_ptr(),
            bias=self._gate_bias.data_ptr(),
            **{"n_experts": moe.n_experts, "top_k": moe.top_k, "n_groups": moe.n_groups},
            **{"top_groups": moe.top_groups, "scale": moe.route_scale, "normalise": int(moe.norm_weights)},
        )

    def __call__(self, residual: Tensor) -> Routed:
        """Returns where the rows went."""
        routed = self.route(residual)
        self._run(*routed, residual)
        return routed

    def stage(self, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, spare: Place | None) -> Place:
        """An expert in a place of its own, a `spare` one if there is one. From any thread, beside a running step."""
        if spare is None:
            (outs, ins), kind = gate_FD.shape, self._kind
            spare = Place(room(1, 2 * outs, ins, kind, paired=True), room(1, ins, outs, kind))
        self._fill(spare, gate_FD, up_FD, down_DF)
        return spare

    def _fill(self, place: Place, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> None:
        repack(self._kernels.library, [torch.cat([gate_FD, up_FD])], place.gate_up)
        repack(self._kernels.library, [down_DF], place.down)

    def swap(self, slot: int, place: Place) -> Place:
        """From now on this routed expert is what `place` holds; returns where the old one is. Between two calls."""
        old, self._places[slot] = self._places[slot], place
        self._gate_up[slot], self._down[slot] = place.gate_up.matrix, place.down.matrix
        return old

    def route(self, residual: Tensor) -> Routed:
        k, n, stride = self._kernels, residual.shape[0], residual.stride(0)
        x = torch.empty(n, stride, dtype=torch.bfloat16)
        # One copy each: filling in the last columns alone takes torch ten times as long
        ids = torch.empty(n, self._k, dtype=torch.int32).copy_(self._ids_K)
        weights = torch.empty(n, self._k).copy_(self._weights_K)
        k.library.norm_and_route(
            *(k.pool, residual.data_ptr(), stride, self._norm.data_ptr(), self._eps, self._dim, n),
            *(x.data_ptr(), stride, self._gate, ids.data_ptr(), weights.data_ptr(), self._k),
        )
        return Routed(x, ids, weights)

    def routed_experts(self, rows_ND: Tensor, expert_N: Tensor) -> Tensor:
        """Each row, bf16 [N, stride], through one of this layer's experts (int32 [N]): float32 [N, stride]."""
        y_ND = torch.zeros(rows_ND.shape)
        self._run(rows_ND, expert_N[:, None].contiguous(), torch.ones(len(expert_N), 1), y_ND)
        return y_ND

    def add_routed(self, y_TKD: Tensor, routed: Routed, residual: Tensor) -> None:
        """residual += weights * results of the chosen experts, in the order of their ids as in a whole layer."""
        n, k, dim = y_TKD.shape
        self._kernels.library.add_weighted(
            *(self._kernels.pool, y_TKD.data_ptr(), dim, routed.ids_TK.data_ptr(), routed.weights_TK.data_ptr()),
            *(self._k, k, residual.data_ptr(), residual.stride(0), n),
        )

    def add_shared(self, routed: Routed, residual: Tensor) -> None:
        """residual += the shared experts."""
        if self._n_fixed:
            fixed = slice(self.top_k, None)
            ids, weights = routed.ids_TK[:, fixed].contiguous(), routed.weights_TK[:, fixed].contiguous()
            self._run(routed.x_TD, ids, weights, residual)

    def _run(self, x: Tensor, ids: Tensor, weights: Tensor, residual: Tensor) -> None:
        k = self._kernels
        k.library.experts(
            *(k.pool, x.data_ptr(), x.stride(0), ids.data_ptr(), weights.data_ptr()),
            *(residual.data_ptr(), residual.stride(0), len(x), ids.shape[1], self.n_experts),
            *(self._gate_up, self._down),
        )


class Head:
    """Logits of rows of the residual. `weight`: [vocab, dim]."""

    def __init__(self, kernels: Kernels, spec: ModelSpec, read: Read, weight: Tensor, kind: Kind) -> None:
        self._kernels, self._dim, self._eps, self._vocab = kernels, spec.dim, spec.norm_eps, spec.vocab
        self.norm = read("model.norm.weight").float()
        self._packed = kernels.pack([weight], for_linear(kind))

    def __call__(self, residual_RD: Tensor, norm: Tensor | None = None) -> Tensor:
        """float32 [R, V] from float32 rows [R, stride]. `norm`: the weights of another norm than the model's last."""
        k, n, stride = self._kernels, residual_RD.shape[0], residual_RD.stride(0)
        x = k.normalise(residual_RD, self.norm if norm is None else norm, self._eps, self._dim)
        logits = torch.empty(n, self._vocab)
        k.library.linear_float(k.pool, self._packed.matrix, x.data_ptr(), n, stride, logits.data_ptr(), self._vocab)
        return logits


class _Experts:
    """Originals of one layer's experts one after the other, routed ones first: gate and up [F, D], down [D, F]."""

    def __init__(self, moe: Moe | None, spec: ModelSpec, read: Read, read_each: ReadEach, at: str) -> None:
        self.ffn = moe.ffn if moe else spec.ffn
        self._n_fixed = (moe.n_shared if moe else 1) or 0
        self._routed = [read_each(f"{at}.experts.*.{part}_proj.weight") for part in PARTS] if moe else []
        self._read, self._fixed_at = read, f"{at}.shared_experts" if moe else at

    def __len__(self) -> int:
        return (len(self._routed[0]) if self._routed else 0) + self._n_fixed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        yield from zip(*self._routed, strict=True)
        if self._n_fixed:
            gate, up, down = (self._read(f"{self._fixed_at}.{part}_proj.weight") for part in PARTS)
            yield from zip(gate.split(self.ffn), up.split(self.ffn), down.split(self.ffn, dim=1), strict=True)
