"""Puts an answer into OpenAI's words, whole or as stream events. Runs nothing and sends nothing."""

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from brigade.engine.output import Delta, Unavailable
from brigade.engine.tokenizer import Tokenizer
from brigade.serve.answer import Answer, Choice
from brigade.serve.logprobs import chat_logprobs, completion_logprobs
from brigade.serve.reasoning import Splitter
from brigade.serve.replies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatMessage,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FinishReason,
    Usage,
)


class Format(Protocol):
    """One API's way to say an answer."""

    @property
    def id(self) -> str:
        """That of the answer."""

    def opening(self) -> Iterator[ChatChunk | Completion]:
        """Events before the first token."""

    def piece(self, i: int, delta: Delta, so_far: Choice) -> Iterator[ChatChunk | Completion]:
        """Events of one delta of choice `i`, which `so_far` already counts."""

    def usage(self, answer: Answer) -> ChatChunk | Completion:
        """The event that ends a stream whose client asked for usage."""

    def whole(self, answer: Answer) -> ChatCompletion | Completion:
        """The answer in one piece."""


@dataclass(slots=True)
class Heading:
    """What all events of one answer share."""

    model: str
    prefix: str
    with_usage: bool
    """A stream that ends with a usage event says `"usage": null` in all others."""
    id: str = field(init=False)
    created: int = field(init=False)

    def __post_init__(self) -> None:
        self.id = self.prefix + secrets.token_hex(16)
        self.created = int(time.time())


class ChatFormat:
    """Chat completions. `in_reasoning` is None for a model that does not reason."""

    def __init__(
        self, heading: Heading, tokenizer: Tokenizer, n_choices: int, in_reasoning: bool | None, logprobs: bool
    ) -> None:
        self._heading = heading
        self._tokenizer = tokenizer
        self._in_reasoning = in_reasoning
        self._splitters = [self._splitter() for _ in range(n_choices)]
        self._logprobs = logprobs

    @property
    def id(self) -> str:
        return self._heading.id

    def opening(self) -> Iterator[ChatChunk]:
        """The role, once for each choice."""
        for i in range(len(self._splitters)):
            yield self._chunk([_chat_choice(i, {"role": "assistant", "content": ""})])

    def piece(self, i: int, delta: Delta, so_far: Choice) -> Iterator[ChatChunk]:
        """Reasoning, content, and at the end why it ended. Text that a half tag holds back comes with later events."""
        reasoning, content = self._split(i, delta)
        said: ChatDelta = {}
        if reasoning:
            said["reasoning_content"] = reasoning
        if content:
            said["content"] = content
        entries = delta.logprobs if self._logprobs else ()
        if said or entries:
            choice = _chat_choice(i, said)
            if self._logprobs:
                choice["logprobs"] = chat_logprobs(self._tokenizer, entries)
            yield self._chunk([choice])
        if delta.finish_reason is not None:
            last = _chat_choice(i, {})
            last["finish_reason"], last["stop_reason"] = _reason(delta.finish_reason), delta.stop_reason
            yield self._chunk([last])

    def usage(self, answer: Answer) -> ChatChunk:
        """The usage event: no choices."""
        return {**self._chunk([]), "usage": usage_of(answer)}

    def whole(self, answer: Answer) -> ChatCompletion:
        """The answer in one piece."""
        return {
            "id": self._heading.id,
            "object": "chat.completion",
            "created": self._heading.created,
            "model": self._heading.model,
            "choices": [self._choice(i, choice) for i, choice in enumerate(answer.choices)],
            "usage": usage_of(answer),
        }

    def _choice(self, i: int, choice: Choice) -> ChatChoice:
        reasoning, content = self._split(i, Delta("".join(choice.text), finish_reason=choice.finish_reason))
        message: ChatMessage = {"role": "assistant", "content": content, "refusal": None}
        if self._in_reasoning is not None:
            message["reasoning_content"] = reasoning
        return {
            "index": i,
            "message": message,
            "logprobs": chat_logprobs(self._tokenizer, choice.logprobs) if self._logprobs else None,
            "finish_reason": _reason(choice.finish_reason),
            "stop_reason": choice.stop_reason,
        }

    def _splitter(self) -> Splitter | None:
        return None if self._in_reasoning is None else Splitter(self._in_reasoning)

    def _split(self, i: int, delta: Delta) -> tuple[str, str]:
        splitter = self._splitters[i]
        if splitter is None:
            return "", delta.text
        reasoning, content = splitter.push(delta.text)
        if delta.finish_reason is None:
            return reasoning, content
        more_reasoning, more_content = splitter.flush()
        return reasoning + more_reasoning, content + more_content

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        chunk: ChatChunk = {
            "id": self._heading.id,
            "object": "chat.completion.chunk",
            "created": self._heading.created,
            "model": self._heading.model,
            "choices": choices,
        }
        if self._heading.with_usage:
            chunk["usage"] = None
        return chunk


class CompletionFormat:
    """Plain completions. `echoes` are the prompts to repeat before each choice's text, "" for none."""

    def __init__(self, heading: Heading, tokenizer: Tokenizer, echoes: Sequence[str], n_logprobs: int | None) -> None:
        self._heading = heading
        self._tokenizer = tokenizer
        self._echoes = echoes
        self._n_logprobs = n_logprobs

    @property
    def id(self) -> str:
        return self._heading.id

    def opening(self) -> Iterator[Completion]:
        """The prompts, if they are to be repeated."""
        for i, echo in enumerate(self._echoes):
            if echo:
                yield self._reply([_completion_choice(i, echo)])

    def piece(self, i: int, delta: Delta, so_far: Choice) -> Iterator[Completion]:
        """The delta's text, with why it ended if it did."""
        if not (delta.text or delta.logprobs or delta.finish_reason):
            return
        choice = _completion_choice(i, delta.text)
        choice["logprobs"] = self._logprobs(so_far.offset, delta)
        if delta.finish_reason is not None:
            choice["finish_reason"], choice["stop_reason"] = _reason(delta.finish_reason), delta.stop_reason
        if choice["logprobs"] is not None:
            so_far.offset += sum(map(len, choice["logprobs"]["tokens"]))
        yield self._reply([choice])

    def usage(self, answer: Answer) -> Completion:
        """The usage event: no choices."""
        return {**self._reply([]), "usage": usage_of(answer)}

    def whole(self, answer: Answer) -> Completion:
        """The answer in one piece."""
        choices = [self._choice(i, choice) for i, choice in enumerate(answer.choices)]
        return {**self._reply(choices), "usage": usage_of(answer)}

    def _choice(self, i: int, choice: Choice) -> CompletionChoice:
        text = "".join(choice.text)
        return {
            "index": i,
            "text": self._echoes[i] + text,
            "logprobs": self._logprobs(0, Delta(text, logprobs=tuple(choice.logprobs))),
            "finish_reason": _reason(choice.finish_reason),
            "stop_reason": choice.stop_reason,
        }

    def _logprobs(self, offset: int, delta: Delta) -> CompletionLogprobs | None:
        if self._n_logprobs is None:
            return None
        return completion_logprobs(self._tokenizer, delta.logprobs, offset, with_top=self._n_logprobs > 0)

    def _reply(self, choices: list[CompletionChoice]) -> Completion:
        reply: Completion = {
            "id": self._heading.id,
            "object": "text_completion",
            "created": self._heading.created,
            "model": self._heading.model,
            "choices": choices,
        }
        if self._heading.with_usage:
            reply["usage"] = None
        return reply


def usage_of(answer: Answer) -> Usage:
    """Tokens read and written; every prompt counts once, however many choices it has."""
    return {
        "prompt_tokens": answer.n_prompt,
        "completion_tokens": answer.n_tokens,
        "total_tokens": answer.n_prompt + answer.n_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.n_cached},
    }


def _reason(reason: str | None) -> FinishReason:
    if reason == "stop":
        return "stop"
    if reason == "length":
        return "length"
    raise Unavailable(f"the generation failed ({reason})")


def _chat_choice(i: int, delta: ChatDelta) -> ChatChunkChoice:
    return {"index": i, "delta": delta, "logprobs": None, "finish_reason": None}


def _completion_choice(i: int, text: str) -> CompletionChoice:
    return {"index": i, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}
