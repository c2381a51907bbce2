"""A feed-forward layer in parts, as ranks run it, adds bit by bit what one call of the whole layer adds."""

from collections.abc import Iterator

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
