"""Every C++ kernel gives what plain torch gives, and a row's result, bit by bit, does not depend on what is beside it.

A bf16 kernel is held against float32 torch on the same bf16 numbers: what may differ is the rounding of what it rounds.
An int8 kernel is held against the error that two roundings to 8 bits can make, not against a generous guess.
int4 weights are rounded in torch too: what differs is the rounding of activations, and in one test not even that.
"""

import ctypes
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from brigade.engine.config import DEMO_MODEL
from brigade.kernels import reference as ref
from brigade.kernels.cpu import structs
from brigade.kernels.cpu.layers import FeedForward, Head, Kernels, padded
from brigade.kernels.cpu.packed import BLOCK, Kind, Packed, pack
from brigade.spec.config import read_spec
from brigade.spec.model import Moe

COUNTS = (0, 1, 2, 5, 6, 7, 12, 13, 31, 100)
KINDS: tuple[Kind, ...] = ("bf16", "int8")
EXPERT_KINDS: tuple[Kind, ...] = (*KINDS, "int4")
MATRICES = [(64, 64), (1, 2), (63, 31), (100, 30), (65, 130), (288, 96), (700, 201)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def in_rows(x: Tensor) -> Tensor:
    """bf16 rows padded with zeros, as the kernels want them."""
    return F.pad(x.bfloat16(), (0, padded(x.shape[-1]) - x.shape[-1])).contiguous()


def distance(got: Tensor, want: Tensor) -> float:
    """Relative, over all numbers."""
    return float((got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-9))


# ---- linear


def linear(k: Kernels, w: Packed, x: Tensor) -> Tensor:
    """Into a wider tensor, whose last column must stay as it is."""
    y = torch.full((len(x), w.matrix.outs + 1), 7.0)
    k.library.linear_float(
        *(k.pool, ctypes.byref(w.matrix), x.data_ptr(), len(x), x.shape[1], y.data_ptr(), y.shape[1])
    )
    assert (y[:, -1] == 7).all(), "written beyond the outputs"
    return y[:, :-1]


@pytest.mark.parametrize(("outs", "ins"), MATRICES)
def test_a_bf16_linear_is_a_matrix_product(kernels: Kernels, outs: int, ins: int) -> None:
    w = torch.randn(outs, ins).bfloat16()
    packed = kernels.pack([w], "bf16")
    for n in (*COUNTS, 1024):
        x = in_rows(torch.randn(n, ins))
        want = x[:, :ins].double() @ w.double().T
        # only the order of float32 additions differs
        assert distance(linear(kernels, packed, x), want) < 1e-6, n


@pytest.mark.parametrize(("outs", "ins"), MATRICES)
def test_an_int8_linear_errs_by_no_more_than_its_roundings(kernels: Kernels, outs: int, ins: int) -> None:
    w = torch.randn(outs, ins).bfloat16()
    w[0] *= 1000  # a row's scale is its own
    packed = kernels.pack([w], "int8")
    for n in (*COUNTS, 1024):
        x = in_rows(torch.randn(n, ins) * 10 ** torch.linspace(-3, 3, max(n, 1))[:n, None])
        xs, ws = x[:, :ins].double(), w.double()
        x_half = xs.abs().amax(1, keepdim=True) / 254  # half a step of 8 bits
        w_half = ws.abs().amax(1, keepdim=True) / 254
        bound = xs.abs() @ w_half.expand_as(ws).T + x_half.expand_as(xs) @ ws.abs().T + ins * x_half @ w_half.T
        error = (linear(kernels, packed, x).double() - xs @ ws.T).abs()
        assert (error <= bound * 1.0001).all(), n
        # roundings are random: their sum is far below the worst case
        assert n == 0 or ins < 30 or float((error / bound).mean()) < 0.15, n


def test_int8_multiplies_the_integers_that_it_stands_for_exactly(kernels: Kernels) -> None:
    w = torch.randint(-127, 128, (70, 300)).float()
    x = torch.randint(-127, 128, (13, 300)).float()
    w[:, 0], x[:, 1] = 127, -127  # scales of 1
    got = linear(kernels, kernels.pack([w.bfloat16()], "int8"), in_rows(x))
    assert torch.equal(got.double(), x.double() @ w.double().T)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_weights_of_zeros_give_zeros(kernels: Kernels, kind: Kind) -> None:
    w = torch.randn(70, 50).bfloat16()
    w[3] = 0
    x = in_rows(torch.randn(9, 50))
    x[4] = 0
    got = linear(kernels, kernels.pack([w], kind), x)
    assert (got[4] == 0).all()
    assert (got[:, 3] == 0).all()
    assert (got != 0).sum() == 8 * 69


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_a_linear_does_not_depend_on_rows_beside_it_or_on_threads(
    on_threads: dict[int, Kernels], kind: Kind
) -> None:
    w = torch.randn(200, 130).bfloat16()
    packed = on_threads[1].pack([w], kind)
    x = in_rows(torch.randn(100, 130))
    alone = torch.cat([linear(on_threads[1], packed, row) for row in x.split(1)])
    for kernels in on_threads.values():
        for n in COUNTS:
            assert torch.equal(linear(kernels, packed, x[100 - n :]), alone[100 - n :]), n


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_not_hidden(kernels: Kernels, kind: Kind, broken: float) -> None:
    """The worker refuses a broken checkpoint, and ends a request whose logits are not finite: it must see them."""
    w, x = torch.randn(70, 50).bfloat16(), in_rows(torch.randn(9, 50))
    bad_w, bad_x = w.clone(), x.clone()
    bad_w[3, 5] = bad_x[4, 7] = broken
    finite = torch.isfinite(linear(kernels, kernels.pack([bad_w], kind), x))
    assert finite.all(0).tolist() == [i != 3 for i in range(70)]
    assert not finite[:, 3].any()
    finite = torch.isfinite(linear(kernels, kernels.pack([w], kind), bad_x))
    assert finite.all(1).tolist() == [i != 4 for i in range(9)]
    assert not finite[4].any()


def test_matrices_that_differ_in_shape_are_not_packed_together(on_threads: dict[int, Kernels]) -> None:
    with pytest.raises(ValueError, match="matrix 1 is"):
        on_threads[1].pack([torch.zeros(4, 4), torch.zeros(4, 6)], "bf16")


# ---- experts


def rounded_to_int4(w: Tensor) -> Tensor:
    """What int4 makes of weights [..., ins]: in each block of 32 the number of the largest magnitude is -8 steps."""
    blocks = F.pad(w.float(), (0, -w.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    step = (extreme / -8).bfloat16().float()
    steps = torch.where(step == 0, 0, blocks / step).round().clamp(-8, 7)
    return (steps * step).flatten(-2)[..., : w.shape[-1]]


def rounded_to_8_bits(x: Tensor) -> Tensor:
    """What the kernels make of rows of activations."""
    most = x.abs().amax(-1, keepdim=True)
    return torch.where(most == 0, 0, x * (127 / most)).round() * (most / 127)


class Experts:
    """E experts of width F, as torch tensors and packed."""

    def __init__(self, k: Kernels, n: int, dim: int, ffn: int, kind: Kind) -> None:
        self.n, self.dim, self.kind = n, dim, kind
        self.gate = (torch.randn(n, ffn, dim) * dim**-0.5).bfloat16()
        self.up = (torch.randn(n, ffn, dim) * dim**-0.5).bfloat16()
        self.down = (torch.randn(n, dim, ffn) * ffn**-0.5).bfloat16()
        both = [torch.cat(pair) for pair in zip(self.gate, self.up, strict=True)]
        self.gate_up = pack(k.library, both, kind, paired=True)
        self.packed_down = pack(k.library, list(self.down), kind)
        if kind == "int4":
            self.gate, self.up, self.down = (
                rounded_to_int4(self.gate),
                rounded_to_int4(self.up),
                rounded_to_int4(self.down),
            )

    def run(self, k: Kernels, x: Tensor, ids: Tensor, weights: Tensor, residual: Tensor) -> Tensor:
        """residual + experts, in a copy; the pad of the residual must stay as it is."""
        rows, ids, out = (
            in_rows(x),
            ids.int().contiguous(),
            F.pad(residual, (0, padded(self.dim) - self.dim), value=5.0),
        )
        k.library.experts(
            *(
                k.pool,
                rows.data_ptr(),
                rows.shape[1],
                ids.data_ptr(),
                weights.data_ptr(),
                out.data_ptr(),
                out.stride(0),
            ),
            *(len(x), ids.shape[1], self.n, self.gate_up.each, self.packed_down.each),
        )
        assert (out[:, self.dim :] == 5).all(), "written beyond the row"
        return out[:, : self.dim]

    def reference(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Skipped ids weigh nothing."""
        known = (ids >= 0) & (ids < self.n)
        return ref.experts(
            *(x.bfloat16().float(), torch.where(known, ids, 0), torch.where(known, weights, 0)),
            *(self.gate.float(), self.up.float(), self.down.float()),
        )

    @property
    def tolerance(self) -> float:
        """Seen: at most 0.0021 in bf16 (hidden numbers are rounded once) and 0.027 in int8 (two products of 8 bits); in
        int4, against rounded weights, 0.023 (activations alone)."""
        return {"bf16": 0.003, "int8": 0.035, "int4": 0.03}[self.kind]


def some_rows(n: int, e: Experts, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, ids without repetition, weights, residual."""
    ids = torch.rand(n, e.n).topk(k, -1)[1] if n else torch.zeros(0, k, dtype=torch.long)
    return torch.randn(n, e.dim), ids, torch.rand(n, k), torch.randn(n, e.dim)


@pytest.mark.parametrize("kind", EXPERT_KINDS)
@pytest.mark.parametrize(("n", "dim", "ffn", "k"), [(8, 128, 64, 3), (16, 192, 96, 4), (5, 72, 41, 2), (1, 63, 264, 1)])
def test_experts_add_what_the_reference_gives(kernels: Kernels, kind: Kind, n: int, dim: int, ffn: int, k: int) -> None:
    e = Experts(kernels, n, dim, ffn, kind)
    for T in (*COUNTS, *((1024,) if n == 5 else ())):
        x, ids, w, residual = some_rows(T, e, k)
        got = e.run(kernels, x, ids, w, residual)
        assert T == 0 or distance(got - residual, e.reference(x, ids, w)) < e.tolerance, T


@pytest.mark.parametrize(("dim", "ffn"), [(64, 32), (63, 31), (130, 65), (201, 264)])
def test_int4_experts_give_what_their_rounded_numbers_give(kernels: Kernels, dim: int, ffn: int) -> None:
    """All roundings are done in torch too: what may differ is a hidden number that lies between two steps."""
    e = Experts(kernels, 1, dim, ffn, "int4")
    for T in COUNTS:
        x = torch.randn(T, dim).bfloat16().float() * 10 ** torch.linspace(-3, 3, max(T, 1))[:T, None]
        rows = rounded_to_8_bits(x.bfloat16().float())
        hidden = F.silu(rows @ e.gate[0].T) * (rows @ e.up[0].T)
        want = rounded_to_8_bits(hidden) @ e.down[0].T
        got = e.run(kernels, x, torch.zeros(T, 1), torch.ones(T, 1), torch.zeros(T, dim))
        error = (got - want).norm(dim=-1) / want.norm(dim=-1)
        assert int((error > 1e-5).sum()) <= 1 + T // 10, T
        assert (error < 0.03).all(), T


def test_int4_keeps_16_steps_for_each_32_inputs_exactly(kernels: Kernels) -> None:
    """Weights that are whole steps, -8 among them in each block, whose sizes differ by powers of two."""
    e = Experts(kernels, 1, 96, 64, "int4")
    w = torch.randint(-8, 8, (96, 64)).float()
    w[:, 0] = w[:, 32] = -8
    w = (w * 2.0 ** torch.randint(-20, 20, (96, 2)).repeat_interleave(32, 1)).bfloat16()
    assert torch.equal(rounded_to_int4(w), w.float())
    bf16 = Experts(kernels, 1, 96, 64, "bf16")
    for experts, kind in ((e, "int4"), (bf16, "bf16")):
        # one hidden number is about 8, all others are zeros: it has no rounding in bf16 and none in 8 bits
        one = torch.zeros(128, 96)
        one[5, 0], one[64 + 5, 0] = 8, 1
        experts.gate_up = pack(kernels.library, [one.bfloat16()], kind, paired=True)
        experts.packed_down = pack(kernels.library, [w], kind)
    x = torch.zeros(1, 96)
    x[0, 0] = 16  # silu(128) * 16 is 2048
    arguments = (x, torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1, 96))
    got, want = e.run(kernels, *arguments), bf16.run(kernels, *arguments)
    assert torch.equal(want[0], 2048 * w[:, 5].float())
    assert torch.allclose(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_not_hidden_by_int4(kernels: Kernels, broken: float) -> None:
    e = Experts(kernels, 1, 72, 40, "int4")
    x, ids, w, residual = some_rows(9, e, 1)
    x[4, 7] = broken
    finite = torch.isfinite(e.run(kernels, x, ids, w, residual))
    assert finite.all(1).tolist() == [i != 4 for i in range(9)]
    down = torch.randn(72, 40).bfloat16()
    down[3, 39] = broken
    e.packed_down = pack(kernels.library, [down], "int4")
    x[4, 7] = 0
    finite = torch.isfinite(e.run(kernels, x, ids, w, residual))
    assert finite.all(0).tolist() == [i != 3 for i in range(72)]
    assert not finite[:, 3].any()


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_ids_of_other_ranks_are_skipped(kernels: Kernels, kind: Kind) -> None:
    e = Experts(kernels, 6, 72, 40, kind)
    x, ids, w, residual = some_rows(40, e, 3)
    ids[0] = -1
    ids[1] = 6
    ids[2:, 1] = torch.randint(-5, 12, (38,))
    got = e.run(kernels, x, ids, w, residual)
    assert torch.equal(got[:2], residual[:2])
    assert distance(got - residual, e.reference(x, ids, w)) < e.tolerance
    assert torch.equal(e.run(kernels, x, torch.full_like(ids, -1), w, residual), residual)


@pytest.mark.parametrize("kind", EXPERT_KINDS)
@pytest.mark.parametrize("T", [1, 6, 13, 300])
def test_one_expert_may_own_all_rows(kernels: Kernels, kind: Kind, T: int) -> None:
    e = Experts(kernels, 7, 72, 40, kind)
    x, _, w, residual = some_rows(T, e, 1)
    ids = torch.full((T, 1), 6)
    assert distance(e.run(kernels, x, ids, w, residual) - residual, e.reference(x, ids, w)) < e.tolerance


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_a_row_of_the_experts_does_not_depend_on_rows_beside_it_or_on_threads(
    on_threads: dict[int, Kernels], kind: Kind
) -> None:
    e = Experts(on_threads[1], 8, 200, 72, kind)
    x, ids, w, residual = some_rows(300, e, 3)
    rows = [
        [t.contiguous() for t in (x[i : i + 1], ids[i : i + 1], w[i : i + 1], residual[i : i + 1])] for i in range(300)
    ]
    alone = torch.cat([e.run(on_threads[1], *row) for row in rows])
    for kernels in on_threads.values():
        for n in (2, 7, 13, 100, 300):
            at = slice(300 - n, None)
            assert torch.equal(e.run(kernels, x[at], ids[at], w[at].contiguous(), residual[at]), alone[at]), n


# ---- attention


SHAPES = {
    "the demo's": (6, 64, 16),
    "DeepSeek-V3's, 16 heads": (16, 512, 64),
    "odd": (3, 20, 8),
    "40 heads": (40, 64, 32),
    "8 heads, which fill a register in a decode": (8, 64, 16),
    "2 heads, an odd number of pairs": (2, 18, 8),
    "one head more than two chains are for": (9, 20, 8),
    "one head": (1, 20, 8),
}
MIXED = [(1, 5), (1, 700), (7, 0), (130, 500), (1, 0), (1, 1499)]
"""Tokens and start of each sequence."""


class Attended:
    """Sequences over shuffled pages, with numbers that are not finite everywhere else in the cache."""

    def __init__(self, shape: tuple[int, int, int], sequences: list[tuple[int, int]], page: int) -> None:
        self.heads, self.rank, rope = shape
        self.width, self.page, self.sequences = self.rank + rope, page, sequences
        self.counts = [-(-(n + start) // page) for n, start in sequences]
        used = torch.randperm(sum(self.counts) + 3)[: sum(self.counts)]
        self.pages = used.int()
        self.cache = torch.full((sum(self.counts) + 3, page, self.width), float("nan"), dtype=torch.bfloat16)
        for (n, start), pages in zip(sequences, used.split(self.counts), strict=True):
            rows = torch.full((len(pages) * page, self.width), float("nan"))
            rows[: n + start] = torch.randn(n + start, self.width)
            self.cache[pages] = rows.view(len(pages), page, -1).bfloat16()
        n_rows = sum(n for n, _ in sequences)
        # Large enough that some keys win: a softmax over equal scores would hide much.
        self.q = in_rows(torch.randn(n_rows, self.heads, self.width) * 2 * self.width**-0.5)

    def run(self, k: Kernels, which: list[tuple[int, int, int]] | None = None) -> Tensor:
        """Latents of all rows, or of parts in the order given: sequence, first of its rows, and how many."""
        which = [(i, 0, n) for i, (n, _) in enumerate(self.sequences)] if which is None else which
        begin, first_page = _sums([n for n, _ in self.sequences]), _sums(self.counts)
        q = torch.cat([self.q[begin[i] + first :][:n] for i, first, n in which] or [self.q[:0]]).contiguous()
        out, array = torch.zeros_like(q), (structs.Sequence * len(which))()
        for j, ((i, first, n), row) in enumerate(zip(which, _sums([n for _, _, n in which]), strict=True)):
            array[j] = structs.Sequence(row, n, self.sequences[i][1] + first, first_page[i])
        heads = structs.Heads(
            **{"n_kv": 1, "group": self.heads, "key_width": self.width, "value_width": self.rank},
            row_width=self.width,
        )
        step = structs.Step(
            **{"n_tokens": len(q), "n_sequences": len(which), "page": self.page},
            **{"sequences": ctypes.addressof(array), "pages": self.pages.data_ptr()},
        )
        stride = q.shape[-1]
        k.library.attention(k.pool, heads, step, self.cache.data_ptr(), q.data_ptr(), stride, out.data_ptr(), stride)
        return out[..., : self.rank]

    def reference(self) -> Tensor:
        out, rows, pages = [], self.q.split([n for n, _ in self.sequences]), self.pages.long().split(self.counts)
        for (n, start), q, p in zip(self.sequences, rows, pages, strict=True):
            cache = self.cache[p].flatten(0, 1)[None, : start + n].float()
            out.append(ref.mla_prefill(q[..., : self.width].float(), cache, torch.tensor([0]), start, self.rank))
        return torch.cat(out)

    def check(self, k: Kernels) -> None:
        """Each row for itself: a wrong row must not hide among good ones. Seen: at most 0.0031."""
        got, want = self.run(k).float(), self.reference()
        assert torch.isfinite(got).all()
        error = (got - want).norm(dim=-1) / want.norm(dim=-1)
        assert float(error.max()) < 0.005, divmod(int(error.argmax()), self.heads)


def _sums(counts: list[int]) -> list[int]:
    return [sum(counts[:i]) for i in range(len(counts))]


@pytest.mark.parametrize("page", [1, 8, 16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention_gives_what_the_reference_gives_in_decode_prefill_and_both(
    kernels: Kernels, shape: tuple[int, int, int], page: int
) -> None:
    Attended(shape, MIXED, page).check(kernels)
    Attended(shape, [(150, 0)], page).check(kernels)


def test_scores_of_a_few_heads_are_those_of_each_head_alone_but_for_roundings(kernels: Kernels) -> None:
    """8 rows share a register two chains each: a row in the wrong half would be far off."""
    a, alone = Attended((8, 64, 16), [(1, 300)], 16), Attended((1, 64, 16), [(1, 300)], 16)
    alone.cache, alone.pages = a.cache, a.pages
    got = a.run(kernels).float()
    for head in range(8):
        alone.q = a.q[:, head : head + 1].contiguous()
        assert distance(got[:, head], alone.run(kernels).float()[:, 0]) < 0.005, head


def test_attention_of_128_heads(kernels: Kernels) -> None:
    Attended((128, 512, 64), [(1, 600), (9, 60), (1, 0), (1, 511), (1, 1499)], 16).check(kernels)


def test_a_decode_of_every_length_around_the_borders_of_chunks_and_splits(kernels: Kernels) -> None:
    lengths = [*range(1, 20), 63, 64, 65, 127, 128, 129, 511, 512, 513, 575, 576, 577, 1023, 1024, 1025, 1500]
    Attended((3, 20, 8), [(1, n - 1) for n in lengths], 8).check(kernels)
    for n in (1, 64, 65, 512, 513, 1025):
        Attended((6, 64, 16), [(1, n - 1)], 16).check(kernels)


def test_a_prefill_that_begins_and_ends_anywhere_around_the_borders(kernels: Kernels) -> None:
    spans = [(1, 65), (63, 65), (64, 64), (65, 1), (500, 514), (511, 513), (512, 2), (1020, 1030)]
    Attended((3, 20, 8), [(n, start) for start, n in spans], 8).check(kernels)


def test_attention_over_no_sequences_does_nothing(kernels: Kernels) -> None:
    assert Attended((6, 64, 16), [(1, 3)], 8).run(kernels, []).numel() == 0


def test_a_key_that_wins_by_far_and_scores_that_are_very_low_change_nothing(kernels: Kernels) -> None:
    a = Attended((6, 64, 16), [(1, 700), (90, 500)], 8)
    a.q *= 60
    got, want = a.run(kernels).float(), a.reference()
    assert distance(got, want) < 0.01


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_row_of_attention_is_the_same_in_decode_prefill_any_chunk_and_on_any_threads(
    on_threads: dict[int, Kernels], shape: tuple[int, int, int]
) -> None:
    a = Attended(shape, MIXED, 8)
    want = a.run(on_threads[1])
    begin = _sums([n for n, _ in a.sequences])
    chunks = [(3, 0, 1), (3, 1, 10), (3, 11, 2), (3, 13, 64), (3, 77, 53)]
    expected = want[begin[3] : begin[3] + 130]
    for kernels in on_threads.values():
        assert torch.equal(a.run(kernels), want)
        assert torch.equal(a.run(kernels, chunks), expected)
        assert torch.equal(torch.cat([a.run(kernels, [c]) for c in chunks]), expected)
        for i, (n, _) in enumerate(a.sequences):
            assert torch.equal(a.run(kernels, [(i, n - 1, 1)])[0], want[begin[i] + n - 1]), i
        decodes = [(i, n - 1, 1) for i, (n, _) in enumerate(a.sequences)]
        assert torch.equal(a.run(kernels, decodes[::-1]), want[[begin[i] + first for i, first, _ in decodes[::-1]]])


# ---- gate, normalisation, head


GATES = {
    "group-limited": Moe(32, 1, 4, 96, 4, 2, 2.5, True),
    "without groups": Moe(19, 0, 5, 96, 1, 1, 1.0, True),
    "unnormalised": Moe(16, 1, 3, 96, 4, 3, 2.5, False),
    "DeepSeek-V3's": Moe(256, 1, 8, 2048, 8, 4, 2.5, True),
    "one expert": Moe(1, 0, 1, 96, 1, 1, 1.0, True),
    "groups of two, as many experts as there are": Moe(8, 0, 4, 96, 4, 2, 1.0, True),
}


def norm_and_route(
    k: Kernels, residual: Tensor, norm: Tensor, dim: int, gate: Tensor, bias: Tensor, moe: Moe
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised rows, ids and weights; one column more than top_k, which must stay as it is."""
    n, stride = residual.shape
    x, columns = torch.full((n, stride), 7.0, dtype=torch.bfloat16), moe.top_k + 1
    ids, weights = torch.full((n, columns), -3, dtype=torch.int32), torch.full((n, columns), -3.0)
    gate = F.pad(gate, (0, stride - dim)).contiguous()
    struct = structs.Gate(
        **{"weight": gate.data_ptr(), "bias": bias.data_ptr(), "n_experts": moe.n_experts, "top_k": moe.top_k},
        **{"n_groups": moe.n_groups, "top_groups": moe.top_groups, "scale": moe.route_scale},
        normalise=int(moe.norm_weights),
    )
    k.library.norm_and_route(
        *(k.pool, residual.data_ptr(), stride, norm.data_ptr(), 1e-6, dim, n, x.data_ptr(), stride),
        *(struct, ids.data_ptr(), weights.data_ptr(), columns),
    )
    assert (ids[:, -1] == -3).all()
    assert (weights[:, -1] == -3).all()
    assert (x[:, dim:] == 0).all()
    return x[:, :dim], ids[:, :-1].long(), weights[:, :-1]


@pytest.mark.parametrize("moe", GATES.values(), ids=GATES)
@pytest.mark.parametrize("dim", [64, 130, 201])
def test_the_gate_chooses_and_weighs_as_the_reference(kernels: Kernels, moe: Moe, dim: int) -> None:
    gate, bias = torch.randn(moe.n_experts, dim) * dim**-0.5, torch.rand(moe.n_experts) * 0.1
    norm = torch.randn(dim)
    for n in (0, 1, 2, 13, 200):
        residual = F.pad(torch.randn(n, dim) * 3, (0, padded(dim) - dim)).contiguous()
        x, ids, weights = norm_and_route(kernels, residual, norm, dim, gate, bias, moe)
        want = ref.rms_norm(residual[:, :dim], norm, 1e-6)
        assert n == 0 or distance(x, want) < 0.003  # one rounding to bf16
        want_ids, want_weights = ref.route(x, gate, bias, moe)
        assert torch.equal(ids, want_ids)
        assert torch.allclose(weights, want_weights, rtol=1e-5, atol=1e-7)


def test_of_equal_scores_the_lower_id_wins_and_of_equal_groups_the_earlier(kernels: Kernels) -> None:
    residual, norm = torch.ones(3, 64), torch.ones(64)
    moe = replace(GATES["group-limited"], top_k=4)
    _, ids, weights = norm_and_route(kernels, residual, norm, 64, torch.zeros(32, 64), torch.zeros(32), moe)
    assert ids.tolist() == [[0, 1, 2, 3]] * 3
    assert torch.allclose(weights, torch.full((3, 4), 2.5 / 4))
    bias = torch.zeros(32)
    bias[[9, 30]] = 0.5  # groups 1 and 3 stay
    _, ids, _ = norm_and_route(kernels, residual, norm, 64, torch.zeros(32, 64), bias, moe)
    assert ids.tolist() == [[9, 30, 8, 10]] * 3


def test_the_bias_chooses_but_does_not_weigh(kernels: Kernels) -> None:
    residual, norm = torch.ones(1, 64), torch.ones(64)
    moe = replace(GATES["without groups"], norm_weights=False)
    bias = torch.arange(19.0) * 10
    _, ids, weights = norm_and_route(kernels, residual, norm, 64, torch.zeros(19, 64), bias, moe)
    assert ids.tolist() == [[18, 17, 16, 15, 14]]
    assert torch.allclose(weights, torch.full((1, 5), 0.5))


def test_a_row_of_zeros_is_normalised_to_zeros_and_still_finds_experts(kernels: Kernels) -> None:
    moe = GATES["group-limited"]
    x, ids, weights = norm_and_route(
        *(kernels, torch.zeros(2, 64), torch.ones(64), 64, torch.randn(32, 64), torch.rand(32), moe)
    )
    assert (x == 0).all()
    assert torch.isfinite(weights).all()
    assert all(len(set(row)) == moe.top_k for row in ids.tolist())


def test_a_row_of_the_gate_does_not_depend_on_rows_beside_it_or_on_threads(on_threads: dict[int, Kernels]) -> None:
    moe = GATES["DeepSeek-V3's"]
    gate, bias, norm = torch.randn(256, 130), torch.rand(256) * 0.1, torch.randn(130)
    residual = F.pad(torch.randn(50, 130), (0, padded(130) - 130)).contiguous()
    rest = (norm, 130, gate, bias, moe)
    rows = [norm_and_route(on_threads[1], row, *rest) for row in residual.split(1)]
    alone = [torch.cat(parts) for parts in zip(*rows, strict=True)]
    for kernels in on_threads.values():
        for got, want in zip(norm_and_route(kernels, residual, *rest), alone, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_gives_the_logits_of_normalised_rows(kernels: Kernels, kind: Kind) -> None:
    spec = replace(read_spec(Path(DEMO_MODEL)), dim=72, vocab=333)
    norm, weight = torch.randn(72), torch.randn(333, 72).bfloat16()
    head = Head(kernels, spec, {"model.norm.weight": norm}.__getitem__, weight, kind)
    for n in (0, 1, 7, 40):
        residual = F.pad(torch.randn(n, 72), (0, padded(72) - 72)).contiguous()
        x = ref.rms_norm(residual[:, :72], norm, spec.norm_eps)
        got = head(residual)
        assert got.shape == (n, 333)
        # seen: 0.0018 (one rounding to bf16) and 0.011
        assert n == 0 or distance(got, x @ weight.float().T) < (0.003 if kind == "bf16" else 0.015)


def test_a_feed_forward_layer_over_no_rows_does_nothing(kernels: Kernels) -> None:
    spec = replace(read_spec(Path(DEMO_MODEL)), dim=72, ffn=40)
    at = "model.layers.0"
    shapes = {"gate": (40, 72), "up": (40, 72), "down": (72, 40)}
    weights = {f"{at}.mlp.{name}_proj.weight": torch.randn(shape) for name, shape in shapes.items()}
    weights[f"{at}.post_attention_layernorm.weight"] = torch.ones(72)
    layer = FeedForward(kernels, spec, weights.__getitem__, 0, "bf16")
    layer(torch.zeros(0, 128))
    residual = torch.zeros(2, 128)
    layer(residual)
    assert (residual == 0).all()


# ---- threads


def test_a_pool_that_ends_before_its_threads_have_begun_ends(library_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from brigade.kernels.cpu.structs import open_library\n"
        "library = open_library(Path(sys.argv[1]))\n"
        "for _ in range(200): library.pool_free(library.pool_new(3))"
    )
    # in a process of its own, since what waits forever in C++ cannot be stopped
    subprocess.run([sys.executable, "-c", code, str(library_path)], timeout=10, check=True)
