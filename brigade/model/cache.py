"""The KV cache of one rank: one tensor of pages. Which page belongs to whom is core's business."""

import math
import mmap

import torch
from torch import Tensor

from brigade.spec.model import ModelSpec


class KvCache:
    """[layers, pages, page, width]: for MLA the latent and the shared rotary key, never the expanded heads."""

    def __init__(self, spec: ModelSpec, n_pages: int, page: int, dtype: torch.dtype) -> None:
        self.page = page
        shape = (spec.n_layers, n_pages, page, spec.kv_width)
        try:
            # Not torch.zeros, which writes it all: pages of the system that no request has reached yet cost no memory.
            memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as e:
            raise MemoryError(f"no memory for a KV cache of {n_pages} pages (--kv-memory): {e}") from e
        self.layers: Tensor = torch.frombuffer(memory, dtype=dtype).view(shape)
