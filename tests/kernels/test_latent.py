"""A latent attention layer gives what torch gives in both of its forms; a row's form is a matter of its position alone.

Rows before a sequence's `expanded` are computed with expanded keys and values, all others with absorbed queries. Which
rows of a sequence are in a step, and what is beside them, changes no bit of a row.
"""

import ctypes
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from brigade.engine.config import DEMO_MODEL
from brigade.kernels import reference as ref
from brigade.kernels.cpu import structs
from brigade.kernels.cpu.layers import LATENT_NORM_EPS, Kernels, MlaLayer, has_expanded_form, padded
from brigade.kernels.cpu.packed import Kind
from brigade.spec.config import read_spec
from brigade.spec.model import Mla

DIM, PAGE, AT = 72, 8, "model.layers.0"
SHAPES = {
    "DeepSeek-V3's, 4 heads": Mla(n_heads=4, q_rank=96, kv_rank=512, nope=128, rope=64, v=128),
    "odd": Mla(n_heads=3, q_rank=None, kv_rank=86, nope=18, rope=6, v=10),
}
MANY_HEADS = Mla(n_heads=128, q_rank=24, kv_rank=512, nope=128, rope=64, v=128)
MIXED = [(1, 5, 0), (1, 700, 0), (7, 0, 8), (130, 500, 592), (1, 0, 8), (40, 16, 0), (65, 511, 512), (1, 600, 608)]
"""Tokens of each sequence, positions before them, and the border of its expanded positions."""


class Layer:
    """One layer's weights, and sequences over shuffled pages with numbers that are not finite everywhere else."""

    def __init__(self, a: Mla, sequences: list[tuple[int, int, int]]) -> None:
        torch.manual_seed(0)
        self.a, self.sequences = a, sequences
        spec = read_spec(Path(DEMO_MODEL))
        self.spec = replace(spec, dim=DIM, attention=a, rope=replace(spec.rope, dim=a.rope))
        q_in, at = a.q_rank or DIM, f"{AT}.self_attn."
        shapes = {
            at + ("q_b_proj" if a.q_rank else "q_proj"): (a.n_heads * a.qk, q_in),
            at + "kv_a_proj_with_mqa": (a.kv_rank + a.rope, DIM),
            at + "kv_b_proj": (a.n_heads * (a.nope + a.v), a.kv_rank),
            at + "o_proj": (DIM, a.n_heads * a.v),
            **({at + "q_a_proj": (a.q_rank, DIM)} if a.q_rank else {}),
        }
        self.w = {f"{name}.weight": (torch.randn(s) / math.sqrt(s[1])).bfloat16() for name, s in shapes.items()}
        for name, n in (("input_layernorm", DIM), ("self_attn.kv_a_layernorm", a.kv_rank)):
            self.w[f"{AT}.{name}.weight"] = torch.rand(n) + 0.5
        self.w[f"{AT}.self_attn.q_a_layernorm.weight"] = torch.rand(a.q_rank or 1) + 0.5
        self.scale = 2 / math.sqrt(a.qk)  # twice the usual, so that some keys win
        ends = [start + n for n, start, _ in sequences]
        self.tables = list(
            torch.randperm(sum(-(-e // PAGE) for e in ends) + 3).int().split([-(-e // PAGE) for e in ends] + [3])
        )
        self.known = [torch.randn(start, a.kv_rank + a.rope).bfloat16() for _, start, _ in sequences]
        self.x = [torch.randn(n, DIM) for n, _, _ in sequences]

    def fresh_cache(self) -> Tensor:
        cache = torch.full((sum(map(len, self.tables)), PAGE, self.a.kv_rank + self.a.rope), float("nan")).bfloat16()
        for table, rows in zip(self.tables, self.known, strict=False):
            for p in range(len(rows)):
                cache[table[p // PAGE], p % PAGE] = rows[p]
        return cache

    def on(self, k: Kernels, kind: Kind = "bf16") -> MlaLayer:
        return MlaLayer(k, self.spec, self.w.__getitem__, AT, self.scale, kind)

    def run(self, layer: MlaLayer, steps: list[list[tuple[int, int, int]]] | None = None) -> list[Tensor]:
        """What the layer adds to each row, by sequence. A step has parts: sequence, its first row, and how many."""
        steps = steps or [[(i, 0, n) for i, (n, _, _) in enumerate(self.sequences)]]
        cache, out = self.fresh_cache(), [torch.full_like(x, float("nan")) for x in self.x]
        pages, first_page = torch.cat(self.tables), [sum(map(len, self.tables[:i])) for i in range(len(self.tables))]
        for parts in steps:
            array, row = (structs.Sequence * len(parts))(), 0
            for j, (i, first, n) in enumerate(parts):
                _, start, expanded = self.sequences[i]
                array[j] = structs.Sequence(row, n, start + first, first_page[i], expanded)
                row += n
            position = torch.tensor([self.sequences[i][1] + first + r for i, first, n in parts for r in range(n)])
            table = [self.tables[i] for i, _, n in parts for _ in range(n)]
            slots = torch.tensor(
                [int(t[p // PAGE]) * PAGE + p % PAGE for t, p in zip(table, position.tolist(), strict=True)]
            )
            cos, sin = self.rotation(position)
            x = torch.cat([self.x[i][first : first + n] for i, first, n in parts] or [torch.zeros(0, DIM)])
            residual = F.pad(x, (0, padded(DIM) - DIM)).contiguous()
            step = structs.Step(
                *(row, len(parts), PAGE, cos.data_ptr(), sin.data_ptr(), slots.data_ptr()),
                *(ctypes.addressof(array), pages.data_ptr()),
            )
            layer(residual, step, cache)
            for (i, first, n), rows in zip(parts, residual[:, :DIM].split([n for _, _, n in parts]), strict=True):
                out[i][first : first + n] = rows
        return out

    def rotation(self, position: Tensor) -> tuple[Tensor, Tensor]:
        angle = position[:, None] * 10.0 ** -torch.arange(self.a.rope // 2)
        return angle.cos(), angle.sin()

    def reference(self) -> list[Tensor]:
        """float32 torch on the same numbers."""
        a, at, w = self.a, f"{AT}.self_attn.", {name: t.float() for name, t in self.w.items()}
        up = w[at + "kv_b_proj.weight"].view(a.n_heads, a.nope + a.v, a.kv_rank)
        out = []
        for (n, start, _), known, x in zip(self.sequences, self.known, self.x, strict=True):
            cos, sin = self.rotation(torch.arange(start, start + n))
            h = ref.rms_norm(x, w[f"{AT}.input_layernorm.weight"], self.spec.norm_eps)
            q = h
            if a.q_rank:
                q = ref.rms_norm(h @ w[at + "q_a_proj.weight"].T, w[at + "q_a_layernorm.weight"], LATENT_NORM_EPS)
            q = (q @ w[at + ("q_b_proj" if a.q_rank else "q_proj") + ".weight"].T).unflatten(-1, (a.n_heads, a.qk))
            c, r = (h @ w[at + "kv_a_proj_with_mqa.weight"].T).split([a.kv_rank, a.rope], -1)
            turn = self.spec.rope.interleaved
            c = ref.rms_norm(c, w[at + "kv_a_layernorm.weight"], LATENT_NORM_EPS)
            rows = torch.cat([known.float(), torch.cat([c, ref.rotate(r, cos, sin, turn)], -1)])
            q = torch.cat([q[..., : a.nope], ref.rotate(q[..., a.nope :], cos[:, None], sin[:, None], turn)], -1)
            keys = torch.einsum("sc,hnc->hsn", rows[:, : a.kv_rank], up[:, : a.nope])
            keys = torch.cat([keys, rows[:, a.kv_rank :].expand(a.n_heads, -1, -1)], -1)
            values = torch.einsum("sc,hvc->hsv", rows[:, : a.kv_rank], up[:, a.nope :])
            hidden = torch.arange(start + n) > torch.arange(start, start + n)[:, None]
            scores = (torch.einsum("thn,hsn->hts", q, keys) * self.scale).masked_fill(hidden, -math.inf)
            o = torch.einsum("hts,hsv->thv", scores.softmax(-1), values).flatten(1)
            out.append(x + o @ w[at + "o_proj.weight"].T)
        return out

    def check(self, k: Kernels, kind: Kind = "bf16") -> None:
        """Each row for itself: a wrong row must not hide among good ones.

        Seen: at most 0.018 in bf16 and 0.05 in int8.
        """
        for i, (got, want, x) in enumerate(zip(self.run(self.on(k, kind)), self.reference(), self.x, strict=True)):
            error = (got - want).norm(dim=-1) / (want - x).norm(dim=-1)
            assert float(error.max()) < (0.03 if kind == "bf16" else 0.08), (i, int(error.argmax()))


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_both_forms_give_what_torch_gives(kernels: Kernels, shape: Mla, kind: Kind) -> None:
    Layer(shape, MIXED).check(kernels, kind)


def test_heads_that_do_not_fit_the_scratch_memory_at_once_take_turns(kernels: Kernels) -> None:
    Layer(MANY_HEADS, [(3, 597, 600), (2, 0, 0), (5, 100, 104)]).check(kernels)


def test_a_model_whose_latent_is_not_much_wider_than_a_head_has_one_form(kernels: Kernels) -> None:
    narrow = Mla(n_heads=6, q_rank=96, kv_rank=64, nope=32, rope=16, v=32)
    assert not has_expanded_form(narrow)
    assert all(has_expanded_form(a) for a in (*SHAPES.values(), MANY_HEADS))
    with_border, without = (Layer(narrow, [(90, 30, border)]) for border in (120, 0))
    assert torch.equal(with_border.run(with_border.on(kernels))[0], without.run(without.on(kernels))[0])


def test_the_two_forms_differ_by_a_rounding(kernels: Kernels) -> None:
    """So that the tests below would see a row in the wrong form."""
    expanded, absorbed = (Layer(SHAPES["odd"], [(90, 30, border)]) for border in (120, 0))
    a, b = (layer.run(layer.on(kernels))[0] for layer in (expanded, absorbed))
    assert not (a == b).all(dim=-1).any()
    assert float((a - b).norm() / (a - expanded.x[0]).norm()) < 0.02


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_row_is_the_same_however_its_prompt_is_cut_and_whatever_is_beside_it(
    on_threads: dict[int, Kernels], shape: Mla
) -> None:
    layer = Layer(shape, MIXED)
    want = layer.run(layer.on(on_threads[1]))
    cuts = [(3, 0, 1), (3, 1, 63), (3, 64, 27), (3, 91, 2), (3, 93, 37)]  # the border is after 92 rows
    others = [(i, 0, n) for i, (n, _, _) in enumerate(layer.sequences) if i != 3]
    schedules = {
        "each alone": [[part] for part in (*others, *cuts)],
        "cut": [[cuts[0], *others], *([part] for part in cuts[1:])],
        "several parts in one step": [[*cuts, *others[::-1]]],
        "the border's rows with others": [[*cuts[:2], *others[:3]], [cuts[2], *others[3:]], cuts[3:]],
    }
    for kernels in on_threads.values():
        mine = layer.on(kernels)
        for how, steps in schedules.items():
            for i, (got, same) in enumerate(zip(layer.run(mine, steps), want, strict=True)):
                assert torch.equal(got, same), (how, i)


def test_one_row_of_a_long_prompt_is_the_same_as_in_one_piece(on_threads: dict[int, Kernels]) -> None:
    layer = Layer(SHAPES["odd"], [(1100, 0, 1088)])
    want = layer.run(layer.on(on_threads[1]))[0]
    for cut in (511, 512, 513, 1024, 1087, 1088, 1099):
        steps = [[(0, 0, cut)], [(0, cut, 1)], *([[(0, cut + 1, 1099 - cut)]] if cut < 1099 else [])]
        assert torch.equal(layer.run(layer.on(on_threads[2]), steps)[0], want), cut


def test_a_step_of_no_sequences_does_nothing(kernels: Kernels) -> None:
    layer = Layer(SHAPES["odd"], [(2, 0, 0)])
    assert layer.run(layer.on(kernels), [[], [(0, 0, 2)]])[0].isfinite().all()
