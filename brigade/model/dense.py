"""Llama's and Qwen2's forward pass over one step's tokens: grouped-query attention and plain feed-forward layers.

Shape letters as in kernels/reference.py.
"""

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from brigade.core.laps import Laps
from brigade.kernels import reference as ops
from brigade.model import rotary
from brigade.model.batch import Batch
from brigade.model.cache import KvCache
from brigade.spec.model import Gqa, ModelSpec


class Dense:
    """The model on one rank. `forward` may be called with a batch of no tokens."""

    two_forms = False
    """As DeepSeek's."""

    def __init__(self, spec: ModelSpec, weights: dict[str, Tensor]) -> None:
        if not isinstance(spec.attention, Gqa):
            raise TypeError(f"{spec.architecture} has no grouped-query attention")
        self.spec, self.a, self.w = spec, spec.attention, weights
        self.laps = Laps(time.monotonic_ns)
        self.scale = rotary.score_scale(spec.rope, self.a.head_dim)

    def attach(self, cache: KvCache, context: int) -> None:
        """Give it its cache, once it is known how much memory the weights left."""
        self.cache = cache
        self.cos, self.sin = rotary.table(self.spec.rope, context)

    def forward(self, batch: Batch) -> Tensor:
        """Run one step. Returns float32 logits [R, V] of the rows to sample."""
        x_TD = F.embedding(batch.ids_T, self.w["model.embed_tokens.weight"])
        cos_TR, sin_TR = self.cos[batch.positions_T][:, None], self.sin[batch.positions_T][:, None]
        self.laps.end("embedding")
        for i in range(self.spec.n_layers):
            at = f"model.layers.{i}"
            x_TD = x_TD + self.attention(i, self.norm(x_TD, f"{at}.input_layernorm"), batch, cos_TR, sin_TR)
            if batch.wrote:
                batch.wrote(i)
                self.laps.end("offering rows", i)
            h_TD = self.norm(x_TD, f"{at}.post_attention_layernorm")
            gate, up, down = (self.w[f"{at}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
            x_TD = x_TD + ops.swiglu(h_TD, gate, up, down)
            self.laps.end("feed-forward", i)
        x_RD = self.norm(x_TD[batch.sample_R], "model.norm")
        head = "model.embed_tokens.weight" if self.spec.tied_head else "lm_head.weight"
        logits = F.linear(x_RD, self.w[head]).float()
        self.laps.end("head")
        return logits

    def attention(self, layer: int, x_TD: Tensor, batch: Batch, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        a, cache, at = self.a, self.cache.layers[layer], f"model.layers.{layer}.self_attn"
        q_THV = self.linear(x_TD, f"{at}.q_proj").unflatten(-1, (a.n_heads, a.head_dim))
        k_THV = self.linear(x_TD, f"{at}.k_proj").unflatten(-1, (a.n_kv_heads, a.head_dim))
        v_TW = self.linear(x_TD, f"{at}.v_proj")
        q_THV = ops.rotate(q_THV, cos_TR, sin_TR, interleaved=False) * self.scale
        k_THV = ops.rotate(k_THV, cos_TR, sin_TR, interleaved=False)
        ops.write_cache(cache, torch.cat([k_THV.flatten(1), v_TW], -1), batch.slots_T)
        self.laps.end("attention, projections in", layer)
        o_THV = torch.empty_like(q_THV)
        for c in batch.chunks:
            q = q_THV[c.row : c.row + c.n]
            o_THV[c.row : c.row + c.n] = ops.gqa_prefill(q, cache, c.pages_P, c.start, a.n_kv_heads)
        for d in batch.decodes:
            o_THV[d.rows_B] = ops.gqa_decode(q_THV[d.rows_B], cache, d.pages_BP, d.lengths_B, a.n_kv_heads)
        self.laps.end("attention", layer)
        y_TD = F.linear(o_THV.flatten(1), self.w[f"{at}.o_proj.weight"])
        self.laps.end("attention, projection out", layer)
        return y_TD

    def linear(self, x: Tensor, at: str) -> Tensor:
        return F.linear(x, self.w[f"{at}.weight"], self.w.get(f"{at}.bias"))

    def norm(self, x: Tensor, at: str) -> Tensor:
        return ops.rms_norm(x, self.w[f"{at}.weight"], self.spec.norm_eps)
