"""Weights in the kernels' own layout, on large pages. tiles.h decides layout and padding; this finds the memory."""

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from brigade.kernels.cpu.structs import Matrix

Kind = Literal["bf16", "int8", "int4"]
KINDS: dict[Kind, int] = {"bf16": 0, "int8": 1, "int4": 2}
GROUP = 64
STEP = 256
INS_PER_STEP = {"bf16": 2, "int8": 4}
BLOCK = 32
"""Inputs that share a scale in int4."""
BLOCK_BYTES = BLOCK // 8 * STEP + 2 * GROUP
LARGE_PAGE = 1 << 21
AREA = 32 << 20
"""Bytes that small pieces share."""


@dataclass(frozen=True)
class Packed:
    """Matrices of equal shape, packed one behind the other, and the memory that `matrix` points into."""

    matrix: Matrix
    """The first one."""
    memory: tuple[Tensor, ...]
    each: "ctypes.Array[Matrix]"
    """All of them, as the kernels of experts take them."""

    def one(self, i: int) -> "Packed":
        """Matrix i alone, in the same memory."""
        each = (Matrix * 1)(self.each[i])
        return Packed(each[0], self.memory, each)

    @property
    def n_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.memory)


class LargePages:
    """Memory on 2 MB pages for many pieces. They lie in common areas, since the system gives only whole pages."""

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)

    def take(self, n_bytes: int) -> Tensor:
        """Memory that is freed with the last piece of its area."""
        if n_bytes > AREA // 2:
            return large_pages(n_bytes)
        if n_bytes > len(self._rest):
            self._rest = large_pages(AREA)
        out, self._rest = self._rest[:n_bytes], self._rest[_ceil(n_bytes, GROUP) * GROUP :]
        return out


def pack(
    library: ctypes.CDLL, weights: Sequence[Tensor], kind: Kind, paired: bool = False, memory: LargePages | None = None
) -> Packed:
    """Pack matrices [outs, ins] for the tiles. The arguments are those of `room`."""
    outs, ins = weights[0].shape
    packed = room(len(weights), outs, ins, kind, paired, memory)
    repack(library, weights, packed)
    return packed


def room(n: int, outs: int, ins: int, kind: Kind, paired: bool = False, memory: LargePages | None = None) -> Packed:
    """Memory for n packed matrices [outs, ins], with anything in it. `paired`: the first half of the rows is the gate,
    the second is up.

    int4 is for experts: no linear layer multiplies it. `memory`: where pieces that stay together come from; None: these
    will be freed alone, and must not take a large page each where they are small.
    """
    n_groups = (_ceil(outs // 2, GROUP // 2) if paired else _ceil(outs, GROUP)) if outs else 0
    n_bytes = n_groups * _group_bytes(ins, kind)
    if memory is not None:
        data = memory.take(n * n_bytes)
    else:
        small = n * n_bytes < LARGE_PAGE
        data = torch.empty(n * n_bytes, dtype=torch.uint8) if small else large_pages(n * n_bytes)
    n_scales = n * n_groups * GROUP if kind == "int8" else 0
    scales, sums = torch.empty(n_scales), torch.empty(n_scales, dtype=torch.int32)
    each = (Matrix * n)(
        *(
            Matrix(
                data.data_ptr() + i * n_bytes,
                scales.data_ptr() + 4 * i * n_groups * GROUP,
                sums.data_ptr() + 4 * i * n_groups * GROUP,
                *(outs, ins, KINDS[kind], int(paired)),
            )
            for i in range(n)
        )
    )
    return Packed(each[0], (data, scales, sums), each)


def repack(library: ctypes.CDLL, weights: Sequence[Tensor], packed: Packed) -> None:
    """Pack other matrices of the same shape into the same memory, which nothing may be reading. From any thread."""
    for i, (w, at) in enumerate(zip(weights, packed.each, strict=True)):
        if w.shape != (at.outs, at.ins):
            raise ValueError(f"matrix {i} is {tuple(w.shape)}, not {(at.outs, at.ins)}")
        source = w.to(torch.bfloat16).contiguous()
        library.pack(source.data_ptr(), ctypes.byref(at))


def large_pages(n_bytes: int) -> Tensor:
    """Memory on 2 MB pages where the system has them: the decode of one token reads it all, at fewer page look-ups."""
    area = mmap.mmap(-1, n_bytes + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(area, dtype=torch.uint8)
    start = -whole.data_ptr() % LARGE_PAGE
    return whole[start : start + n_bytes]


def _group_bytes(ins: int, kind: Kind) -> int:
    return _ceil(ins, BLOCK) * BLOCK_BYTES if kind == "int4" else _ceil(ins, INS_PER_STEP[kind]) * STEP


def _ceil(n: int, to: int) -> int:
    return -(-n // to)
