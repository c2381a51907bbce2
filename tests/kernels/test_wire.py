"""The C++ codec of rows on their way to other ranks gives what torch gives, bit by bit."""

import numpy as np
import pytest
import torch

from brigade.comm.wire import TileKind, TorchCodec, wire
from brigade.kernels.cpu.layers import Kernels
from brigade.kernels.cpu.wire import TileCodec

WIDTHS = (1, 16, 24, 128, 137, 1024)


def hard_rows(width: int) -> torch.Tensor:
    """Of every size that bf16 has, zeros, and numbers just between two steps."""
    torch.manual_seed(width)
    sizes = 10.0 ** torch.linspace(-38, 37, 400)[:, None]
    plain = torch.randn(100, width)
    halves = torch.randint(-254, 255, (100, width)) / 2
    return torch.cat([torch.randn(400, width) * sizes, plain, halves, torch.zeros(3, width)]).bfloat16()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("width", WIDTHS)
def test_bytes_and_numbers_are_those_of_torch(kernels: Kernels, kind: TileKind, width: int) -> None:
    x_TD = hard_rows(width)
    fast, plain = wire(kind, width, x_TD.dtype, TileCodec(kernels, kind)), wire(kind, width, x_TD.dtype)
    rows = fast.encode(x_TD)
    assert np.array_equal(rows, plain.encode(x_TD))
    index = np.random.default_rng(0).integers(len(x_TD), size=2000)
    got, want = torch.empty(2, 2000, width, dtype=x_TD.dtype)
    fast.decode(rows, index, got)
    plain.decode(rows, index, want)
    assert torch.equal(got.view(torch.int16), want.view(torch.int16))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_rows_may_be_far_apart_and_none_at_all(kernels: Kernels, kind: TileKind) -> None:
    codec = TileCodec(kernels, kind)
    wide = torch.randn(7, 200).bfloat16()
    w, plain = wire(kind, 130, wide.dtype, codec), wire(kind, 130, wide.dtype, TorchCodec(kind))
    assert np.array_equal(w.encode(wide[:, :130]), plain.encode(wide[:, :130]))
    assert w.encode(wide[:0, :130]).shape == (0, w.row_bytes)
    w.decode(w.encode(wide[:0, :130]), np.empty(0, np.int64), torch.empty(0, 130, dtype=wide.dtype))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_a_number_is_not_lost(kernels: Kernels, kind: TileKind, bad: float) -> None:
    x_TD = torch.randn(2, 300).bfloat16()
    x_TD[0, 140] = bad
    for w in (wire(kind, 300, x_TD.dtype, TileCodec(kernels, kind)), wire(kind, 300, x_TD.dtype)):
        out = torch.empty_like(x_TD)
        w.decode(w.encode(x_TD), np.arange(2), out)
        assert not out[0, 140].isfinite()
        assert out[0, :128].isfinite().all()
        assert out[1].isfinite().all()


def test_wrong_types_are_refused(kernels: Kernels) -> None:
    codec = TileCodec(kernels, "int8")
    w = wire("int8", 8, torch.bfloat16, codec)
    with pytest.raises(ValueError, match=r"x: need 1 bf16 rows, not torch.float32"):
        w.encode(torch.zeros(1, 8))
    rows = w.encode(torch.zeros(1, 8, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"out: need 1 bf16 rows, not torch.float32"):
        w.decode(rows, np.zeros(1, np.int64), torch.empty(1, 8))
    with pytest.raises(ValueError, match="rows: there are none for 1 indices"):
        w.decode(rows[:0], np.zeros(1, np.int64), torch.empty(1, 8, dtype=torch.bfloat16))
