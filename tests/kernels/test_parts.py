"""A feed-forward layer in parts, as ranks run it, adds bit by bit what one call of the whole layer adds."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from brigade.engine.machine import read_cpu
from brigade.kernels.cpu.build import Built, find_library
from brigade.kernels.cpu.layers import FeedForward, Kernels, padded
from brigade.kernels.cpu.packed import KINDS, Kind
from brigade.spec.config import read_spec
from brigade.spec.params import params
from tests.model.test_deepseek_cpu import DEMO

SPEC = read_spec(DEMO)
SHAPES = {p.name: p.shape for p in params(SPEC)}


@pytest.fixture(scope="module")
def kernels() -> Iterator[Kernels]:
    library = find_library(read_cpu().features)
    if not isinstance(library, Built):
        pytest.skip(f"no C++ kernels: {library}")
    kernels = Kernels(library.path, 2)
    yield kernels
    kernels.library.pool_free(kernels.pool)


def weights(name: str) -> Tensor:
    torch.manual_seed(sum(map(ord, name)))
    shape = SHAPES[name]
    return torch.randn(shape) / shape[-1] ** 0.5


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("T", [0, 1, 2, 7, 65, 300])
def test_parts_add_what_the_whole_adds(kernels: Kernels, kind: Kind, T: int) -> None:
    dim = SPEC.dim
    layer = FeedForward(kernels, SPEC, weights, SPEC.n_layers - 1, kind)
    residual = torch.zeros(T, padded(dim))
    residual[:, :dim] = torch.randn(T, dim)
    whole = residual.clone()
    layer(whole)

    routed = layer.route(residual)
    ids_TK = routed.ids_TK[:, : layer.top_k]
    pairs = ids_TK.flatten().argsort(stable=True)  # as on ranks, rows of other tokens stand between a token's own
    y_PD = torch.empty(T * layer.top_k, dim)
    y_PD[pairs] = layer.routed_experts(routed.x_TD[pairs // layer.top_k], ids_TK.flatten()[pairs])[:, :dim]
    layer.add_routed(y_PD.view(T, layer.top_k, dim), routed, residual)
    layer.add_shared(routed, residual)
    assert torch.equal(residual, whole)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_swapped_expert_computes_as_if_it_had_been_loaded_there(kernels: Kernels, kind: Kind) -> None:
    """Experts 0 and 5 change places, staged by another thread while this one computes."""
    layer = FeedForward(kernels, SPEC, weights, SPEC.n_layers - 1, kind)
    at = f"model.layers.{SPEC.n_layers - 1}.mlp.experts.*"
    gate, up, down = (weights(f"{at}.{part}_proj.weight") for part in ("gate", "up", "down"))
    rows = torch.zeros(40, padded(SPEC.dim), dtype=torch.bfloat16)
    rows[:, : SPEC.dim] = torch.randn(40, SPEC.dim)
    slots = torch.arange(40, dtype=torch.int32) % 8
    swapped = torch.tensor([5, 1, 2, 3, 4, 0, 6, 7], dtype=torch.int32)[slots.long()]
    before, want = layer.routed_experts(rows, slots), layer.routed_experts(rows, swapped)
    with ThreadPoolExecutor(1) as other:
        staged = other.submit(lambda: [layer.stage(gate[e], up[e], down[e], None) for e in (5, 0)])
        while not staged.done():
            assert torch.equal(layer.routed_experts(rows, slots), before)
    first, fifth = (layer.swap(slot, place) for slot, place in zip((0, 5), staged.result(), strict=True))
    assert torch.equal(layer.routed_experts(rows, slots), want)

    again = layer.stage(gate[0], up[0], down[0], fifth)
    assert again is fifth, "memory that was swapped out is used again"
    layer.swap(0, again)
    assert torch.equal(layer.routed_experts(rows[slots == 0], slots[slots == 0]), before[slots == 0])
    layer.swap(0, first)
    assert torch.equal(layer.routed_experts(rows[slots == 0], slots[slots == 0]), before[slots == 0])
