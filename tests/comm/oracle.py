"""What an exchange must say, written with plain loops over all ranks' inputs. No processes, no clever indexing."""

from bisect import bisect
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Inputs of all ranks, drawn from `seed`: the same in every process that asks."""

    seed: int
    n_tokens: tuple[int, ...]
    bounds: tuple[int, ...]
    width: int
    k: int
    dtype: str = "bfloat16"
    absent: float = 0.1
    """Share of slots that are -1."""
    wire: str = "auto"

    def inputs(self, rank: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(1000 * self.seed + rank)
        n = self.n_tokens[rank]
        x_TD = torch.randn(n, self.width, generator=g).to(getattr(torch, self.dtype))
        n_slots = self.bounds[-1]
        slots_TK = torch.randint(n_slots, (n, self.k), generator=g, dtype=torch.int32)
        return x_TD, slots_TK.masked_fill(torch.rand(n, self.k, generator=g) < self.absent, -1)

    def rows(self, rank: int) -> tuple[Tensor, Tensor]:
        """(rows_ND, slot_N) that `rank` must be given."""
        lo, hi = self.bounds[rank], self.bounds[rank + 1]
        rows, slots = [], []
        for source in range(len(self.n_tokens)):
            x_TD, slots_TK = self.inputs(source)
            for x_D, slots_K in zip(x_TD, slots_TK.tolist(), strict=True):
                for slot in slots_K:
                    if lo <= slot < hi:
                        rows.append(travelled(x_D, self.wire))
                        slots.append(slot - lo)
        empty = torch.empty(0, self.width, dtype=getattr(torch, self.dtype))
        return torch.stack(rows) if rows else empty, torch.tensor(slots, dtype=torch.int32)

    def results(self, rank: int) -> Tensor:
        """y_TKD that `rank` must get back when ranks compute `experts`."""
        x_TD, slots_TK = self.inputs(rank)
        y_TKD = torch.zeros(*slots_TK.shape, self.width)
        for t, slots_K in enumerate(slots_TK.tolist()):
            for k, slot in enumerate(slots_K):
                if slot >= 0:
                    y_TKD[t, k] = travelled(x_TD[t], self.wire).float() * (slot + 1)
        return y_TKD if self.wire == "auto" else y_TKD.bfloat16().float()


def experts(rows_ND: Tensor, slot_N: Tensor, first: int) -> Tensor:
    """A network that tells its experts apart: each multiplies by its slot number plus one."""
    return rows_ND.float() * (slot_N + first + 1).float()[:, None]


def travelled(x_D: Tensor, wire: str) -> Tensor:
    """A row as it comes out of the wire."""
    if wire == "auto":
        return x_D
    if wire == "bf16":
        return x_D.bfloat16().to(x_D.dtype)
    largest = {"int8": 127, "fp8": 448}[wire]
    out = []
    for tile in x_D.float().split(128):
        most = tile.abs().max()
        if most < 2.0**-100:
            out.append(torch.zeros_like(tile))
            continue
        steps = (tile * (torch.tensor(float(largest)) / most)).tolist()
        steps = [round(s) if wire == "int8" else e4m3(s) for s in steps]
        out.append(torch.tensor(steps) * (most / torch.tensor(float(largest))))
    return torch.cat(out).to(x_D.dtype)


E4M3 = [m * 2.0**-9 for m in range(8)] + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)][:-1]
"""All numbers of fp8 e4m3 from 0 on, in the order of their bits: no infinity, and the last pattern is no number."""


def e4m3(x: float) -> float:
    """The nearest of them; of two that are equally near, the one whose bits are even."""
    i = bisect(E4M3, abs(x)) - 1
    if i + 1 < len(E4M3):
        below, above = abs(x) - E4M3[i], E4M3[i + 1] - abs(x)
        i += above < below or (above == below and i % 2)
    return E4M3[i] if x >= 0 else -E4M3[i]
