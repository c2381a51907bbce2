"""A StepPlan as tensors: built once a step, read by every layer. Must not decide anything."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from brigade.core.scheduler import DRAFT, LAST, Slice, StepPlan

PADDING = 2
"""Decodes share one padded attention call while the longest has at most this many times the pages of the shortest."""


@dataclass(frozen=True)
class Chunk:
    """Several query tokens of one request: rows `row`.. of the batch, at positions `start`.."""

    row: int
    n: int
    start: int
    pages_P: Tensor


@dataclass(frozen=True)
class Decodes:
    """One query token each of several requests with contexts of similar length."""

    rows_B: Tensor
    pages_BP: Tensor
    lengths_B: Tensor


@dataclass(frozen=True)
class Batch:
    """T tokens of one step, slice after slice."""

    ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    """Where each token's cache row goes: page * page size + offset."""
    slices: list[tuple[int, Slice]]
    """Each with its first row."""
    sample_R: Tensor
    """Rows whose logits are wanted."""
    rids: list[int]
    """Whose they are. Drafted tokens have rows, too."""
    wrote: Callable[[int], None] | None = None
    """To be called when the cache rows of a layer are written; None: nobody waits for them."""

    @cached_property
    def chunks(self) -> list[Chunk]:
        """Slices of several tokens."""
        return [Chunk(row, len(s.tokens), s.start, _long(list(s.pages))) for row, s in self.slices if len(s.tokens) > 1]

    @cached_property
    def decodes(self) -> list[Decodes]:
        """Slices of one token, those with contexts of similar length together."""
        return _group([(row, s) for row, s in self.slices if len(s.tokens) == 1])


def build(
    plan: StepPlan,
    page: int,
    last: Mapping[int, int],
    drafts: Mapping[int, Sequence[int]] | None = None,
    wrote: Callable[[int], None] | None = None,
) -> Batch:
    """Lay a plan out. `last` gives the token that a LAST of a request stands for, `drafts` those of its DRAFTs."""
    ids, positions, slots = list[int](), list[int](), list[int]()
    slices, sample, rids = list[tuple[int, Slice]](), list[int](), list[int]()
    for s in plan.slices:
        slices.append((len(ids), s))
        n_drafts = s.n_drafts
        ids += [last[s.rid] if t == LAST else t for t in s.tokens if t != DRAFT]
        if n_drafts and drafts is not None:
            ids += drafts[s.rid][:n_drafts]
        positions += range(s.start, s.end)
        slots += [s.pages[p // page] * page + p % page for p in range(s.start, s.end)]
        if s.sample:
            sample += range(len(ids) - 1 - n_drafts, len(ids))
            rids += [s.rid] * (1 + n_drafts)
    return Batch(_long(ids), _long(positions), _long(slots), slices, _long(sample), rids, wrote)


def _group(single: list[tuple[int, Slice]]) -> list[Decodes]:
    """Put decodes of similar context length together, so that padding at most doubles what is read."""
    groups: list[list[tuple[int, Slice]]] = []
    for row, s in sorted(single, key=lambda x: len(x[1].pages)):
        if groups and len(s.pages) <= PADDING * len(groups[-1][0][1].pages):
            groups[-1].append((row, s))
        else:
            groups.append([(row, s)])
    return [_decodes(g) for g in groups]


def _decodes(group: list[tuple[int, Slice]]) -> Decodes:
    width = max(len(s.pages) for _, s in group)
    pages = [[*s.pages, *[s.pages[0]] * (width - len(s.pages))] for _, s in group]
    return Decodes(_long([row for row, _ in group]), _long(pages), _long([s.end for _, s in group]))


def _long(values: list[int] | list[list[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)
