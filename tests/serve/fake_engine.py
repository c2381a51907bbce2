"""An engine whose answers can be worked out by hand: every generation tells the same story, one token a step.

A prompt's own first tokens do not matter. Faults are switched on by attributes.
"""

import asyncio
import itertools
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

from brigade.core.roles import UnitState
from brigade.engine.config import DEMO_MODEL
from brigade.engine.loads import ExpertLoads, LayerLoads, Moved, UnitLoads
from brigade.engine.messages import Ping, Pong, Ran, Ready, Spans, Stats, TellSpans
from brigade.engine.output import BadRequest, Delta, EngineError, Health, TokenLogprob, Unavailable
from brigade.engine.recorder import Recorder
from brigade.engine.tokenizer import Detokenizer, Tokenizer
from brigade.spec.sampling import SamplingParams

STORY = "Once upon a time there was a little fox who lived in the woods."
TOKENIZER = Tokenizer(DEMO_MODEL)
END_OF_TEXT = 2
_rids = itertools.count()


class FakeGeneration:
    """Tokens of the story until it ends or max_tokens are told."""

    def __init__(self, engine: "FakeEngine", prompt: list[int], params: SamplingParams) -> None:
        self.engine, self.prompt, self.params = engine, prompt, params
        self.cancelled = False
        self.rid = next(_rids)
        self.read = 0
        tokens = TOKENIZER.encode(engine.story)
        self._left = tokens[: params.max_tokens]
        self._reason = "length" if len(self._left) < len(tokens) else "stop"
        self._text = Detokenizer(TOKENIZER)

    def __aiter__(self) -> "FakeGeneration":
        return self

    async def __anext__(self) -> Delta:
        if self not in self.engine.running:
            raise StopAsyncIteration
        if self.engine.fails_after is not None and self.read >= self.engine.fails_after:
            self.engine.end(self)
            raise self.engine.failure
        if self.engine.stalls_after is not None and self.read >= self.engine.stalls_after:
            await asyncio.Event().wait()
        await asyncio.sleep(self.engine.step_seconds)
        token = self._left.pop(0)
        self.read += 1
        last = not self._left
        text = self._text.push(token) + (self._text.flush() if last else "")
        if last:
            self.engine.end(self)
        k = self.params.logprobs
        top = tuple((t, -0.5 * (rank + 1)) for rank, t in enumerate([token, *range(500, 520)][: k or 0]))
        return Delta(
            text=text,
            tokens=(token,),
            logprobs=() if k is None else (TokenLogprob(token, -0.5, top),),
            finish_reason=self._reason if last else None,
            n_cached=self.engine.n_cached if self.read == 1 else 0,
        )

    def cancel(self) -> None:
        if self in self.engine.running:
            self.cancelled = True
            self.engine.end(self)


def some_loads() -> ExpertLoads:
    """Two layers of six experts on two ranks."""
    layers = [
        LayerLoads(
            1, [8, 0, 0, 0, 0, 0], [4.0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5, 0], [2, 2], [4, 0], 1.0, 2.0, [9, 9]
        ),
        LayerLoads(
            2, [1, 1, 1, 2, 1, 2], [1.0, 1, 1, 2, 1, 2], [0, 1, 2, 3, 4, 5, 5], [5, 3], [3, 5], 1.25, 1.25, [8, 8]
        ),
    ]
    moved = Moved(experts=3, portions=1, dropped=0, last="2026-11-25T08:00:00+00:00")
    return ExpertLoads(2, 6, 1, 60.0, [0, 0, 0, 1, 1, 1, 1], 1.17, 1.5, 1.0, moved, layers)


class FakeUnit:
    """The interface of brigade.engine.crew.Member, and of its Engine."""

    def __init__(self, fleet: "FakeEngine") -> None:
        self._fleet, self.engine = fleet, self
        self.name, self.role, self.n_restarts = "mixed-0", "mixed", 1
        self.config = SimpleNamespace(ranks=1)
        self.recorder = Recorder(1, self._hear)
        self.is_silent = False

    @property
    def told(self) -> UnitState:
        state = self._fleet.state
        why = "" if state.ready else state.reason
        return UnitState(self.name, "mixed", "mixed", "serving" if state.ready else "not ready", why, 1, 0, 0)

    @property
    def ready(self) -> Ready:
        return self._fleet.ready

    def rank_stats(self) -> list[Stats]:
        return [self._fleet.stats()]

    def _hear(self, rank: int, message: Any) -> bool:
        """As a rank of made-up work: one step of one part."""
        if isinstance(message, TellSpans) and message.seq and not self.is_silent:
            now = time.monotonic_ns()
            step = Ran(now - 2000, now, 1, [(generation.rid, 0, 1) for generation in self._fleet.running])
            self.recorder.hear(rank, Spans(message.seq, [step], [("attention", now - 1500, now, 0, 0)], []))
            self.recorder.hear(rank, Spans(message.seq, [], [], [], n_lost=3, last=True))
        if isinstance(message, Ping):
            self.recorder.hear(rank, Pong(message.seq, self._fleet.stats(), time.monotonic_ns() + 10**12))
        return True


class FakeEngine:
    """The interface of brigade.engine.fleet.Fleet."""

    def __init__(self, story: str = STORY, max_context: int = 256, model: str = str(DEMO_MODEL)) -> None:
        self.story = story
        self.step_seconds = 0.0
        self.n_cached = 0
        self.stalls_after: int | None = None
        """Tokens after which generations wait for ever."""
        self.fails_after: int | None = None
        self.failure: EngineError = Unavailable("the worker process was lost")
        self.refusals: list[EngineError | None] = []
        """What the next submissions are answered with; None lets one through."""
        self.hangs_on_submit = False
        """As while a lost worker is being replaced."""
        self.n_hanging = 0
        self.state = Health(True, "ok")
        self.submitted: list[FakeGeneration] = []
        self.salts: list[str] = []
        self.priorities: list[int] = []
        self.running: set[FakeGeneration] = set()
        self.draining = False
        self.crew: Any = None

        self.tokenizer = TOKENIZER
        self.config, self.most = SimpleNamespace(model=model), 320
        self.unit = FakeUnit(self)
        self.crew = SimpleNamespace(members=[self.unit])
        self.failed = False
        self.loads: list[UnitLoads] | EngineError = [UnitLoads("mixed-0", some_loads())]
        """Of experts."""
        self.spec = SimpleNamespace(vocab=TOKENIZER.vocab)
        self.ready = Ready(n_pages=40, page=16, max_context=max_context, notes=[])
        self.generation: dict[str, Any] = {}

    async def expert_loads(self) -> list[UnitLoads]:
        if isinstance(self.loads, EngineError):
            raise self.loads
        return self.loads

    async def submit(
        self, prompt: list[int], params: SamplingParams, salt: str = "", priority: int = 0
    ) -> FakeGeneration:
        params.check(self.spec.vocab)
        if self.hangs_on_submit:
            self.n_hanging += 1
            try:
                await asyncio.Event().wait()
            finally:
                self.n_hanging -= 1
        if self.draining:
            raise Unavailable("shutting down")
        refusal = self.refusals.pop(0) if self.refusals else None
        if refusal is not None:
            raise refusal
        if len(prompt) + params.max_tokens > self.ready.max_context:
            raise BadRequest("the prompt is too long", "prompt", "context_length_exceeded")
        generation = FakeGeneration(self, prompt, params)
        self.submitted.append(generation)
        self.salts.append(salt)
        self.priorities.append(priority)
        self.running.add(generation)
        return generation

    def end(self, generation: FakeGeneration) -> None:
        self.running.discard(generation)

    def health(self) -> Health:
        return self.state

    def stats(self) -> Stats:
        return Stats(
            n_steps=7, running=len(self.running), waiting=3, pages_used=10, n_preempted=2, n_drafted=9, n_accepted=6
        )

    def handovers(self) -> tuple[dict[str, int], Counter[str], float]:
        return {"decoding": len(self.running)}, Counter(fetched=2), 0.5

    def drain(self) -> None:
        self.draining = True

    async def idle(self, deadline: float) -> bool:
        end = asyncio.get_running_loop().time() + deadline
        while self.running and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.005)
        return not self.running

    @property
    def last(self) -> FakeGeneration:
        return self.submitted[-1]

    async def until_idle(self) -> None:
        """Fails unless nothing runs within a second."""
        assert await self.idle(1.0), f"{len(self.running)} generations still run"
