"""What the multi-token-prediction layer begins with on the C++ kernels; after that it is a layer like the others."""

import torch
from torch import Tensor

from brigade.kernels.cpu.layers import Kernels, Read, for_linear, padded
from brigade.kernels.cpu.packed import Kind
from brigade.spec.model import ModelSpec


class DraftInput:
    """eh_proj of the next token's normalised embedding beside the normalised hidden row."""

    def __init__(self, kernels: Kernels, spec: ModelSpec, read: Read, at: str, last_norm: Tensor, kind: Kind) -> None:
        """`at`: the layer's name; `last_norm`: the weights of the model's last norm."""
        self._kernels, self._dim, self._eps = kernels, spec.dim, spec.norm_eps
        self._last, self._next, self._here = last_norm, *(read(f"{at}.{n}norm.weight").float() for n in ("e", "h"))
        self.norm_out = read(f"{at}.shared_head.norm.weight").float()
        """Weights of the norm between this layer and the head."""
        self._packed = kernels.pack([read(f"{at}.eh_proj.weight")], for_linear(kind))

    def __call__(self, embedded_TD: Tensor, hidden_TD: Tensor) -> Tensor:
        """float32 [T, stride] from float32 rows of the same shape; `hidden_TD`: the residual after the last layer."""
        k, n, dim = self._kernels, len(hidden_TD), self._dim
        hidden = k.normalise(hidden_TD, self._last, self._eps, dim)
        both = torch.zeros(n, padded(2 * dim), dtype=torch.bfloat16)
        both[:, :dim] = k.normalise(embedded_TD, self._next, self._eps, dim)[:, :dim]
        both[:, dim : 2 * dim] = k.normalise(hidden.float(), self._here, self._eps, dim)[:, :dim]
        out = torch.zeros(hidden_TD.shape)
        k.library.linear_float(
            *(k.pool, self._packed.matrix, both.data_ptr(), n, both.stride(0), out.data_ptr(), out.stride(0))
        )
        return out
