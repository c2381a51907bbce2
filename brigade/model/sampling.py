"""Chooses the next token from logits. A row's choice depends on its own request alone: never on the batch, the
schedule, the rank or a hand-over. Randomness is a hash of the seed, the position and the token: there is no state.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brigade.spec.sampling import SamplingParams

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
BROKEN = -1
"""Chosen when the logits are not finite: the request must end with an error."""


@dataclass(slots=True)
class History:
    """What sampling needs to remember of one request. `params.seed` is set."""

    params: SamplingParams
    prompt: list[int]
    new: list[int] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)
    """How often each new token was chosen."""
    drafts: tuple[int, ...] = ()
    """What is guessed to come next."""

    def append(self, token: int) -> None:
        self.new.append(token)
        self.counts[token] += 1

    def take_back(self, n: int) -> None:
        """Forget the last n new tokens."""
        for _ in range(n):
            token = self.new.pop()
            self.counts[token] -= 1
            if not self.counts[token]:
                del self.counts[token]

    def tokens(self, start: int, end: int) -> list[int]:
        """Those at positions start..end-1, as far as they are known."""
        n = len(self.prompt)
        return self.prompt[start:end] + self.new[max(start - n, 0) : max(end - n, 0)]


@dataclass(frozen=True, slots=True)
class Choice:
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def noise(seed: int, i: int, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, for each of `tokens` (ids) as the i-th new token of a request with this seed.

    A hash of (seed, i) and the token id: splitmix64 (Steele et al., OOPSLA 2014, figure 17) on top of BLAKE2.
    """
    digest = blake2b(seed.to_bytes(16, "little", signed=True) + i.to_bytes(8, "little"), digest_size=8).digest()
    z = np.uint64(int.from_bytes(digest, "little")) + (tokens.numpy().astype(np.uint64) + np.uint64(1)) * _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    uniform = ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54
    return torch.from_numpy(-np.log(-np.log(uniform)))


def proceed(logits_RV: Tensor, rows: Sequence[tuple[History, int]]) -> list[list[Choice]]:
    """The next tokens of requests, which their histories take. A request has 1 + n rows of float32 logits [R, V]: after
    its last token, and after each of its first n drafts. Logits may be changed in place.

    The second token is known if the first is what was guessed, and so on: every token is chosen as it would be one at a
    time, so drafts change no text (unlike rejection sampling, which only keeps the distribution). A row that is not
    finite counts only after the last token: after a draft, it is computed again as that.
    """
    found, at, out = _Rows(logits_RV), 0, []
    for history, n in rows:
        choices: list[Choice] = []
        for i in range(1 + n):
            choice = found.choose(at + i, history)
            if i and choice.token == BROKEN:
                break
            choices.append(choice)
            history.append(max(choice.token, 0))  # a broken row still has a position in the steps already planned
            if i == n or choice.token != history.drafts[i]:
                break
        out.append(choices)
        at += 1 + n
    return out


def choose(logits_RV: Tensor, rows: Sequence[History]) -> list[Choice]:
    """One token for each row of float32 logits [R, V]; logits may be changed in place.

    Log-probabilities are those of the model itself, before penalties, bias and temperature.
    """
    found = _Rows(logits_RV)
    return [found.choose(i, h) for i, h in enumerate(rows)]


def draw(logits_RV: Tensor, rows: Sequence[History]) -> list[int]:
    """The tokens alone. BROKEN where a row is not finite."""
    found = _Rows(logits_RV)
    return [found.draw(i, h) for i, h in enumerate(rows)]


class _Rows:
    """Rows of logits, and what can be seen of all of them at once."""

    def __init__(self, logits_RV: Tensor) -> None:
        self._logits_RV = logits_RV
        # Not isfinite().all(), which takes torch 1.4 ms for 8 rows of 32,000 where this takes 0.1: it passes NaN on
        self._broken = (~logits_RV.abs().amax(-1).isfinite()).tolist()
        self._best = _best(logits_RV).tolist() if len(logits_RV) else []

    def choose(self, i: int, h: History) -> Choice:
        k = h.params.logprobs
        logprobs_V = None if k is None else self._logits_RV[i].log_softmax(-1)
        return _with_logprobs(self.draw(i, h), logprobs_V, k)

    def draw(self, i: int, h: History) -> int:
        if self._broken[i]:
            return BROKEN
        changed = _penalise(self._logits_RV[i], h)
        if h.params.temperature:
            return _draw(self._logits_RV[i], h)
        return int(_best(self._logits_RV[i])) if changed else self._best[i]


def _best(logits: Tensor) -> NDArray[np.intp]:
    """The first of equals, as torch's argmax, which takes ten times as long."""
    best: NDArray[np.intp] = logits.numpy().argmax(-1)
    return best


def _penalise(logits_V: Tensor, h: History) -> bool:
    """Whether anything was to be changed."""
    p = h.params
    if p.repetition_penalty != 1.0:  # arXiv:1909.05858, section 4.1; prompt tokens count too
        seen = torch.tensor(list({*h.prompt, *h.counts}))
        x = logits_V[seen]
        logits_V[seen] = torch.where(x > 0, x / p.repetition_penalty, x * p.repetition_penalty)
    if h.counts and (p.presence_penalty or p.frequency_penalty):
        seen = torch.tensor(list(h.counts))
        logits_V[seen] -= p.presence_penalty + p.frequency_penalty * torch.tensor(list(h.counts.values()))
    if p.logit_bias:
        ids, bias = zip(*p.logit_bias, strict=True)
        logits_V[torch.tensor(ids)] += torch.tensor(bias)
    return bool(p.repetition_penalty != 1.0 or p.presence_penalty or p.frequency_penalty or p.logit_bias)


def _draw(logits_V: Tensor, h: History) -> int:
    """The largest of logit / temperature + noise, which draws from the softmax (the Gumbel-max trick).

    Unlike a draw from summed probabilities, it changes only when two tokens all but tie: rounding that depends on the
    batch, about 1e-7 of a logit, practically never shows in the text.
    """
    p = h.params
    scaled_V = (logits_V - logits_V.max()).double() / p.temperature
    tokens = torch.arange(len(scaled_V))
    if p.top_k or p.top_p < 1.0 or p.min_p:
        scaled_V, tokens = scaled_V.sort(descending=True, stable=True)
        n = _n_kept(scaled_V.exp(), p)
        scaled_V, tokens = scaled_V[:n], tokens[:n]
    return int(tokens[(scaled_V + noise(p.seed or 0, len(h.new), tokens)).argmax()])


def _n_kept(weight_V: Tensor, p: SamplingParams) -> int:
    """How many of the most likely tokens (weights sorted, largest first) top_k, top_p and min_p leave: at least one.

    Each filter looks at what the one before it left: first top_k, then top_p, then min_p.
    """
    n = len(weight_V) if not p.top_k else min(p.top_k, len(weight_V))
    if p.top_p < 1.0:
        before = weight_V[:n].cumsum(0) - weight_V[:n]
        n = int((before < p.top_p * weight_V[:n].sum()).sum())
    if p.min_p:
        n = int((weight_V[:n] >= p.min_p * weight_V[0]).sum())
    return max(n, 1)


def _with_logprobs(token: int, logprobs_V: Tensor | None, k: int | None) -> Choice:
    if token == BROKEN or logprobs_V is None or k is None:
        return Choice(token)
    top = logprobs_V.topk(min(k, len(logprobs_V)))
    pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return Choice(token, float(logprobs_V[token]), pairs)
