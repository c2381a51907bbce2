"""The routes: what happens to each request, from its body to its answer. Wording and shapes stand elsewhere."""

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from brigade.engine.loads import Experts
from brigade.engine.output import BadRequest
from brigade.serve.answer import Answer
from brigade.serve.body import BodyReader
from brigade.serve.chat_template import CHARS_PER_TOKEN, ChatTemplate, Prompt, refuse_huge
from brigade.serve.config import ServeConfig
from brigade.serve.errors import ApiError
from brigade.serve.formats import ChatFormat, CompletionFormat, Format, Heading
from brigade.serve.life import Life, Wanted
from brigade.serve.metrics import CONTENT_TYPE, Metrics
from brigade.serve.replies import Model, ModelList, Status
from brigade.serve.sampling import Sampling
from brigade.serve.schema import ChatRequest, CompletionRequest, G, GenerationRequest, R, parse
from brigade.serve.stream import EventStream
from brigade.serve.tracer import RequestTrace, TraceReply, TraceRequest
from brigade.spec.sampling import SamplingParams

if TYPE_CHECKING:
    from brigade.engine.fleet import Fleet

SMALL_BODY, SMALL_PROMPT = 16 << 10, 2048
"""Bytes of a body, and characters or tokens of a prompt, that are read where they stand, in about a millisecond. To
hand them to a thread costs as much, and makes all streams wait for the interpreter's lock."""


class Routes:
    """Handlers of all routes, over one engine."""

    def __init__(
        self,
        engine: "Fleet",
        config: ServeConfig,
        metrics: Metrics,
        life: Life,
        sampling: Sampling,
        template: ChatTemplate | None,
    ) -> None:
        self._engine, self._config, self._metrics, self._life = engine, config, metrics, life
        self._sampling, self._template = sampling, template
        self._bodies = BodyReader(config.limits)
        self._created = int(time.time())

    async def chat(self, request: Request) -> ASGIApp:
        """POST /v1/chat/completions"""
        trace = self._metrics.tracer.begin(request)
        asked = await self._read(ChatRequest, request)
        trace.end("read")
        if self._template is None:
            raise ApiError(400, "this model has no chat template; use /v1/completions", code="no_chat_template")
        params = self._sampling.chat(asked)
        messages, extra = asked.messages, asked.chat_template_kwargs or {}
        prompt = self._template.quick_prompt(messages, extra)
        if prompt is None:
            prompt = await asyncio.to_thread(self._template.prompt, messages, extra)
        if asked.max_tokens is None and asked.max_completion_tokens is None:
            params = replace(params, max_tokens=self._room(prompt.tokens))
        trace.end("template and tokens")
        form = self._chat_format(asked, prompt, params)
        return await self._reply(request, asked, [prompt.tokens], [params], form, trace)

    async def completion(self, request: Request) -> ASGIApp:
        """POST /v1/completions"""
        trace = self._metrics.tracer.begin(request)
        asked = await self._read(CompletionRequest, request)
        trace.end("read")
        params = self._sampling.completion(asked)
        small = sum(map(len, asked.prompts())) <= SMALL_PROMPT
        prompts, echoes = self._prompts(asked) if small else await asyncio.to_thread(self._prompts, asked)
        each = [self._within_room(asked, prompt, params) for prompt in prompts]
        trace.end("tokens")
        heading = self._heading("cmpl-", asked)
        per_choice = [echo for echo in echoes for _ in range(params.n)]
        form = CompletionFormat(heading, self._engine.tokenizer, per_choice, asked.logprobs)
        return await self._reply(request, asked, prompts, each, form, trace)

    async def models(self, _: Request) -> Response:
        """GET /v1/models"""
        return _json(ModelList(object="list", data=[self._model()]))

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{model}"""
        self._check_model(request.scope["path"].removeprefix("/v1/models/"))
        return _json(self._model())

    async def health(self, _: Request) -> Response:
        """GET /health: the process is alive and can still come to answer."""
        if self._engine.failed:
            raise ApiError(503, self._engine.health().reason, code="engine_failed")
        return _json(Status(status="ok"))

    async def ready(self, _: Request) -> Response:
        """GET /ready: requests will be answered now."""
        health = self._engine.health()
        if self._life.draining:
            raise ApiError(503, "shutting down", code="not_ready")
        if not health.ready:
            raise ApiError(503, health.reason, code="not_ready")
        return _json(Status(status="ready"))

    async def metrics(self, _: Request) -> Response:
        """GET /metrics"""
        return Response(self._metrics.scrape(), headers={"Content-Type": CONTENT_TYPE})

    async def units(self, _: Request) -> Response:
        """GET /debug/units: what runs where, and how well."""
        return _json(self._metrics.report(self._engine, self._config.served_name))

    async def experts(self, _: Request) -> Response:
        """GET /debug/experts: how busy the routed experts of each unit are, and where they are."""
        if not (units := await self._engine.expert_loads()):
            raise ApiError(404, "this model has no routed experts", code="no_experts")
        return _json(Experts(units))

    async def trace(self, request: Request) -> ASGIApp:
        """POST /debug/trace: what this process and all ranks do for a while."""
        asked = await self._parsed(TraceRequest, request)
        return TraceReply(self._metrics.tracer, self._engine, asked, self._life)

    async def _read(self, kind: type[G], request: Request) -> G:
        asked = await self._parsed(kind, request)
        self._check_model(asked.model)
        return asked

    async def _parsed(self, kind: type[R], request: Request) -> R:
        body = await self._bodies.read(request)
        # A body of megabytes takes long enough to parse for other streams to notice.
        return parse(kind, body) if len(body) <= SMALL_BODY else await asyncio.to_thread(parse, kind, body)

    def _check_model(self, name: str) -> None:
        if name != self._config.served_name:
            raise ApiError(
                404,
                f"the model {name[:200]!r} is not served here; this server has {self._config.served_name!r}",
                param="model",
                code="model_not_found",
            )

    def _room(self, prompt: list[int]) -> int:
        # At least 1, so that the engine, not we, says why a prompt that fills the context cannot be served.
        return max(1, self._engine.ready.max_context - len(prompt))

    def _within_room(self, asked: CompletionRequest, prompt: list[int], params: SamplingParams) -> SamplingParams:
        if asked.max_tokens is not None:
            return params
        return replace(params, max_tokens=min(params.max_tokens, self._room(prompt)))

    def _prompts(self, asked: CompletionRequest) -> tuple[list[list[int]], list[str]]:
        """Tokens of each prompt, and the text to repeat before its answers."""
        prompts: list[list[int]] = []
        echoes: list[str] = []
        max_chars = CHARS_PER_TOKEN * self._engine.ready.max_context
        for prompt in asked.prompts():
            if isinstance(prompt, str):
                refuse_huge(len(prompt), max_chars)
                tokens, text = self._engine.tokenizer.encode(prompt), prompt
            else:
                wrong = next((t for t in prompt if t >= self._sampling.vocab), None)
                if wrong is not None:
                    raise BadRequest(f"the model has no token {wrong}", "prompt", "invalid_value")
                tokens, text = prompt, self._engine.tokenizer.decode(prompt) if asked.echo else ""
            if not tokens:
                raise BadRequest("the prompt is empty; give at least one token", "prompt", "invalid_value")
            prompts.append(tokens)
            echoes.append(text if asked.echo else "")
        return prompts, echoes

    def _chat_format(self, asked: ChatRequest, prompt: Prompt, params: SamplingParams) -> ChatFormat:
        assert self._template is not None
        in_reasoning = prompt.in_reasoning if self._template.reasons else None
        heading = self._heading("chatcmpl-", asked)
        return ChatFormat(heading, self._engine.tokenizer, params.n, in_reasoning, logprobs=bool(asked.logprobs))

    def _heading(self, prefix: str, asked: GenerationRequest) -> Heading:
        return Heading(self._config.served_name, prefix, with_usage=asked.wants_usage_event)

    async def _reply(
        self,
        request: Request,
        asked: GenerationRequest,
        prompts: list[list[int]],
        params: list[SamplingParams],
        form: Format,
        trace: RequestTrace,
    ) -> ASGIApp:
        async def start() -> Answer:
            answer = await Answer.start(self._engine, prompts, params, asked.cache_salt or "", asked.priority or 0)
            trace.known_as(form.id, answer.rids)
            trace.end("submit")
            return answer

        if asked.stream:
            return EventStream(start, form, asked.wants_usage_event, self._life, trace)
        async with Wanted(request.scope, request.receive, self._life):
            answer = await start()
            try:
                await answer.finish()
            finally:
                answer.cancel()
                trace.end("wait")
                trace.over()
        return _json(form.whole(answer))

    def _model(self) -> Model:
        return Model(
            id=self._config.served_name,
            object="model",
            created=self._created,
            owned_by="brigade",
            max_model_len=self._engine.ready.max_context,
        )


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
