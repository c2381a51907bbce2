"""Rotary position tables, with the context extensions that spec knows."""

import math

import torch
from torch import Tensor

from brigade.spec.model import Llama3Rope, Rope, Yarn


def frequencies(rope: Rope) -> Tensor:
    """Angle per position of each pair, float32 [dim / 2]."""
    plain = 1.0 / rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float) / rope.dim)
    match rope.scaling:
        case Yarn() as y:
            return _yarn(plain, rope, y)
        case Llama3Rope() as s:
            return _llama3(plain, s)
        case None:
            return plain


def table(rope: Rope, context: int) -> tuple[Tensor, Tensor]:
    """cos and sin for positions 0..context-1, float32 [context, dim / 2]."""
    angle = torch.outer(torch.arange(context, dtype=torch.float), frequencies(rope))
    scale = 1.0
    if isinstance(rope.scaling, Yarn):
        y = rope.scaling
        scale = _mscale(y.factor, 1.0)
        if y.mscale and y.mscale_all_dim:
            scale = _mscale(y.factor, y.mscale) / _mscale(y.factor, y.mscale_all_dim)
    return angle.cos() * scale, angle.sin() * scale


def score_scale(rope: Rope, width: int) -> float:
    """What query-key products are multiplied by: 1 / sqrt(width), corrected for YaRN's longer context."""
    scale = 1 / math.sqrt(width)
    if isinstance(rope.scaling, Yarn) and rope.scaling.mscale_all_dim:
        mscale = _mscale(rope.scaling.factor, rope.scaling.mscale_all_dim)
        scale *= mscale * mscale
    return scale


def _mscale(factor: float, mscale: float) -> float:
    """Attention temperature of YaRN (arXiv:2309.00071, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn(plain: Tensor, rope: Rope, y: Yarn) -> Tensor:
    """NTK by parts (arXiv:2309.00071, section 3.2): pairs that turn often stay, the others are stretched."""

    def pair_with(turns: float) -> float:
        return rope.dim * math.log(y.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_with(y.beta_fast)), 0)
    high = min(math.ceil(pair_with(y.beta_slow)), rope.dim - 1)
    width = (high - low) or 0.001
    stretched = ((torch.arange(rope.dim // 2, dtype=torch.float) - low) / width).clamp(0, 1)
    return plain / y.factor * stretched + plain * (1 - stretched)


def _llama3(plain: Tensor, s: Llama3Rope) -> Tensor:
    """Llama 3.1: wavelengths beyond the trained context are divided by `factor`, short ones kept, a ramp between."""
    turns = s.original_context * plain / (2 * math.pi)
    kept = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return plain / s.factor * (1 - kept) + plain * kept
