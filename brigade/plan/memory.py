"""Bytes of one rank: weights it holds, room for the cache, and how many requests that makes."""

from dataclasses import dataclass

from brigade.spec.device import Device
from brigade.spec.work import Facts, Grid, kv_cut

RESERVED = 6e9
"""Activations, communication buffers, graphs and the runtime of an accelerator; a common setting of today's engines."""
USABLE = 0.9
"""Share of the memory that engines take by default."""
CPU_RESERVED = 1e9
"""The same of a CPU host, which keeps no graphs and few buffers."""


@dataclass(frozen=True)
class Memory:
    """What one rank's memory holds."""

    dense: float
    """Attention, dense layers, gate, norms."""
    experts: float
    shared: float
    head: float
    """Head and embedding."""
    reserved: float
    free: float
    """Left for the cache; negative: the model does not fit."""
    kv_token: float
    """Bytes of cache of one token on this rank."""

    @property
    def weights(self) -> float:
        return self.dense + self.experts + self.shared + self.head

    @property
    def tokens(self) -> int:
        """Tokens of cache on one attention replica: what one of its ranks has room for."""
        return max(0, int(self.free / self.kv_token))


def memory(f: Facts, grid: Grid, device: Device, usable: float = USABLE, drafts: int = 0) -> Memory:
    """Memory of the fullest rank. `drafts`: a multi-token-prediction layer is held too, if any.

    With pipeline stages a rank holds its stage's share of the layers, and of every token's cache; embedding and head
    are on different stages.
    """
    share = kv_share = -(-f.n_layers // grid.pp) / f.n_layers
    slots = -(-(f.n_experts + grid.redundant) // grid.routed) if f.n_moe else 0
    layers = f.n_moe * share + (1 if drafts and f.n_moe else 0)
    dense = f.cut_bytes / grid.tp + f.whole_bytes + f.gate_bytes + f.norm_bytes
    dense *= share
    if drafts:  # one layer more, with a cache of its own
        dense += f.draft_cut_bytes / grid.tp + f.draft_whole_bytes
        kv_share += 1 / f.n_layers
    experts = layers * slots * f.expert_bytes / grid.moe_tp
    shared = 0.0 if grid.shared_ranks else layers * f.shared_bytes / grid.tp
    head = (f.head_bytes + f.lookup_bytes if grid.pp == 1 else max(f.head_bytes, f.lookup_bytes)) / grid.tp
    reserved = kept_bytes(device) + device.hbm * (1 - usable)
    free = device.hbm - reserved - dense - experts - shared - head
    return Memory(dense, experts, shared, head, reserved, free, kv_share * f.kv_bytes / kv_cut(f, grid.tp))


def kept_bytes(device: Device) -> float:
    """Kept free on each rank beside a share of its memory."""
    return RESERVED if device.kind == "gpu" else CPU_RESERVED


def weight_bytes(f: Facts) -> float:
    """All weights of the model, once."""
    return (
        f.cut_bytes
        + f.whole_bytes
        + f.gate_bytes
        + f.norm_bytes
        + f.n_moe * (f.shared_bytes + f.n_experts * f.expert_bytes)
        + f.head_bytes
        + f.lookup_bytes
    )
