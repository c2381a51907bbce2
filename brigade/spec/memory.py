"""Bytes that one rank holds: weights by kind and the KV cache, from the table of parameters. Pure arithmetic.

Weight types are those of the engine: on the C++ kernels bf16, int8 or int4, on torch the type that is computed in.
int8 has a float32 scale and an int32 sum for each output; int4 has a bf16 scale for every 32 inputs. Padding of odd
shapes to the kernels' groups is left out, and so are activations, which are small beside the rest.
"""

from typing import Literal

from brigade.spec.model import ModelSpec
from brigade.spec.params import Param, params

WeightKind = Literal["bf16", "int8", "int4", "float32", "bfloat16", "float16"]
TORCH = {"float32": 4, "bfloat16": 2, "float16": 2}
Part = Literal["routed experts", "shared experts", "feed-forward", "attention", "embedding and head", "gates and norms"]
PARTS: tuple[Part, ...] = (
    *("routed experts", "shared experts", "feed-forward", "attention", "embedding and head", "gates and norms"),
)
_PER_OUTPUT = 4 + 4
_INT4_BLOCK = 32


def weight_bytes(spec: ModelSpec, kind: WeightKind, n_slots: int) -> dict[Part, int]:
    """Bytes of a rank's weights by part, where it has room for `n_slots` routed experts in each layer."""
    out: dict[Part, int] = dict.fromkeys(PARTS, 0)
    for p in params(spec):
        part = part_of(p)
        whole = _bytes(p, kind, part)
        out[part] += whole * n_slots // p.shape[0] if p.per_expert else whole
    if spec.tied_head and kind not in TORCH:  # looked up as it is, and packed once more for the head
        head = Param("lm_head.weight", (spec.vocab, spec.dim), (None, None))
        out["embedding and head"] += _bytes(head, kind, "embedding and head")
    return out


def kv_bytes(spec: ModelSpec, tokens: int, number: int = 2) -> int:
    """Bytes of `tokens` positions in the cache, at `number` bytes for each of them."""
    return spec.n_blocks * spec.kv_width * tokens * number


def part_of(p: Param) -> Part:
    """What a parameter is counted as."""
    if p.per_expert:
        return "routed experts"
    if len(p.shape) == 1 or p.exact:
        return "gates and norms"
    if ".shared_experts." in p.name:
        return "shared experts"
    if ".self_attn." in p.name:
        return "attention"
    return "feed-forward" if ".mlp." in p.name or ".eh_proj." in p.name else "embedding and head"


def _bytes(p: Param, kind: WeightKind, part: Part) -> int:
    if kind in TORCH:
        return p.size * (4 if p.exact else TORCH[kind])
    if part == "gates and norms":
        return p.size * 4
    if kind == "bf16" or "embed_tokens" in p.name or "kv_b_proj" in p.name:
        return p.size * 2
    experts = part in ("routed experts", "shared experts", "feed-forward")
    ins = p.shape[-1]
    outs = p.size // ins
    if kind == "int4" and experts:
        return p.size // 2 + outs * -(-ins // _INT4_BLOCK) * 2
    return p.size + outs * _PER_OUTPUT
