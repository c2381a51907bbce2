"""Rows in 8 bits for the way to other ranks, on the C++ kernels: the codec of brigade/comm/wire.py for bf16 rows."""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brigade.kernels.cpu.layers import Kernels


class TileCodec:
    """Gives bit by bit what comm's TorchCodec gives. Its kernels' threads share the rows."""

    def __init__(self, kernels: Kernels, kind: Literal["int8", "fp8"]) -> None:
        self._kernels, self._kind = kernels, {"int8": 0, "fp8": 1}[kind]

    def encode(self, x_TD: Tensor, to: NDArray[np.uint8]) -> None:
        """Rows of x (bf16, any stride) into rows of bytes. Raises ValueError."""
        if x_TD.dtype != torch.bfloat16 or x_TD.stride(1) != 1 or not to.flags.c_contiguous or len(to) != len(x_TD):
            raise ValueError(f"x: need {len(to)} bf16 rows, not {x_TD.dtype} {list(x_TD.shape)}")
        k, (n, dim) = self._kernels, x_TD.shape
        k.library.wire_encode(k.pool, x_TD.data_ptr(), x_TD.stride(0), n, dim, self._kind, to.ctypes.data)

    def decode(self, rows: NDArray[np.uint8], index: NDArray[np.int64], out_ND: Tensor) -> None:
        """out[i] = rows[index[i]] as bf16 numbers, an index beyond the rows clipped. Raises ValueError."""
        if out_ND.dtype != torch.bfloat16 or out_ND.stride(1) != 1 or len(out_ND) != index.size:
            raise ValueError(f"out: need {index.size} bf16 rows, not {out_ND.dtype} {list(out_ND.shape)}")
        if not rows.flags.c_contiguous or index.dtype != np.int64 or not index.flags.c_contiguous:
            raise ValueError("rows, index: must be contiguous, the index int64")
        if index.size and not len(rows):
            raise ValueError(f"rows: there are none for {index.size} indices")
        k, (n, dim) = self._kernels, out_ND.shape
        k.library.wire_decode(
            *(k.pool, rows.ctypes.data, len(rows), index.ctypes.data, n, dim, self._kind),
            *(out_ND.data_ptr(), out_ND.stride(0)),
        )
