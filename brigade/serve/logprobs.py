"""Log-probabilities of tokens in OpenAI's two formats. Computes none."""

from collections.abc import Sequence

from brigade.engine.output import TokenLogprob
from brigade.engine.tokenizer import Tokenizer
from brigade.serve.replies import ChatLogprobs, CompletionLogprobs, TokenLogprobEntry, TopLogprob

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say; the number OpenAI uses."""


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob]) -> ChatLogprobs:
    """The format of chat completions."""

    def one(token: int, logprob: float) -> TopLogprob:
        text, raw = tokenizer.token_text(token), tokenizer.token_bytes(token)
        return {"token": text, "logprob": max(logprob, LOWEST), "bytes": raw}

    content: list[TokenLogprobEntry] = [
        {**one(e.token, e.logprob), "top_logprobs": [one(token, logprob) for token, logprob in e.top]} for e in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprob], offset: int, with_top: bool
) -> CompletionLogprobs:
    """The format of plain completions; `offset` is where the first token's text begins in the choice's text."""
    tokens = [tokenizer.token_text(e.token) for e in entries]
    offsets = [offset]
    for text in tokens[:-1]:
        offsets.append(offsets[-1] + len(text))
    top = [{tokenizer.token_text(t): max(p, LOWEST) for t, p in (*e.top, (e.token, e.logprob))} for e in entries]
    return {
        "tokens": tokens,
        "token_logprobs": [max(e.logprob, LOWEST) for e in entries],
        "top_logprobs": top if with_top else None,
        "text_offset": offsets if tokens else [],
    }
