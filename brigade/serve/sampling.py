"""From a request's fields to SamplingParams: what the client said, else the checkpoint's defaults, else OpenAI's."""

from dataclasses import dataclass, fields
from typing import Any

from brigade.engine.output import BadRequest
from brigade.serve.config import ConfigError
from brigade.serve.schema import ChatRequest, CompletionRequest, GenerationRequest
from brigade.spec.sampling import SamplingParams

_DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_PLAIN = (*_DEFAULTED, "seed", "presence_penalty", "frequency_penalty", "ignore_eos", "n")
_NAMES = frozenset(f.name for f in fields(SamplingParams))


@dataclass(frozen=True, slots=True)
class Sampling:
    """Makes sampling parameters for a model of `vocab` tokens whose checkpoint asks for `defaults`."""

    defaults: dict[str, Any]
    vocab: int

    def chat(self, asked: ChatRequest) -> SamplingParams:
        """Parameters of a chat request; `max_tokens` 1 stands for "not given". Raises BadRequest naming the field."""
        n_logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        said = {"logprobs": "top_logprobs"}
        limit = asked.max_tokens
        if asked.max_completion_tokens is not None:
            limit, said["max_tokens"] = asked.max_completion_tokens, "max_completion_tokens"
        return self._params(asked, n_logprobs, limit, 1, said)

    def completion(self, asked: CompletionRequest) -> SamplingParams:
        """Parameters of a plain completion. Raises BadRequest naming the field."""
        return self._params(asked, asked.logprobs, asked.max_tokens, SamplingParams().max_tokens, {})

    def _params(
        self,
        asked: GenerationRequest,
        n_logprobs: int | None,
        limit: int | None,
        default_limit: int,
        said: dict[str, str],
    ) -> SamplingParams:
        """`said`: the client's own names of fields that SamplingParams calls otherwise."""
        given = {name: value for name in _PLAIN if (value := getattr(asked, name)) is not None}
        params = SamplingParams(
            **{**self.defaults, **given},
            max_tokens=default_limit if limit is None else limit,
            logprobs=n_logprobs,
            logit_bias=_bias(asked.logit_bias or {}),
            stop=asked.stops(),
            stop_token_ids=tuple(asked.stop_token_ids or ()),
        )
        return _checked(params, self.vocab, said)


def defaults_of(generation: dict[str, Any], where: str) -> dict[str, Any]:
    """Sampling defaults from a generation_config.json's content, which lies at `where`. Raises ConfigError."""
    found: dict[str, Any] = {}
    for name in _DEFAULTED:
        value = generation.get(name)
        if value is None:
            continue
        wanted = int if name == "top_k" else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise ConfigError(f"{where}: {name} must be a number, not {value!r}; correct it or remove it")
        found[name] = value
    if generation.get("do_sample") is False:
        found["temperature"] = 0.0
    try:
        SamplingParams(**found).check(vocab=1)
    except ValueError as e:
        raise ConfigError(f"{where}: {e}; correct it or remove it") from e
    return found


def _bias(asked: dict[str, float]) -> tuple[tuple[int, float], ...]:
    # At most nine digits, so that a key is a number before it is converted and "1_0" or " 1" are not.
    wrong = next((key for key in asked if not (key.isascii() and key.isdigit() and len(key) < 10)), None)
    if wrong is not None:
        raise BadRequest(f"logit_bias: {wrong[:50]!r} is not a token id", param="logit_bias", code="invalid_value")
    return tuple((int(key), value) for key, value in asked.items())


def _checked(params: SamplingParams, vocab: int, said: dict[str, str]) -> SamplingParams:
    try:
        params.check(vocab)
    except ValueError as e:
        name, _, rest = str(e).partition(" ")
        field = said.get(name, name)
        raise BadRequest(f"{field} {rest}", param=field if name in _NAMES else "stop", code="invalid_value") from e
    return params
