"""The KV cache of one rank: one tensor of pages. Which page belongs to whom is core's business."""

import math
import mmap
import os

import torch
from torch import Tensor

from brigade.spec.model import ModelSpec


class KvCache:
    """[blocks, pages, page, width]: for MLA the latent and the shared rotary key, never the expanded heads."""

    def __init__(self, spec: ModelSpec, n_pages: int, page: int, dtype: torch.dtype, file: int = -1) -> None:
        """`file`: memory that other processes may read; it grows if it is too small. -1: memory of this process alone.
        Raises MemoryError."""
        self.page = page
        shape = (spec.n_blocks, n_pages, page, spec.kv_width)
        try:
            # Not torch.zeros, which writes it all: pages of the system that no request has reached yet cost no memory.
            memory = _memory(math.prod(shape) * dtype.itemsize, file)
        except (OSError, OverflowError) as e:
            raise MemoryError(f"no memory for a KV cache of {n_pages} pages (--kv-memory): {e}") from e
        self.layers: Tensor = torch.frombuffer(memory, dtype=dtype).view(shape)


def _memory(size: int, file: int) -> mmap.mmap:
    if file < 0:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if os.fstat(file).st_size < size:  # never made smaller: somebody may have mapped it
        os.ftruncate(file, size)
    return mmap.mmap(file, size, flags=mmap.MAP_SHARED)
