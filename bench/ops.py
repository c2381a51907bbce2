"""Every op of a layer beside its limit: bytes over read bandwidth, operations over the matrix rate, both measured now.

    python -m bench.ops CHECKPOINT --threads 1 --kind bf16

Weights are random in the shapes of the checkpoint's config.json: no tensor file is needed. Each line is the median of
several calls, with as many copies of the experts, of the attention layer and of its pages as it takes to leave the
caches between two calls. Op names are the cost model's: attention (projections and core attention together), core
attention, experts (with gate and shared expert), head.
"""

import argparse
import ctypes
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.limits import Limits, measure_apart
from bench.roofline import CACHE_BYTES, WEIGHT_BYTES, Op
from brigade.engine.machine import read_cpu
from brigade.kernels.cpu import structs
from brigade.kernels.cpu.build import Built, find_library
from brigade.kernels.cpu.layers import FeedForward, Head, Kernels, MlaLayer, for_linear, has_expanded_form, padded
from brigade.kernels.cpu.packed import Kind
from brigade.model import rotary
from brigade.spec.config import read_spec
from brigade.spec.model import Mla, ModelSpec
from brigade.spec.params import params

PAGE = 16
CACHE_LEFT = 1 << 27
"""Bytes that the copies of a layer or of its pages must fill, so that a call finds none of its own in the caches."""
INPUTS = 16
"""Different rows that take turns: the same rows would find their few experts in the caches."""
TOKENS = (1, 4, 8, 16, 32, 64, 256, 1024)
CONTEXTS = ((1, 1, 512), (1, 1, 4096), (8, 1, 512), (32, 1, 512), (1, 512, 0), (1, 512, 3584))
"""Requests, tokens of each, positions before them."""


@dataclass(frozen=True)
class Line:
    op: str
    case: str
    work: Op
    seconds: float


def main() -> int:
    """The command line. Returns the exit status: 1 where the kernels cannot be used."""
    parser = argparse.ArgumentParser(prog="bench.ops", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kind", choices=("bf16", "int8", "int4"), default="bf16")
    options = parser.parse_args()
    library = find_library(read_cpu().features)
    if not isinstance(library, Built):
        print(library, file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    spec = read_spec(options.checkpoint)
    limits = measure_apart(options.threads)
    bench = Bench(spec, Kernels(library.path, options.threads), options.kind)
    Console(width=120).print(table(list(bench.lines()), limits, options.kind))
    return 0


class Bench:
    """Times the ops of one model."""

    def __init__(self, spec: ModelSpec, kernels: Kernels, kind: Kind) -> None:
        if not isinstance(spec.attention, Mla) or spec.moe is None:
            raise ValueError("bench.ops measures models with latent attention and experts")
        self.spec, self.a, self.moe, self.kernels, self.kind = spec, spec.attention, spec.moe, kernels, kind
        self.shapes = {p.name: p.shape for p in params(spec)}
        self.cos, self.sin = rotary.table(spec.rope, spec.context)

    def lines(self) -> Iterator[Line]:
        yield from self._experts()
        yield from self._attention()
        head = Head(self.kernels, self.spec, self._read, self._read("lm_head.weight"), self.kind)
        for n in (1, 32):
            work = self._product("head", self.spec.vocab * self.spec.dim, n)
            yield Line("head", f"T={n}", work, median(lambda n=n: head(self._residual(n))))  # type: ignore[misc]

    def _experts(self) -> Iterator[Line]:
        layer, dim = self.spec.n_layers - 1, self.spec.dim
        one = 3 * dim * self.moe.ffn
        n_copies = copies(one * self.moe.n_experts * WEIGHT_BYTES[self.kind])
        layers = [FeedForward(self.kernels, self.spec, self._read, layer, self.kind) for _ in range(n_copies)]
        for n in TOKENS:
            xs = [self._residual(n) for _ in range(INPUTS)]
            touched = self.moe.n_experts * (1 - (1 - self.moe.top_k / self.moe.n_experts) ** n) + self.moe.n_shared
            n_bytes = touched * one * WEIGHT_BYTES[self.kind] + 4 * self.moe.n_experts * dim
            work = Op("experts", n_bytes, 2 * n * one * (self.moe.top_k + self.moe.n_shared))
            calls: list[Callable[[], object]] = [
                lambda f=f, x=x: f(x.clone())  # type: ignore[misc]
                for x in xs
                for f in layers
            ]
            yield Line("experts", f"T={n}", work, median(in_turn(calls)))

    def _attention(self) -> Iterator[Line]:
        a, dim = self.a, self.spec.dim
        scale = rotary.score_scale(self.spec.rope, a.qk)
        name = f"model.layers.{self.spec.n_layers - 1}"
        rank = a.q_rank or 0
        weights = (rank or a.n_heads * a.qk) * dim + (a.kv_rank + a.rope) * dim + rank * a.n_heads * a.qk
        weights += a.n_heads * (a.nope + a.v) * a.kv_rank + a.n_heads * a.v * dim
        layers = [
            MlaLayer(self.kernels, self.spec, self._read, name, scale, self.kind)
            for _ in range(copies(weights * WEIGHT_BYTES[for_linear(self.kind)]))
        ]
        for n_requests, n, start in CONTEXTS:
            expanded = n > 1 and has_expanded_form(a)
            step, caches, _held = self._step(n_requests, n, start, expanded)
            tokens, case = n_requests * n, f"{n_requests} x {n} @ {start}"
            positions = n_requests * sum(range(start + 1, start + n + 1))
            core = Op(
                "core attention",
                n_requests * (start + n) * (a.kv_rank + a.rope) * CACHE_BYTES,
                2 * positions * a.n_heads * (a.qk + a.v if expanded else 2 * a.kv_rank + a.rope),
            )
            product = self._product("projections", weights, tokens)
            # Keys of this step are expanded by the projections' last matrix, those before it once more.
            again = 2 * n_requests * start * a.n_heads * (a.nope + a.v) * a.kv_rank if expanded else 0
            whole = Op("attention", core.n_bytes + product.n_bytes, core.n_ops + product.n_ops + again)
            x = self._residual(tokens)
            cores = [self._core(step, cache, tokens, expanded) for cache in caches]
            yield Line("core attention", case, core, median(in_turn(cores)))
            del cores  # with the expanded keys
            n_calls = max(len(layers), len(caches))
            pairs = itertools.islice(zip(itertools.cycle(layers), itertools.cycle(caches), strict=False), n_calls)
            calls: list[Callable[[], object]] = [
                lambda f=f, c=c, s=step, x=x: f(x.clone(), s, c)  # type: ignore[misc]
                for f, c in pairs
            ]
            yield Line("attention", case, whole, median(in_turn(calls)))

    def _core(self, step: structs.Step, cache: Tensor, n_tokens: int, expanded: bool) -> Callable[[], object]:
        """Attention alone: over the latents, or over heads as if they had been expanded."""
        a, k = self.a, self.kernels
        row = a.kv_rank + a.rope
        heads, n_out = structs.Heads(1, a.n_heads, 0, row, 0, a.kv_rank, row, 0, 0), a.kv_rank
        if expanded:
            key_value = a.qk + a.v
            cache = torch.randn(*cache.shape[:2], a.n_heads * key_value).bfloat16()
            heads = structs.Heads(a.n_heads, 1, 0, a.qk, a.qk, a.v, a.n_heads * key_value, key_value, key_value)
            n_out = a.v
        stride = padded(heads.key_width)
        q = torch.randn(n_tokens, a.n_heads, stride).bfloat16()
        out = torch.empty(n_tokens, a.n_heads, padded(n_out), dtype=torch.bfloat16)
        return lambda: k.library.attention(
            *(k.pool, heads, step, cache.data_ptr(), q.data_ptr(), stride, out.data_ptr(), out.shape[-1])
        )

    def _step(self, n_requests: int, n: int, start: int, expanded: bool) -> tuple[structs.Step, list[Tensor], object]:
        """A step of equal requests with pages of their own, caches of random rows, and what must live as long."""
        each = -(-(start + n) // PAGE)
        sequences = (structs.Sequence * n_requests)()
        for i in range(n_requests):
            sequences[i] = structs.Sequence(i * n, n, start, i * each, start + n if expanded else 0)
        pages = torch.randperm(n_requests * each).int()
        position = torch.arange(start, start + n).repeat(n_requests)
        first = torch.arange(n_requests).repeat_interleave(n) * each
        slots = pages[first + position // PAGE].long() * PAGE + position % PAGE
        cos, sin = self.cos[position], self.sin[position]
        shape = n_requests * each, PAGE, self.spec.kv_width
        caches = [torch.randn(shape).bfloat16() for _ in range(copies(math.prod(shape) * CACHE_BYTES))]
        step = structs.Step(
            *(n_requests * n, n_requests, PAGE, cos.data_ptr(), sin.data_ptr(), slots.data_ptr()),
            *(ctypes.addressof(sequences), pages.data_ptr()),
        )
        return step, caches, (sequences, pages, slots, cos, sin)

    def _product(self, name: str, size: int, rows: int) -> Op:
        return Op(name, size * WEIGHT_BYTES[for_linear(self.kind)], 2.0 * rows * size)

    def _read(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if "norm" in name:
            return torch.ones(shape)
        return (torch.randn(shape) / math.sqrt(shape[-1])).bfloat16()

    def _residual(self, n: int) -> Tensor:
        x = torch.zeros(n, padded(self.spec.dim))
        x[:, : self.spec.dim] = torch.randn(n, self.spec.dim)
        return x


def copies(n_bytes: float) -> int:
    """How many of something are more than the caches hold."""
    return 1 + int(CACHE_LEFT // n_bytes)


def in_turn(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """A call that makes the next of `calls` each time."""
    state = {"i": 0}

    def call() -> object:
        state["i"] += 1
        return calls[state["i"] % len(calls)]()

    return call


def median(call: Callable[[], object], budget: float = 0.6) -> float:
    """Seconds of one call: the median of at least 5 calls within `budget` seconds or so."""
    call()
    times, end = list[float](), time.perf_counter() + budget
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 400):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def table(lines: list[Line], limits: Limits, kind: Kind) -> Table:
    """Measurement, limit and ratio of each line."""
    title = (
        f"{kind}, {limits.threads} thread(s); limits now: {limits.read_gbs:.1f} GB/s, "
        f"{limits.bf16_gflops:.0f} GFLOP/s bf16, {limits.int8_gops:.0f} Gop/s int8"
    )
    if limits.cache_line_ns is not None:
        title += f"; a cache line in {limits.cache_line_ns:.0f} ns"
    out = Table(title=title)
    for name in ("op", "case", "measured us", "limit us", "of the limit", "GB/s", "Gop/s"):
        out.add_column(name, justify="left" if name in ("op", "case") else "right")
    for line in lines:
        limit = line.work.seconds(limits, "bf16" if line.op == "core attention" else kind)
        rates = line.work.n_bytes / line.seconds / 1e9, line.work.n_ops / line.seconds / 1e9
        out.add_row(
            *(line.op, line.case, f"{line.seconds * 1e6:.0f}", f"{limit * 1e6:.0f}"),
            *(f"{100 * limit / line.seconds:.0f} %", f"{rates[0]:.1f}", f"{rates[1]:.0f}"),
        )
    return out


if __name__ == "__main__":
    sys.exit(main())
