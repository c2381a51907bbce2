"""How rows and results look on their way to experts and back: as they are, or in fewer bits.

Every row passes through here, also one whose expert is on its own rank: so text does not depend on where an expert is.

| wire | a row of D numbers | a result of D numbers |
|---|---|---|
| auto | as the model computes: 2 D or 4 D bytes | 4 D bytes, float32, exact |
| bf16 | 2 D bytes | 2 D bytes, bf16 |
| int8, fp8 | D bytes, then a float32 for each tile of 128 numbers | 2 D bytes, bf16 |

fp8 is e4m3. Tiles of 1 x 128 for what is sent to experts and bf16 for what comes back are DeepSeek-V3's choice
(arXiv:2412.19437, sections 3.3 and 3.4).
"""

from typing import Literal, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Kind = Literal["auto", "bf16", "int8", "fp8"]
TileKind = Literal["int8", "fp8"]
Rows: TypeAlias = NDArray[np.uint8]
"""[n, row_bytes]: rows as they travel."""
Index: TypeAlias = NDArray[np.int64]

DTYPES = (torch.bfloat16, torch.float32)
TILE = 128
"""Numbers that share a scale."""
LARGEST = {"int8": 127.0, "fp8": 448.0}
"""What the largest number of a tile becomes."""
TINY = 2.0**-100
"""A tile whose largest number is below this is sent as zeros: one over it would overflow."""


class Wire(Protocol):
    """What an exchange must know to move rows and results."""

    width: int
    dtype: torch.dtype
    """Of the rows that are given and got."""
    row_bytes: int
    results: torch.dtype
    """What results travel as; they are given and got in float32."""

    def encode(self, x_TD: Tensor) -> Rows:
        """Rows for the way; they may share the memory of `x_TD`."""
        ...

    def decode(self, rows: Rows, index: Index, out_ND: Tensor) -> None:
        """out[i] = rows[index[i]], as numbers again."""
        ...


class Codec(Protocol):
    """Rounds rows to tiles and back. Implementations agree bit by bit."""

    def encode(self, x_TD: Tensor, to: Rows) -> None: ...

    def decode(self, rows: Rows, index: Index, out_ND: Tensor) -> None: ...


def wire(kind: Kind, width: int, dtype: torch.dtype, codec: Codec | None = None) -> Wire:
    """The wire of that kind. `codec` rounds the tiles of int8 and fp8; torch does if None. Raises ValueError."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: rows travel as bfloat16 or float32, not {dtype}")
    if kind in ("int8", "fp8"):
        return Tiled(width, dtype, codec or TorchCodec(kind))
    return Plain(width, dtype, kind)


class Plain:
    """Rows as numbers of the usual types."""

    def __init__(self, width: int, dtype: torch.dtype, kind: Kind) -> None:
        self.width, self.dtype = width, dtype
        self._carried, self.results = (dtype, torch.float32) if kind == "auto" else (torch.bfloat16, torch.bfloat16)
        self.row_bytes = width * self._carried.itemsize

    def encode(self, x_TD: Tensor) -> Rows:
        return raw(x_TD.to(self._carried)).view(np.uint8)

    def decode(self, rows: Rows, index: Index, out_ND: Tensor) -> None:
        if self._carried != self.dtype:
            taken = torch.from_numpy(rows.take(index, axis=0).view(np.int16)).view(self._carried)
            out_ND.copy_(taken)
            return
        # "clip" lets take write straight into `out`; with "raise" it would fill a copy first
        rows.take(index, axis=0, out=raw(out_ND).view(np.uint8), mode="clip")


class Tiled:
    """Rows in 8 bits, with a scale for each tile."""

    results = torch.bfloat16

    def __init__(self, width: int, dtype: torch.dtype, codec: Codec) -> None:
        self.width, self.dtype, self._codec = width, dtype, codec
        self.row_bytes = scales_at(width) + 4 * n_tiles(width)
        self.decode = codec.decode

    def encode(self, x_TD: Tensor) -> Rows:
        rows = np.empty((len(x_TD), self.row_bytes), np.uint8)
        self._codec.encode(x_TD, rows)
        return rows


def n_tiles(width: int) -> int:
    return -(-width // TILE)


def scales_at(width: int) -> int:
    """Where in a row the scales begin: after its numbers, at a multiple of 4 bytes."""
    return -(-width // 4) * 4


class TorchCodec:
    """The reference: a tile times LARGEST over its largest magnitude, rounded to nearest, ties to even."""

    def __init__(self, kind: TileKind) -> None:
        self._largest = torch.tensor(LARGEST[kind])
        self._type = torch.int8 if kind == "int8" else torch.float8_e4m3fn

    def encode(self, x_TD: Tensor, to: Rows) -> None:
        n, width = x_TD.shape
        tiles = F.pad(x_TD.float(), (0, n_tiles(width) * TILE - width)).view(n, n_tiles(width), TILE)
        most = tiles.abs().amax(-1, keepdim=True)
        # where the largest is not finite, neither is the scale: that is enough to tell
        steps = torch.where((most >= TINY) & most.isfinite(), tiles * (self._largest / most), 0.0)
        steps = steps.round() if self._type == torch.int8 else steps
        to[:, :width] = steps.to(self._type).view(torch.uint8).flatten(1)[:, :width].numpy()
        to[:, width : scales_at(width)] = 0
        to[:, scales_at(width) :] = (most / self._largest).flatten(1).numpy().view(np.uint8)

    def decode(self, rows: Rows, index: Index, out_ND: Tensor) -> None:
        width = out_ND.shape[1]
        taken = rows.take(index, axis=0)
        scales = torch.from_numpy(np.ascontiguousarray(taken[:, scales_at(width) :]).view(np.float32))
        steps = torch.from_numpy(taken[:, :width]).view(self._type).float()
        out_ND.copy_(steps * scales.repeat_interleave(TILE, 1)[:, :width])


def raw(t: Tensor) -> NDArray[np.int16] | NDArray[np.float32] | NDArray[np.int32]:
    """The same memory as numpy, bfloat16 as int16: numpy has no bfloat16, and copies need none."""
    plain = t.view(torch.int16) if t.dtype == torch.bfloat16 else t
    out: NDArray[np.int16] = plain.numpy()
    return out
