"""What a model is: the architecture as frozen data. How it is read from a config.json stands in config.py."""

from dataclasses import dataclass
from typing import Literal

Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Yarn:
    """Context extension by YaRN (arXiv:2309.00071), with DeepSeek's two mscale numbers."""

    factor: float
    original_context: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True)
class Llama3Rope:
    """Context extension of Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding over `dim` numbers a head."""

    dim: int
    theta: float
    interleaved: bool
    """True: numbers 2i and 2i+1 turn together (DeepSeek); False: numbers i and i + dim/2 (Llama, Qwen)."""
    scaling: Yarn | Llama3Rope | None = None


@dataclass(frozen=True)
class Mla:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1)."""

    n_heads: int
    q_rank: int | None
    kv_rank: int
    nope: int
    rope: int
    v: int

    @property
    def qk(self) -> int:
        """Width of one query or key head."""
        return self.nope + self.rope


@dataclass(frozen=True)
class Gqa:
    """Grouped-query attention: `n_heads` query heads share `n_kv_heads` key and value heads."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    qkv_bias: bool


@dataclass(frozen=True)
class Moe:
    """Shared and routed experts with a sigmoid gate (DeepSeek-V3, arXiv:2412.19437, section 2.1.2)."""

    n_experts: int
    n_shared: int
    top_k: int
    ffn: int
    n_groups: int
    top_groups: int
    route_scale: float
    norm_weights: bool


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only language model: `n_layers` layers, the first `n_dense` with a plain feed-forward network."""

    architecture: str
    vocab: int
    dim: int
    n_layers: int
    n_dense: int
    context: int
    attention: Mla | Gqa
    rope: Rope
    ffn: int
    moe: Moe | None
    norm_eps: float
    tied_head: bool
    n_mtp: int
    dtype: Dtype
    block_scale: tuple[int, int] | None
    """Rows and columns of one FP8 scale in the checkpoint; None when weights are stored unscaled."""
    eos_ids: tuple[int, ...]
    drafting: bool = False
    """Whether the first multi-token-prediction layer is used, to draft tokens: it is then the layer after the last."""

    @property
    def n_blocks(self) -> int:
        """Layers that are held and have a cache: those of the model, and the one that drafts."""
        return self.n_layers + self.drafting

    @property
    def n_moe(self) -> int:
        """Of these, the layers with routed experts: from `n_dense` on."""
        return self.n_blocks - self.n_dense if self.moe is not None else 0

    @property
    def kv_width(self) -> int:
        """Cached numbers per token per layer: for MLA the latent plus the shared rotary key."""
        a = self.attention
        return a.kv_rank + a.rope if isinstance(a, Mla) else 2 * a.n_kv_heads * a.head_dim

    def is_moe(self, layer: int) -> bool:
        return self.moe is not None and layer >= self.n_dense
