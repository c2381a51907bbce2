"""What an exchange must say, written with plain loops over all ranks' inputs. No processes, no clever indexing."""

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
                        rows.append(x_D)
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
                    y_TKD[t, k] = x_TD[t].float() * (slot + 1)
        return y_TKD


def experts(rows_ND: Tensor, slot_N: Tensor, first: int) -> Tensor:
    """A network that tells its experts apart: each multiplies by its slot number plus one."""
    return rows_ND.float() * (slot_N + first + 1).float()[:, None]
