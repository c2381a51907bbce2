"""DeepSeek-V3's forward pass over one step's tokens (arXiv:2412.19437). Reads top to bottom; must not know processes.

Attention runs in its absorbed form: queries are moved into the latent space, so the cache holds one latent and one
rotary key a token, never the heads. Shape letters as in kernels/reference.py.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from brigade.core.laps import Laps
from brigade.kernels import reference as ops
from brigade.model import rotary
from brigade.model.batch import Batch
from brigade.model.cache import KvCache
from brigade.model.overlap import InTurn, in_turn
from brigade.model.spread import Spread
from brigade.spec.model import Mla, ModelSpec

LATENT_NORM_EPS = 1e-6
"""The two norms inside MLA have their own constant in DeepSeek's code, whatever rms_norm_eps says."""

Weights = dict[str, Tensor]
"""By checkpoint name, as spec/params.py lists them; experts stacked under the name with a `*`."""


@dataclass(frozen=True)
class Attention:
    """One layer's attention weights; kv_b_proj is split into what absorbs queries and what expands values."""

    q_a: Tensor | None
    q_norm: Tensor | None
    q_b: Tensor
    kv_a: Tensor
    kv_norm: Tensor
    key_HNC: Tensor
    value_HCV: Tensor
    out: Tensor

    @classmethod
    def of(cls, w: Weights, at: str, a: Mla) -> "Attention":
        up = w[f"{at}.kv_b_proj.weight"].view(a.n_heads, a.nope + a.v, a.kv_rank)
        return cls(
            q_a=w.get(f"{at}.q_a_proj.weight"),
            q_norm=w.get(f"{at}.q_a_layernorm.weight"),
            q_b=w[f"{at}.q_b_proj.weight" if a.q_rank else f"{at}.q_proj.weight"],
            kv_a=w[f"{at}.kv_a_proj_with_mqa.weight"],
            kv_norm=w[f"{at}.kv_a_layernorm.weight"],
            key_HNC=up[:, : a.nope],
            value_HCV=up[:, a.nope :].transpose(1, 2),
            out=w[f"{at}.o_proj.weight"],
        )


class Place(NamedTuple):
    """Memory that holds one expert."""

    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor


class DeepSeek:
    """The model on one rank. `forward` may be called with a batch of no tokens."""

    two_forms = False
    """Whether rows of a prompt are computed in another way than those of an answer."""

    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        if not isinstance(spec.attention, Mla):
            raise TypeError(f"{spec.architecture} has no latent attention")
        self.spec, self.a, self.w = spec, spec.attention, weights
        self.attn = [Attention.of(weights, f"model.layers.{i}.self_attn", self.a) for i in range(spec.n_blocks)]
        self.scale = rotary.score_scale(spec.rope, self.a.qk)
        self.laps = Laps(time.monotonic_ns)
        self.spread = Spread(spec) if spec.moe else None
        """How rows reach experts, of other ranks too where the weights hold only some of them."""
        names = [f"model.layers.{i}.mlp.experts.*" for i in range(spec.n_dense, spec.n_blocks) if spec.moe]
        self._experts = [
            tuple(list(weights[f"{at}.{part}_proj.weight"]) for part in ("gate", "up", "down")) for at in names
        ]

    def attach(self, cache: KvCache, context: int) -> None:
        """Give it its cache, once it is known how much memory the weights left."""
        self.cache = cache
        self.cos, self.sin = rotary.table(self.spec.rope, context)

    def forward(self, *batches: Batch) -> Tensor:
        """Run one step, in one micro-batch or several. Returns float32 logits [R, V] of the rows to sample."""
        return self.logits(batches, self.trunk(*batches))

    def trunk(self, *batches: Batch) -> list[Tensor]:
        """The residual of all rows of each micro-batch, after the last layer."""
        return in_turn([self._layers(batch, lane) for lane, batch in enumerate(batches)])

    def logits(self, batches: Sequence[Batch], hidden: Sequence[Tensor], norm: str = "model.norm") -> Tensor:
        """float32 [R, V] of the rows to sample. `hidden`: what trunk gave for these batches."""
        x_RD = torch.cat([x_TD[batch.sample_R] for batch, x_TD in zip(batches, hidden, strict=True)])
        head = "model.embed_tokens.weight" if self.spec.tied_head else "lm_head.weight"
        logits = F.linear(self.norm(x_RD, norm), self.w[head]).float()
        self.laps.end("head")
        return logits

    def draft(self, batches: Sequence[Batch], hidden: Sequence[Tensor]) -> Tensor:
        """Run the layer that drafts: float32 logits [R, V] of the tokens after next. `batches`: the tokens one further
        on than those whose rows `hidden` are."""
        parts = zip(batches, hidden, strict=True)
        ahead = in_turn([self._draft_layer(batch, x_TD, lane) for lane, (batch, x_TD) in enumerate(parts)])
        return self.logits(batches, ahead, f"model.layers.{self.spec.n_layers}.shared_head.norm")

    def _layers(self, batch: Batch, lane: int) -> InTurn[Tensor]:
        """One micro-batch through all layers."""
        x_TD, turn = F.embedding(batch.ids_T, self.w["model.embed_tokens.weight"]), self._turn(batch)
        self.laps.end("embedding", -1, lane)
        for i in range(self.spec.n_layers):
            x_TD = yield from self._layer(i, x_TD, batch, turn, lane)
        return x_TD

    def _draft_layer(self, batch: Batch, hidden_TD: Tensor, lane: int) -> InTurn[Tensor]:
        at = f"model.layers.{self.spec.n_layers}"
        next_TD = self.norm(F.embedding(batch.ids_T, self.w["model.embed_tokens.weight"]), f"{at}.enorm")
        here_TD = self.norm(self.norm(hidden_TD, "model.norm"), f"{at}.hnorm")
        x_TD = F.linear(torch.cat([next_TD, here_TD], -1), self.w[f"{at}.eh_proj.weight"])
        self.laps.end("embedding", self.spec.n_layers, lane)
        return (yield from self._layer(self.spec.n_layers, x_TD, batch, self._turn(batch), lane))

    def _turn(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """cos_TR, sin_TR"""
        return self.cos[batch.positions_T], self.sin[batch.positions_T]

    def _layer(self, i: int, x_TD: Tensor, batch: Batch, turn: tuple[Tensor, Tensor], lane: int) -> InTurn[Tensor]:
        at = f"model.layers.{i}"
        x_TD = x_TD + self.attention(i, self.norm(x_TD, f"{at}.input_layernorm"), batch, *turn, lane)
        if batch.wrote:
            batch.wrote(i)
            self.laps.end("offering rows", i, lane)
        h_TD = self.norm(x_TD, f"{at}.post_attention_layernorm")
        if self.spec.is_moe(i):
            return x_TD + (yield from self.moe(i, h_TD, f"{at}.mlp", lane))
        x_TD = x_TD + self.mlp(h_TD, f"{at}.mlp")
        self.laps.end("feed-forward", i, lane)
        return x_TD

    def attention(self, layer: int, x_TD: Tensor, batch: Batch, cos_TR: Tensor, sin_TR: Tensor, lane: int) -> Tensor:
        a, w, cache, laps = self.a, self.attn[layer], self.cache.layers[layer], self.laps
        q = x_TD if w.q_a is None else ops.rms_norm(F.linear(x_TD, w.q_a), _some(w.q_norm), LATENT_NORM_EPS)
        q_THN, q_THR = F.linear(q, w.q_b).unflatten(-1, (a.n_heads, a.qk)).split([a.nope, a.rope], -1)
        c_TC, k_TR = F.linear(x_TD, w.kv_a).split([a.kv_rank, a.rope], -1)
        interleaved = self.spec.rope.interleaved
        k_TR = ops.rotate(k_TR, cos_TR, sin_TR, interleaved)
        q_THR = ops.rotate(q_THR, cos_TR[:, None], sin_TR[:, None], interleaved)
        rows_TW = torch.cat([ops.rms_norm(c_TC, w.kv_norm, LATENT_NORM_EPS), k_TR], -1)
        ops.write_cache(cache, rows_TW, batch.slots_T)
        q_THC = (q_THN.transpose(0, 1) @ w.key_HNC).transpose(0, 1)
        q_THW = torch.cat([q_THC, q_THR], -1) * self.scale
        laps.end("attention, projections in", layer, lane)
        o_THC = torch.empty_like(q_THC)
        for c in batch.chunks:
            o_THC[c.row : c.row + c.n] = ops.mla_prefill(
                q_THW[c.row : c.row + c.n], cache, c.pages_P, c.start, a.kv_rank
            )
        for d in batch.decodes:
            o_THC[d.rows_B] = ops.mla_decode(q_THW[d.rows_B], cache, d.pages_BP, d.lengths_B, a.kv_rank)
        laps.end("attention", layer, lane)
        o_THV = (o_THC.transpose(0, 1) @ w.value_HCV).transpose(0, 1)
        y_TD = F.linear(o_THV.flatten(1), w.out)
        laps.end("attention, projection out", layer, lane)
        return y_TD

    def moe(self, layer: int, x_TD: Tensor, at: str, lane: int) -> InTurn[Tensor]:
        w, moe, spread, laps = self.w, self.spec.moe, self.spread, self.laps
        if moe is None or spread is None:
            raise TypeError(f"{at} is not a mixture of experts")
        ids_TK, w_TK = ops.route(x_TD, w[f"{at}.gate.weight"], w[f"{at}.gate.e_score_correction_bias"], moe)
        gate, up, down = self._experts[layer - self.spec.n_dense]
        laps.end("gate", layer, lane)
        if spread.exchange is None:
            spread.count(layer, ids_TK)
            y_TD = ops.experts(x_TD, ids_TK, w_TK, gate, up, down)
            laps.end("experts", layer, lane)
        else:
            spread.offer(layer, x_TD, ids_TK, lane)
            laps.end("dispatch", layer, lane)
            yield
            rows_ND, slot_N = spread.take(lane)
            laps.end("dispatch, arriving", layer, lane)
            one_N1 = torch.ones(len(slot_N), 1)
            y_ND = ops.experts(rows_ND, slot_N[:, None].long(), one_N1, gate, up, down).float()
            laps.end("experts", layer, lane)
            spread.give(y_ND, lane)
            laps.end("combine", layer, lane)
            yield
            y_TKD = spread.results(lane)
            laps.end("combine, arriving", layer, lane)
            y_TD = torch.einsum("tkd,tk->td", y_TKD, w_TK).to(x_TD.dtype)
        y_TD = y_TD + self.mlp(x_TD, f"{at}.shared_experts") if moe.n_shared else y_TD
        laps.end("shared experts", layer, lane)
        return y_TD

    def mlp(self, x_TD: Tensor, at: str) -> Tensor:
        gate, up, down = (self.w[f"{at}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return ops.swiglu(x_TD, gate, up, down)

    def stage(self, layer: int, expert: tuple[Tensor, Tensor, Tensor], spare: Place | None) -> Place:
        """An expert of a layer in a place of its own, a `spare` one if there is one. From any thread."""
        if spare is None:
            return Place(*expert)
        for to, part in zip(spare, expert, strict=True):
            to.copy_(part)
        return spare

    def swap(self, layer: int, slot: int, place: Place) -> Place:
        """From now on this slot holds the expert in `place`; returns where the old one is. Between two steps."""
        lists = self._experts[layer - self.spec.n_dense]
        old = Place(*(part[slot] for part in lists))
        for part, new in zip(lists, place, strict=True):
            part[slot] = new
        return old

    def norm(self, x: Tensor, at: str) -> Tensor:
        return ops.rms_norm(x, self.w[f"{at}.weight"], self.spec.norm_eps)


def _some(t: Tensor | None) -> Tensor:
    if t is None:
        raise TypeError("a model with q_lora_rank needs q_a_layernorm")
    return t
