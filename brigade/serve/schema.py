"""What clients may ask: OpenAI's requests as strict pydantic models. A field or type unknown to them is a 400.

Fields without effect on the answer are accepted; fields that would change it and are not served accept only the value
that asks for nothing. Ranges of sampling values stand in brigade.spec.sampling alone.
"""

from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from brigade.serve.errors import ApiError
from brigade.spec.sampling import MAX_N

MAX_MESSAGES = 2048
MAX_SMALL_OBJECT = 1024
"""Entries of logit_bias, metadata and the like: checked before anything is done for each entry."""
MAX_PRIORITY = (1 << 31) - 1
RESERVED_TEMPLATE_NAMES = frozenset(
    "messages tools documents add_generation_prompt bos_token eos_token unk_token pad_token".split()  # noqa: SIM905
)


def _small(value: object) -> object:
    if isinstance(value, dict) and len(value) > MAX_SMALL_OBJECT:
        raise PydanticCustomError("too_many", f"at most {MAX_SMALL_OBJECT} entries are allowed, not {len(value)}")
    return value


FailFastList = Field(fail_fast=True)
"""A list of a million wrong entries must not become a million errors."""
Small = BeforeValidator(_small)
TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], FailFastList]


class Request(BaseModel):
    """Base of all request objects: strict types, and the first unknown field ends the matter."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_field(cls, value: Any) -> Any:
        if isinstance(value, dict):
            unknown = next((key for key in value if key not in cls.__pydantic_fields__), None)
            if unknown is not None:
                raise PydanticCustomError("unknown_field", "unknown", {"field": unknown[:100]})
        return value


class TextPart(Request):
    type: Literal["text"]
    text: str


class Message(Request):
    """One turn. The fields that are null or empty are there so that an answer's message can be sent back as it came."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], FailFastList]
    reasoning_content: str | None = None
    """Of an assistant's turn; the chat template decides whether the model sees it again."""
    name: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None
    refusal: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _reasoning_is_the_assistants(self) -> "Message":
        if self.reasoning_content is not None and self.role != "assistant":
            raise PydanticCustomError("value", "only an assistant message may have reasoning_content")
        return self

    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Request):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ResponseFormat(Request):
    type: Literal["text"]


class GenerationRequest(Request):
    """What chat and plain completions have in common."""

    model: str
    max_tokens: int | None = None
    temperature: FiniteFloat | None = None
    top_p: FiniteFloat | None = None
    top_k: int | None = None
    min_p: FiniteFloat | None = None
    seed: int | None = None
    presence_penalty: FiniteFloat | None = None
    frequency_penalty: FiniteFloat | None = None
    repetition_penalty: FiniteFloat | None = None
    logit_bias: Annotated[dict[str, FiniteFloat], Small] | None = None
    stop: str | Annotated[list[str], FailFastList] | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """Requests share cached prompts only with requests that have the same salt."""
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    """Lower values go first, as in vLLM; 0 where it is not given. It never changes the answer."""

    # Without effect on the answer.
    user: str | None = None
    metadata: Annotated[dict[str, Any], Small] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Literal[False] | None = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise _bad("stream_options", "stream_options needs stream to be true")
        return self

    @property
    def wants_usage_event(self) -> bool:
        """Whether the stream ends with an event that holds the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


R = TypeVar("R", bound=Request)
G = TypeVar("G", bound=GenerationRequest)
TemplateValue = str | bool | int | FiniteFloat | None


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: Annotated[dict[str, TemplateValue], Small] | None = None
    """Values for the checkpoint's chat template, for example {"enable_thinking": false}."""

    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> "ChatRequest":
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise _bad("max_completion_tokens", "max_tokens and max_completion_tokens differ; send only one")
        if self.top_logprobs is not None and not self.logprobs:
            raise _bad("top_logprobs", "top_logprobs needs logprobs to be true")
        taken = next((name for name in self.chat_template_kwargs or () if name in RESERVED_TEMPLATE_NAMES), None)
        if taken is not None:
            raise _bad("chat_template_kwargs", f"chat_template_kwargs may not set {taken}: the server sets it")
        return self


class CompletionRequest(GenerationRequest):
    """POST /v1/completions"""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_N, fail_fast=True)]
        | Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_N, fail_fast=True)]
    )
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise _bad("best_of", "best_of is not supported unless it equals n")
        if self.echo and self.logprobs is not None:
            raise _bad("echo", "echo together with logprobs is not supported")
        if len(self.prompts()) * (self.n or 1) > MAX_N:
            raise _bad("n", f"{len(self.prompts())} prompts with n = {self.n} are more than {MAX_N} choices")
        return self

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or many, as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


def parse(kind: type[R], body: bytes) -> R:
    """A request object from JSON. Raises ApiError 400 naming the field at fault; deep or huge JSON is refused early."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as e:
        _refuse(e)


def _bad(field: str, message: str) -> PydanticCustomError:
    # Pydantic would put values in place of braces; our messages have none.
    return PydanticCustomError("field", message, {"field": field})


_EXPECTED = {
    "prompt": f"must be a string, a list of 1 to {MAX_N} strings, a list of token ids, or a list of those",
    "stop": "must be a string or a list of strings",
    "chat_template_kwargs": f"must be an object of at most {MAX_SMALL_OBJECT} strings, numbers, booleans and nulls",
    "content": 'must be a string or a list of {"type": "text", "text": ...} parts',
}
"""Fields of several types, where pydantic would name every type it tried."""


def _refuse(e: ValidationError) -> NoReturn:
    first = e.errors(include_url=False, include_input=False)[0]
    kind, where = first["type"], _path(first["loc"])
    field = first.get("ctx", {}).get("field")
    if kind == "unknown_field":
        raise _unsupported(".".join(filter(None, [where, field])))
    if kind == "json_invalid":
        raise ApiError(400, f"the body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    if kind == "field":
        raise ApiError(400, first["msg"], param=field, code="invalid_value")
    if not where:
        raise ApiError(400, "the body must be a JSON object")
    last = where.rpartition(".")[2]
    if kind == "missing":
        raise ApiError(400, f"{where} is missing", param=where, code="missing_required_parameter")
    if kind == "none_required" or (kind == "too_long" and first["ctx"]["max_length"] == 0):
        raise _unsupported(where)
    said = _EXPECTED.get(last) or _plain_words(first["msg"])
    if kind == "literal_error":
        said += "; nothing else is supported"
    raise ApiError(400, f"{where}: {said}", param=where, code="invalid_value")


def _unsupported(name: str) -> ApiError:
    return ApiError(400, f"{name} is not supported by this server; leave it out", param=name, code="unknown_parameter")


def _plain_words(message: str) -> str:
    for theirs, ours in (("Input should be", "must be"), ("List should", "must"), (" after validation", "")):
        message = message.replace(theirs, ours)
    return message.replace("must be False", "must be false")


def _path(loc: tuple[int | str, ...]) -> str:
    """A place in the request as people write it: without the names pydantic gives to the types of a union."""
    names: list[str] = []
    for part in loc:
        if names and names[-1] in _EXPECTED:
            break
        if isinstance(part, int):
            names[-1:] = [f"{names[-1]}[{part}]"] if names else [f"[{part}]"]
        else:
            names.append(part)
    return ".".join(names)
