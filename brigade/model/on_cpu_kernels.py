"""The models' forward pass on the C++ kernels: the same functions as deepseek.py and dense.py, three calls a layer.

Activations are bf16, the residual stream and the logits float32. Every row's result is the same, bit by bit, whatever
else is in the batch, so no schedule changes the text.
"""

import ctypes
import time
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from brigade.core.laps import Laps
from brigade.kernels.cpu import structs
from brigade.kernels.cpu.drafts import DraftInput
from brigade.kernels.cpu.layers import (
    Each,
    FeedForward,
    GqaLayer,
    Head,
    Kernels,
    MlaLayer,
    Place,
    has_expanded_form,
    padded,
)
from brigade.kernels.cpu.packed import Kind
from brigade.model import rotary
from brigade.model.batch import Batch
from brigade.model.cache import KvCache
from brigade.model.overlap import InTurn, in_turn
from brigade.model.spread import Spread
from brigade.spec.model import Mla, ModelSpec


class ReadWeights(Protocol):
    """A checkpoint's reader."""

    def __call__(self, name: str) -> Tensor:
        """The weights of this name."""

    def experts(self, name: str) -> Each:
        """The experts of a stacked parameter, one after the other."""


class CpuModel:
    """The model on one rank. Reads its weights piece by piece; each piece's originals are dropped once it is packed, so
    that loading takes little more memory than what stays: those of a projection or of one expert."""

    def __init__(self, spec: ModelSpec, read: ReadWeights, kernels: Kernels, kind: Kind) -> None:
        self.spec, self.kernels, a = spec, kernels, spec.attention
        self.embed = read("model.embed_tokens.weight")
        # The head first: its original, the largest of all, is gone before there is much else.
        head = None if spec.tied_head else read("lm_head.weight")
        self.head = Head(kernels, spec, read, self.embed if head is None else head, kind)
        del head
        attention = MlaLayer if isinstance(a, Mla) else GqaLayer
        scale = rotary.score_scale(spec.rope, a.qk if isinstance(a, Mla) else a.head_dim)
        self.layers = [
            (
                attention(kernels, spec, read, f"model.layers.{i}", scale, kind),
                FeedForward(kernels, spec, read, i, kind, read.experts),
            )
            for i in range(spec.n_blocks)
        ]
        at = f"model.layers.{spec.n_layers}"
        self.drafts = DraftInput(kernels, spec, read, at, self.head.norm, kind) if spec.drafting else None
        self.two_forms = has_expanded_form(a)
        """Whether a prompt's rows are computed in another way than an answer's, so that they differ by a rounding."""
        self.spread = Spread(spec) if spec.moe else None
        """How rows reach experts, of other ranks too where `read` gives only some of them."""
        self.laps = Laps(time.monotonic_ns)
        self.cache: KvCache
        self.cos: Tensor
        self.sin: Tensor

    def attach(self, cache: KvCache, context: int) -> None:
        """Give it its cache, once it is known how much memory the weights left."""
        self.cache = cache
        self.cos, self.sin = rotary.table(self.spec.rope, context)

    def forward(self, *batches: Batch) -> Tensor:
        """Run one step, in one micro-batch or several. Returns float32 logits [R, V] of the rows to sample."""
        return self.logits(batches, self.trunk(*batches))

    def trunk(self, *batches: Batch) -> list[Tensor]:
        """The residual of all rows of each micro-batch, after the last layer: float32 [T, stride]."""
        return in_turn([self._layers(batch, lane) for lane, batch in enumerate(batches)])

    def logits(self, batches: Sequence[Batch], hidden: Sequence[Tensor]) -> Tensor:
        """float32 [R, V] of the rows to sample. `hidden`: what trunk gave for these batches."""
        logits = self.head(_sampled(batches, hidden))
        self.laps.end("head")
        return logits

    def draft(self, batches: Sequence[Batch], hidden: Sequence[Tensor]) -> Tensor:
        """Run the layer that drafts: float32 logits [R, V] of the tokens after next. `batches`: the tokens one further
        on than those whose rows `hidden` are."""
        if self.drafts is None:
            raise TypeError("this model was read without the layer that drafts")
        rows = [self.drafts(self._embedded(batch), x_TD) for batch, x_TD in zip(batches, hidden, strict=True)]
        parts = enumerate(zip(batches, rows, strict=True))
        layer = range(self.spec.n_layers, self.spec.n_blocks)
        ahead = in_turn([self._through(layer, batch, x_TD, lane) for lane, (batch, x_TD) in parts])
        logits = self.head(_sampled(batches, ahead), self.drafts.norm_out)
        self.laps.end("head")
        return logits

    def _layers(self, batch: Batch, lane: int) -> InTurn[Tensor]:
        """One micro-batch through all layers."""
        return (yield from self._through(range(self.spec.n_layers), batch, self._embedded(batch), lane))

    def _embedded(self, batch: Batch) -> Tensor:
        """The residual before the first layer."""
        dim = self.spec.dim
        x_TD = F.embedding(batch.ids_T, self.embed).float()
        return F.pad(x_TD, (0, padded(dim) - dim)) if dim % padded(1) else x_TD

    def _through(self, layers: range, batch: Batch, x_TD: Tensor, lane: int) -> InTurn[Tensor]:
        """The residual after these layers, which add to it in place."""
        step, _held = self._step(batch)
        laps = self.laps
        laps.end("embedding", -1, lane)
        for i in layers:
            attention, feed_forward = self.layers[i]
            attention(x_TD, step, self.cache.layers[i])
            laps.end("attention", i, lane)
            if batch.wrote:
                batch.wrote(i)
                laps.end("offering rows", i, lane)
            if self.spread is None or not self.spec.is_moe(i):
                feed_forward(x_TD)
                laps.end("feed-forward", i, lane)
            elif self.spread.exchange is None:
                self.spread.count(i, feed_forward(x_TD).ids_TK[:, : feed_forward.top_k])
                laps.end("experts", i, lane)
            else:
                yield from self._spread(i, feed_forward, x_TD, self.spread, lane)
        return x_TD

    def stage(self, layer: int, expert: tuple[Tensor, Tensor, Tensor], spare: Place | None) -> Place:
        """An expert of a layer in a place of its own, a `spare` one if there is one. From any thread."""
        return self.layers[layer][1].stage(*expert, spare)

    def swap(self, layer: int, slot: int, place: Place) -> Place:
        """From now on this slot holds the expert in `place`; returns where the old one is. Between two steps."""
        return self.layers[layer][1].swap(slot, place)

    def _spread(self, i: int, layer: FeedForward, x_TD: Tensor, spread: Spread, lane: int) -> InTurn[None]:
        """Layer i, whose routed experts lie on several ranks: the same sums in the same order as on one."""
        dim, laps = self.spec.dim, self.laps
        routed = layer.route(x_TD)
        laps.end("gate", i, lane)
        spread.offer(i, routed.x_TD[:, :dim], routed.ids_TK[:, : layer.top_k], lane)
        laps.end("dispatch", i, lane)
        yield
        rows_ND, slot_N = spread.take(lane)
        laps.end("dispatch, arriving", i, lane)
        rows_ND = F.pad(rows_ND, (0, padded(dim) - dim)) if dim % padded(1) else rows_ND
        y_ND = layer.routed_experts(rows_ND, slot_N)[:, :dim]
        laps.end("experts", i, lane)
        spread.give(y_ND, lane)
        laps.end("combine", i, lane)
        yield
        y_TKD = spread.results(lane)
        laps.end("combine, arriving", i, lane)
        layer.add_routed(y_TKD, routed, x_TD)
        layer.add_shared(routed, x_TD)
        laps.end("shared experts", i, lane)

    def _step(self, batch: Batch) -> tuple[structs.Step, object]:
        """The step as the kernels see it, and what must live as long."""
        n = len(batch.slices)
        sequences, pages, first = (structs.Sequence * n)(), list[int](), 0
        for i, (row, s) in enumerate(batch.slices):
            sequences[i] = structs.Sequence(row, len(s.tokens), s.start, first, s.prompt_end)
            pages += s.pages
            first += len(s.pages)
        pages_P = torch.tensor(pages, dtype=torch.int32)
        cos_TR, sin_TR = self.cos[batch.positions_T], self.sin[batch.positions_T]
        step = structs.Step(
            n_tokens=len(batch.ids_T),
            n_sequences=n,
            page=self.cache.page,
            cos=cos_TR.data_ptr(),
            sin=sin_TR.data_ptr(),
            slots=batch.slots_T.data_ptr(),
            sequences=ctypes.addressof(sequences),
            pages=pages_P.data_ptr(),
        )
        return step, (sequences, pages_P, cos_TR, sin_TR)


def _sampled(batches: Sequence[Batch], hidden: Sequence[Tensor]) -> Tensor:
    return torch.cat([x_TD[batch.sample_R] for batch, x_TD in zip(batches, hidden, strict=True)])
