"""What travels: how many bytes, and how far a number may be from what it was."""

import numpy as np
import pytest
import torch

from brigade.comm.wire import Kind, wire
from tests.comm.oracle import travelled

DTYPES = [torch.bfloat16, torch.float32]
WIDTH = 300


def through(kind: Kind, x_TD: torch.Tensor) -> torch.Tensor:
    w = wire(kind, x_TD.shape[1], x_TD.dtype)
    out = torch.empty_like(x_TD)
    w.decode(w.encode(x_TD), np.arange(len(x_TD)), out)
    return out


@pytest.mark.parametrize(
    ("kind", "dtype", "row", "result"),
    [
        ("auto", torch.bfloat16, 2 * WIDTH, 4),
        ("auto", torch.float32, 4 * WIDTH, 4),
        ("bf16", torch.float32, 2 * WIDTH, 2),
        ("int8", torch.bfloat16, WIDTH + 3 * 4, 2),
        ("fp8", torch.float32, WIDTH + 3 * 4, 2),
    ],
)
def test_bytes_of_a_row_and_of_a_result(kind: Kind, dtype: torch.dtype, row: int, result: int) -> None:
    w = wire(kind, WIDTH, dtype)
    assert (w.row_bytes, w.results.itemsize) == (row, result)
    assert w.encode(torch.zeros(5, WIDTH, dtype=dtype)).shape == (5, row)


@pytest.mark.parametrize("kind", ["auto", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_come_out_as_the_oracle_says(kind: Kind, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x_TD = (torch.randn(40, WIDTH) * 10.0 ** torch.linspace(-35, 35, 40)[:, None]).to(dtype)
    got = through(kind, x_TD)
    assert torch.equal(got, torch.stack([travelled(x_D, kind) for x_D in x_TD]))


def test_int8_errs_by_half_a_step_of_its_tile_and_fp8_by_a_sixteenth() -> None:
    torch.manual_seed(0)
    x_TD = torch.randn(100, 256) * 10.0 ** torch.linspace(-3, 3, 100)[:, None]
    x_TD[:, :128] *= 1000  # the other tile of a row has a scale of its own
    most = x_TD.abs().unflatten(1, (2, 128)).amax(-1).repeat_interleave(128, 1)
    assert ((through("int8", x_TD) - x_TD).abs() <= most / 127 * 0.5001).all()
    assert ((through("fp8", x_TD) - x_TD).abs() <= x_TD.abs() / 16 * 1.0001 + most / 448 * 2**-10 * 1.0001).all()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_zeros_and_what_is_next_to_nothing_become_zeros(kind: Kind) -> None:
    x_TD = torch.tensor([[0.0, -0.0, 0.0], [1e-38, -1e-40, 1e-45]])
    assert (through(kind, x_TD) == 0).all()


@pytest.mark.parametrize("kind", ["bf16", "int8", "fp8"])
def test_a_row_does_not_depend_on_the_rows_beside_it(kind: Kind) -> None:
    torch.manual_seed(0)
    x_TD = torch.randn(9, WIDTH)
    assert torch.equal(through(kind, x_TD), torch.cat([through(kind, row) for row in x_TD.split(1)]))


def test_types_that_do_not_travel_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bfloat16 or float32, not torch.float16"):
        wire("auto", 8, torch.float16)
