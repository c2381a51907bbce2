"""One generation as its caller sees it: an asynchronous iterator of text deltas, made from the worker's tokens."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable

from brigade.engine.messages import Token
from brigade.engine.output import Delta, EngineError, Observer, Timings, TokenLogprob
from brigade.engine.stops import StopStrings
from brigade.engine.tokenizer import Detokenizer, Tokenizer
from brigade.spec.sampling import SamplingParams


class Generation:
    """Yields Deltas; the last has a finish_reason. Deltas that pile up while the caller is busy come as one.

    Life: submitted -> tokens arrive -> finished (by the worker, by a stop string, by cancel() or by fail()).
    `on_end` is called once, at the end, with True if the worker still has to be told.
    """

    def __init__(
        self,
        rid: int,
        n_prompt: int,
        params: SamplingParams,
        tokenizer: Tokenizer,
        observer: Observer,
        on_end: Callable[["Generation", bool], None],
    ) -> None:
        self.rid, self.n_prompt, self.params = rid, n_prompt, params
        self._text, self._stops = Detokenizer(tokenizer), StopStrings(params.stop)
        self._observer, self._on_end = observer, on_end
        self._began = time.monotonic()
        self._first = self._latest = 0.0
        self._n_tokens = 0
        self._ended = False
        self._deltas: deque[Delta] = deque()
        self._error: EngineError | None = None
        self._news: asyncio.Future[None] | None = None
        """What the caller waits for."""
        self._exhausted = False

    @property
    def timings(self) -> Timings:
        """Times so far; complete once the generation has ended."""
        now = self._latest or time.monotonic()
        return Timings((self._first or now) - self._began, now - self._began, self._n_tokens)

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> Delta:
        """The next piece. Raises EngineError if the engine failed, StopAsyncIteration after the end."""
        while not self._deltas:
            if self._error is not None:
                raise self._error
            if self._exhausted or self._ended:
                raise StopAsyncIteration
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        delta = _joined(self._deltas)
        self._deltas.clear()
        self._exhausted = delta.finish_reason is not None
        return delta

    def cancel(self) -> None:
        """Stop; the worker forgets the request and its pages come back. Harmless after the end."""
        self._end("abort", tell_worker=True)

    # From here on: called by the engine.

    def push(self, token: Token) -> None:
        """Take a token from the worker."""
        if self._ended:
            return
        if token.finish == "error":
            self.fail(EngineError("the model gave numbers that are not finite for this request"))
            return
        self._time_token(token)
        ends_by_id = token.finish == "stop"
        text = self._stops.push("" if ends_by_id else self._text.push(token.token))
        if token.finish and self._stops.hit is None:
            text += self._stops.push(self._text.flush())
            text += self._stops.flush()
        stopped = self._stops.hit is not None
        finish = "stop" if stopped else token.finish or None
        self._deltas.append(
            Delta(
                text=text,
                tokens=(token.token,),
                logprobs=() if token.logprob is None else (_logprob(token, token.logprob),),
                finish_reason=finish,
                stop_reason=self._stops.hit if stopped else self._stop_id(token),
                n_cached=token.n_cached,
            )
        )
        self._wake()
        if finish:
            self._end(finish, tell_worker=not token.finish)

    def fail(self, error: EngineError) -> None:
        """End with an error, which the caller gets after the deltas that came before it."""
        if self._ended:
            return
        self._error = error
        self._end("error", tell_worker=False)

    def _end(self, reason: str, tell_worker: bool) -> None:
        if self._ended:
            return
        self._ended = True
        self._wake()
        self._on_end(self, tell_worker)
        self._observer.finished(self.timings, reason)

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def _time_token(self, token: Token) -> None:
        now = time.monotonic()
        if self._n_tokens == 0:
            self._first = now
            self._observer.first_token(now - self._began, self.n_prompt, token.n_cached, token.n_stored)
        else:
            self._observer.next_token(now - self._latest)
        self._latest = now
        self._n_tokens += 1

    def _stop_id(self, token: Token) -> int | None:
        asked_for = token.finish == "stop" and token.token in self.params.stop_token_ids
        return token.token if asked_for else None


def _logprob(token: Token, logprob: float) -> TokenLogprob:
    return TokenLogprob(token.token, logprob, tuple((t.token, t.logprob) for t in token.top))


def _joined(deltas: Iterable[Delta]) -> Delta:
    parts = list(deltas)
    if len(parts) == 1:
        return parts[0]
    return Delta(
        text="".join(d.text for d in parts),
        tokens=tuple(t for d in parts for t in d.tokens),
        logprobs=tuple(p for d in parts for p in d.logprobs),
        finish_reason=parts[-1].finish_reason,
        stop_reason=parts[-1].stop_reason,
        n_cached=parts[-1].n_cached,
    )
