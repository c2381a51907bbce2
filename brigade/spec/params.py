"""The table of parameters: every checkpoint tensor once. Loader, memory planner and cost model all read it."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from brigade.spec.model import Gqa, Mla, ModelSpec, Moe

Axis = str | None
EXPERT, HEAD, FFN, VOCAB = "expert", "head", "ffn", "vocab"


@dataclass(frozen=True)
class Param:
    """One parameter: its full shape, which axis may be cut between ranks, and how often a token multiplies by it.

    A name with a `*` stands for one checkpoint tensor per expert; those are stacked along the first axis.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    uses: float = 1.0
    """Matmuls per token: top_k / n_experts for routed experts, 0 for lookups, norms and biases."""
    scaled: bool = False
    """True: an FP8 checkpoint stores it as float8 with a `_scale_inv` tensor beside it."""
    exact: bool = False
    """True: kept in float32 whatever the compute type: the gate decides between near-equal scores."""

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def per_expert(self) -> bool:
        return "*" in self.name

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The checkpoint tensors behind this parameter: name and shape of each."""
        if not self.per_expert:
            yield self.name, self.shape
            return
        for expert in range(self.shape[0]):
            yield self.name.replace("*", str(expert)), self.shape[1:]


def params(spec: ModelSpec) -> Iterator[Param]:
    """Every parameter that is held: of the main model, and of the multi-token-prediction layer where that drafts."""
    yield Param("model.embed_tokens.weight", (spec.vocab, spec.dim), (VOCAB, None), uses=1 if spec.tied_head else 0)
    for layer in range(spec.n_layers):
        yield from _layer(spec, f"model.layers.{layer}", spec.is_moe(layer))
    if spec.drafting:
        yield from _drafts(spec, f"model.layers.{spec.n_layers}")
    yield _norm("model.norm", spec.dim)
    if not spec.tied_head:
        yield Param("lm_head.weight", (spec.vocab, spec.dim), (VOCAB, None))


def count(spec: ModelSpec) -> int:
    """All parameters that are held."""
    return sum(p.size for p in params(spec))


def active(spec: ModelSpec) -> float:
    """Parameters one token multiplies by: the multiply-accumulates of its matmuls, attention over the context aside."""
    return sum(p.size * p.uses for p in params(spec))


def _layer(spec: ModelSpec, at: str, moe: bool) -> Iterator[Param]:
    yield _norm(f"{at}.input_layernorm", spec.dim)
    if isinstance(spec.attention, Mla):
        yield from _mla(spec.attention, spec.dim, f"{at}.self_attn")
    else:
        yield from _gqa(spec.attention, spec.dim, f"{at}.self_attn")
    yield _norm(f"{at}.post_attention_layernorm", spec.dim)
    if moe and spec.moe is not None:
        yield from _moe(spec.moe, spec.dim, f"{at}.mlp")
    else:
        yield from _mlp(f"{at}.mlp", spec.dim, spec.ffn)


def _drafts(spec: ModelSpec, at: str) -> Iterator[Param]:
    """What one layer more has beside a layer's own (DeepSeek-V3, arXiv:2412.19437, section 2.2). Embedding and head are
    the main model's; checkpoints that store them here again repeat them."""
    yield _norm(f"{at}.enorm", spec.dim)
    yield _norm(f"{at}.hnorm", spec.dim)
    yield _linear(f"{at}.eh_proj", (spec.dim, 2 * spec.dim))
    yield from _layer(spec, at, spec.is_moe(spec.n_layers))
    yield _norm(f"{at}.shared_head.norm", spec.dim)


def _mla(a: Mla, dim: int, at: str) -> Iterator[Param]:
    if a.q_rank is None:
        yield _linear(f"{at}.q_proj", (a.n_heads * a.qk, dim), (HEAD, None))
    else:
        yield _linear(f"{at}.q_a_proj", (a.q_rank, dim))
        yield _norm(f"{at}.q_a_layernorm", a.q_rank)
        yield _linear(f"{at}.q_b_proj", (a.n_heads * a.qk, a.q_rank), (HEAD, None))
    yield _linear(f"{at}.kv_a_proj_with_mqa", (a.kv_rank + a.rope, dim))
    yield _norm(f"{at}.kv_a_layernorm", a.kv_rank)
    yield _linear(f"{at}.kv_b_proj", (a.n_heads * (a.nope + a.v), a.kv_rank), (HEAD, None))
    yield _linear(f"{at}.o_proj", (dim, a.n_heads * a.v), (None, HEAD))


def _gqa(a: Gqa, dim: int, at: str) -> Iterator[Param]:
    for name, heads in ("q_proj", a.n_heads), ("k_proj", a.n_kv_heads), ("v_proj", a.n_kv_heads):
        yield _linear(f"{at}.{name}", (heads * a.head_dim, dim), (HEAD, None))
        if a.qkv_bias:
            yield Param(f"{at}.{name}.bias", (heads * a.head_dim,), (HEAD,), uses=0)
    yield _linear(f"{at}.o_proj", (dim, a.n_heads * a.head_dim), (None, HEAD))


def _moe(m: Moe, dim: int, at: str) -> Iterator[Param]:
    yield Param(f"{at}.gate.weight", (m.n_experts, dim), (None, None), exact=True)
    yield Param(f"{at}.gate.e_score_correction_bias", (m.n_experts,), (None,), uses=0, exact=True)
    if m.n_shared:
        yield from _mlp(f"{at}.shared_experts", dim, m.n_shared * m.ffn)
    share, axes = m.top_k / m.n_experts, (EXPERT, None, None)
    for name, shape in ("gate", (m.ffn, dim)), ("up", (m.ffn, dim)), ("down", (dim, m.ffn)):
        yield Param(f"{at}.experts.*.{name}_proj.weight", (m.n_experts, *shape), axes, share, scaled=True)


def _mlp(at: str, dim: int, hidden: int) -> Iterator[Param]:
    yield _linear(f"{at}.gate_proj", (hidden, dim), (FFN, None))
    yield _linear(f"{at}.up_proj", (hidden, dim), (FFN, None))
    yield _linear(f"{at}.down_proj", (dim, hidden), (None, FFN))


def _linear(at: str, shape: tuple[int, int], axes: tuple[Axis, Axis] = (None, None)) -> Param:
    return Param(f"{at}.weight", shape, axes, scaled=True)


def _norm(at: str, width: int) -> Param:
    return Param(f"{at}.weight", (width,), (None,), uses=0)
