"""Plain torch for every op of the models: the oracle that faster kernels must agree with, and the path without them.

Shape letters: T tokens, D model width, H heads, C latent rank, R rotary width, W = C + R cached width, F hidden width,
E experts, K experts a token, G groups, B requests, P pages, S positions, V vocabulary or value width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from brigade.spec.model import Moe

SCORE_BYTES = 1 << 26
"""Attention scores are made in blocks of query rows of at most this size, so a long prompt cannot eat the memory."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation in float32, returned in the type of x."""
    return F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864). cos, sin: [..., R/2], broadcast against x: [..., R].

    Either layout comes out as two halves; queries and keys agree, and a dot product does not see the order.
    """
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)); gate, up: [F, D], down: [D, F]."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def route(x_TD: Tensor, gate_ED: Tensor, bias_E: Tensor, moe: Moe) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's gate (arXiv:2412.19437, section 2.1.2): expert ids [T, K] and their float32 weights [T, K].

    The bias chooses but does not weigh. Only the top_groups groups with the best two experts each can be chosen from.
    """
    p_TE = F.linear(x_TD.float(), gate_ED).sigmoid()
    pick_TE = p_TE + bias_E
    if moe.top_groups < moe.n_groups:
        pick_TGE = pick_TE.unflatten(-1, (moe.n_groups, -1))
        best_TG = pick_TGE.topk(2, -1)[0].sum(-1).topk(moe.top_groups, -1)[1]
        dropped_TG = torch.ones(pick_TGE.shape[:2], dtype=torch.bool).scatter(1, best_TG, False)
        pick_TE = pick_TGE.masked_fill(dropped_TG[..., None], -torch.inf).flatten(1)
    ids_TK = pick_TE.topk(moe.top_k, -1)[1]
    w_TK = p_TE.gather(1, ids_TK)
    if moe.norm_weights:
        w_TK = w_TK / (w_TK.sum(-1, keepdim=True) + 1e-20)
    return ids_TK, w_TK * moe.route_scale


def experts(
    x_TD: Tensor,
    ids_TK: Tensor,
    w_TK: Tensor,
    gate_EFD: Tensor | Sequence[Tensor],
    up_EFD: Tensor | Sequence[Tensor],
    down_EDF: Tensor | Sequence[Tensor],
) -> Tensor:
    """Routed experts: each token through its K experts, weighted and summed in the order of ids: [T, D]."""
    T, K = ids_TK.shape
    order = ids_TK.flatten().argsort(stable=True)
    rows = x_TD[order // max(K, 1)]
    y, at = torch.empty_like(rows), 0
    for e, n in enumerate(torch.bincount(ids_TK.flatten(), minlength=len(gate_EFD)).tolist()):
        if n:
            y[at : at + n] = swiglu(rows[at : at + n], gate_EFD[e], up_EFD[e], down_EDF[e])
            at += n
    home = torch.empty_like(y)
    home[order] = y
    return torch.einsum("tkd,tk->td", home.unflatten(0, (T, K)).float(), w_TK).to(x_TD.dtype)


def write_cache(cache_PSW: Tensor, rows_TW: Tensor, slots_T: Tensor) -> None:
    """Put the new tokens' rows into their slots (page * page size + offset) of one layer's cache, in place."""
    cache_PSW.flatten(0, 1).index_copy_(0, slots_T, rows_TW)


def mla_decode(q_BHW: Tensor, cache_PSW: Tensor, pages_BP: Tensor, lengths_B: Tensor, kv_rank: int) -> Tensor:
    """Absorbed latent attention (arXiv:2405.04434, section 2.1.2), one query token a request: latents [B, H, C].

    q is scaled already. pages_BP may be padded with any page: positions from lengths_B on are not looked at.
    """
    past_BSW = cache_PSW[pages_BP].flatten(1, 2).float()
    score_BHS = q_BHW.float() @ past_BSW.mT
    hidden_BS = torch.arange(past_BSW.shape[1]) >= lengths_B[:, None]
    p_BHS = score_BHS.masked_fill_(hidden_BS[:, None], -torch.inf).softmax(-1)
    return (p_BHS @ past_BSW[..., :kv_rank]).to(q_BHW.dtype)


def mla_prefill(q_THW: Tensor, cache_PSW: Tensor, pages_P: Tensor, start: int, kv_rank: int) -> Tensor:
    """The same for T query tokens of one request at positions start..start+T-1, causal: latents [T, H, C]."""
    T, H, W = q_THW.shape
    past_SW = cache_PSW[pages_P].flatten(0, 1)[: start + T].float()
    out = []
    for t, n, hidden_tS in _causal_blocks(T, start, H):
        score = (q_THW[t : t + n].reshape(n * H, W).float() @ past_SW.T).view(n, H, -1)
        p = score.masked_fill_(hidden_tS[:, None], -torch.inf).softmax(-1)
        out.append((p.view(n * H, -1) @ past_SW[:, :kv_rank]).view(n, H, kv_rank))
    return torch.cat(out).to(q_THW.dtype)


def gqa_decode(q_BHV: Tensor, cache_PSW: Tensor, pages_BP: Tensor, lengths_B: Tensor, n_kv: int) -> Tensor:
    """Grouped-query attention, one query token a request; a cache row is all key heads, then all value heads."""
    B, H, V = q_BHV.shape
    past = cache_PSW[pages_BP].flatten(1, 2).float().view(B, -1, 2, n_kv, V)
    key, value = past[:, :, 0].permute(0, 2, 3, 1), past[:, :, 1].permute(0, 2, 1, 3)
    score = q_BHV.float().view(B, n_kv, H // n_kv, V) @ key
    hidden_BS = torch.arange(past.shape[1]) >= lengths_B[:, None]
    p = score.masked_fill_(hidden_BS[:, None, None], -torch.inf).softmax(-1)
    return (p @ value).reshape(B, H, V).to(q_BHV.dtype)


def gqa_prefill(q_THV: Tensor, cache_PSW: Tensor, pages_P: Tensor, start: int, n_kv: int) -> Tensor:
    """The same for T query tokens of one request at positions start..start+T-1, causal: [T, H, V]."""
    T, H, V = q_THV.shape
    past = cache_PSW[pages_P].flatten(0, 1)[: start + T].float().view(-1, 2, n_kv, V)
    key, value = past[:, 0].permute(1, 2, 0), past[:, 1].permute(1, 0, 2)
    out = []
    for t, n, hidden_tS in _causal_blocks(T, start, H):
        q = q_THV[t : t + n].float().view(n, n_kv, H // n_kv, V).transpose(0, 1).flatten(1, 2)
        score = (q @ key).view(n_kv, n, H // n_kv, -1)
        p = score.masked_fill_(hidden_tS[None, :, None], -torch.inf).softmax(-1)
        out.append((p.flatten(1, 2) @ value).view(n_kv, n, H // n_kv, V).transpose(0, 1).reshape(n, H, V))
    return torch.cat(out).to(q_THV.dtype)


def _causal_blocks(T: int, start: int, H: int) -> list[tuple[int, int, Tensor]]:
    """Blocks of query rows: first row, number of rows, and which positions each may not see."""
    S = start + T
    step = max(1, SCORE_BYTES // (4 * H * S))
    position = torch.arange(S)
    return [
        (t, min(step, T - t), position > torch.arange(start + t, start + min(t + step, T))[:, None])
        for t in range(0, T, step)
    ]
