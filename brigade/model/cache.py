"""The KV cache of one rank: one tensor of pages. Which page belongs to whom is core's business."""

import torch
from torch import Tensor

from brigade.spec.model import ModelSpec


class KvCache:
    """[layers, pages, page, width]: for MLA the latent and the shared rotary key, never the expanded heads."""

    def __init__(self, spec: ModelSpec, n_pages: int, page: int, dtype: torch.dtype) -> None:
        self.page = page
        try:
            self.layers: Tensor = torch.zeros(spec.n_layers, n_pages, page, spec.kv_width, dtype=dtype)
        except RuntimeError as e:  # torch has no type of its own for this on the CPU
            raise MemoryError(f"no memory for a KV cache of {n_pages} pages (--kv-memory): {e}") from e
