"""The KV cache of one rank: one tensor of pages. Which page belongs to whom is core's business."""

import torch
from torch import Tensor

from brigade.spec.model import ModelSpec


class KvCache:
    """[layers, pages, page, width]: for MLA the latent and the shared rotary key, never the expanded heads."""

    def __init__(self, spec: ModelSpec, n_pages: int, page: int, dtype: torch.dtype) -> None:
        self.page = page
        self.layers: Tensor = torch.zeros(spec.n_layers, n_pages, page, spec.kv_width, dtype=dtype)


def page_bytes(spec: ModelSpec, page: int, dtype: torch.dtype) -> int:
    """Memory of one page over all layers."""
    return spec.n_layers * page * spec.kv_width * dtype.itemsize
