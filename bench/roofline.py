"""How fast a model could run at most: bytes over bandwidth or operations over rate, whichever is longer, op by op.

Must not measure. Counted are the products with weights and the attention over the context; norms, routing and sampling
are not, and routing is taken as even, so a limit is a little higher than what any program can reach.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from bench.limits import Limits
from brigade.spec.model import Gqa, Mla, ModelSpec
from brigade.spec.params import Param, params

WEIGHT_BYTES = {"bf16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 32}
"""Of one weight of a large product; int4 has a 16-bit scale for every 32."""
CACHE_BYTES = 2
"""The KV cache is kept in 16 bits by all that are compared."""
EXACT_BYTES = 4


@dataclass(frozen=True)
class Op:
    """What one kind of work of one step needs."""

    name: str
    n_bytes: float
    n_ops: float
    """Multiplications and additions, two for each weight and row."""

    def seconds(self, limits: Limits, precision: str) -> float:
        return max(self.n_bytes / limits.read_gbs, self.n_ops / limits.gops(precision)) / 1e9


def decode_limit(spec: ModelSpec, limits: Limits, precision: str, concurrency: int, context: int) -> float:
    """Tokens/s of `concurrency` requests that each make one token a step, with `context` positions behind them."""
    return concurrency / step_seconds(decode_ops(spec, precision, concurrency, context), limits, precision)


def prefill_limit(spec: ModelSpec, limits: Limits, precision: str, n_tokens: int) -> float:
    """Prompt tokens/s of one prompt computed in one step, of which only the last position is put through the head."""
    return n_tokens / step_seconds(prefill_ops(spec, precision, n_tokens), limits, precision)


def step_seconds(ops: Iterator[Op], limits: Limits, precision: str) -> float:
    return sum(op.seconds(limits, precision) for op in ops)


def decode_ops(spec: ModelSpec, precision: str, concurrency: int, context: int) -> Iterator[Op]:
    """The work of one decode step."""
    yield from _products(spec, precision, concurrency, concurrency)
    # MLA in the absorbed form: scores against the latent and the rotary part, values from the latent
    a = spec.attention
    if isinstance(a, Mla):
        row, per_position = a.kv_rank + a.rope, a.n_heads * (2 * a.kv_rank + a.rope)
    else:
        row, per_position = _gqa_row(a), a.n_heads * 2 * a.head_dim
    positions = concurrency * context * spec.n_layers
    yield Op("attention", positions * row * CACHE_BYTES, 2 * positions * per_position)


def prefill_ops(spec: ModelSpec, precision: str, n_tokens: int) -> Iterator[Op]:
    """The work of one prompt in one step."""
    yield from _products(spec, precision, n_tokens, 1)
    a = spec.attention
    row = a.kv_rank + a.rope if isinstance(a, Mla) else _gqa_row(a)
    per_position = a.n_heads * (a.qk + a.v) if isinstance(a, Mla) else a.n_heads * 2 * a.head_dim
    pairs = n_tokens * (n_tokens + 1) // 2 * spec.n_layers
    yield Op("attention", n_tokens * row * CACHE_BYTES * spec.n_layers, 2 * pairs * per_position)


def _products(spec: ModelSpec, precision: str, rows: int, head_rows: int) -> Iterator[Op]:
    for param in params(spec):
        is_head = param.name in ("lm_head.weight", "model.embed_tokens.weight")
        if param.uses:
            yield _product(param, precision, head_rows if is_head else rows)


def _product(param: Param, precision: str, rows: int) -> Op:
    one = EXACT_BYTES if param.exact else WEIGHT_BYTES[precision]
    return Op(param.name, param.size * _touched(param, rows) * one, 2 * rows * param.size * param.uses)


def _touched(param: Param, rows: int) -> float:
    """The part of a parameter that is read: of experts, those that some row is expected to choose."""
    return 1 - (1 - param.uses) ** rows if param.per_expert else 1.0


def _gqa_row(a: Gqa) -> int:
    return 2 * a.n_kv_heads * a.head_dim
