"""From messages to tokens by the checkpoint's own chat template, sandboxed. User text never becomes a control token.

1. In every text a user gave, control-token text is replaced by one-character marks that occur nowhere else.
2. The template renders the messages; it sees marks as ordinary characters.
3. The tokenizer reads control tokens in the rendered text and puts the marked texts back as plain text.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from brigade.engine.output import BadRequest
from brigade.engine.tokenizer import THINK, Tokenizer
from brigade.serve.config import ConfigError
from brigade.serve.deadline import Alarm, Deadline, TooSlow
from brigade.serve.schema import Message

CHARS_PER_TOKEN = 16
"""More characters than this for each position of the context cannot be a prompt that fits (text has 3 to 5), so they
are refused before the template or the tokenizer spends time on them."""
_PRIVATE = range(0x100000, 0x10FFFE)
"""Plane 16: no character is assigned there, so text has none unless someone put it there on purpose."""
RENDER_SECONDS = 2.0
QUICK_SECONDS, MOST_QUICK = 0.01, 2048
"""A chat of so many characters at most is rendered where it stands, if its template is done in so many seconds."""
PER_MESSAGE = 32
"""Characters that a message counts besides its own."""
SLOW_SECONDS = 60.0
"""For how long chats that are half as large as one that was not done in time are left to a thread."""
MOST_OPERAND = 10_000
_ALWAYS: dict[str, Any] = {"add_generation_prompt": True, "tools": None, "documents": None}
Bounded = Callable[[dict[str, Any]], str]
"""Renders the template with these values, in bounded time."""
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
# What a template's expression can raise on values it does not expect, `{{ x + 1 }}` with a string for instance.
_TEMPLATE_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A chat ready to be continued."""

    tokens: list[int]
    in_reasoning: bool
    """The prompt ends with an open <think>."""


class ChatTemplate:
    """A checkpoint's chat template. Raises ConfigError, naming the file, if it cannot be parsed."""

    def __init__(self, source: str, where: str, tokenizer: Tokenizer, max_context: int) -> None:
        self._tokenizer = tokenizer
        self._max_chars = CHARS_PER_TOKEN * max_context
        self._source = source
        self.reasons = any(tag in source for tag in THINK)
        """Whether answers of this model hold <think>...</think>."""
        self._most_quick, self._slow_until = MOST_QUICK, 0.0
        self._alarm = Alarm()
        self._names = {name: text for name in _SPECIAL if (text := tokenizer.special(name)) is not None}
        self._marker = Marker(tokenizer.control)
        try:
            self._template = _environment().from_string(source)
            self._template.globals = dict(self._template.globals)  # copied at each rendering: not layer by layer
        except jinja2.TemplateSyntaxError as e:
            raise ConfigError(f"{where}: line {e.lineno} of the chat template: {e.message}") from e
        except (SyntaxError, MemoryError, *_TEMPLATE_ERRORS) as e:  # Python's own limits on nesting, for instance
            raise ConfigError(f"{where}: the chat template cannot be compiled: {str(e)[:200]}") from e

    def prompt(self, messages: Sequence[Message], extra: Mapping[str, Any]) -> Prompt:
        """Tokens of a chat, up to where the assistant's answer begins. Raises BadRequest.

        Takes time in proportion to the text, which is bounded: call it off the event loop.
        """
        refuse_huge(_n_chars(messages), self._max_chars)
        try:
            return self._prompt(messages, extra, self._under_deadline)
        except TooSlow as e:
            raise _refused(e) from e

    def quick_prompt(self, messages: Sequence[Message], extra: Mapping[str, Any]) -> Prompt | None:
        """The same, for a chat that takes at most milliseconds; None: call `prompt`, off the event loop. Raises
        BadRequest."""
        size = _n_chars(messages) + PER_MESSAGE * len(messages)
        size += sum(len(value) for value in extra.values() if isinstance(value, str))
        now = time.monotonic()
        if now > self._slow_until:
            self._most_quick = MOST_QUICK
        if size > self._most_quick or not self._alarm.here:
            return None
        try:
            return self._prompt(messages, extra, self._under_alarm)
        except TooSlow:
            self._most_quick, self._slow_until = size // 2, now + SLOW_SECONDS
            return None

    def _prompt(self, messages: Sequence[Message], extra: Mapping[str, Any], bounded: Bounded) -> Prompt:
        """Raises BadRequest and TooSlow."""
        marks = self._marker.marks(_texts(messages, extra), self._source)
        turns = [_turn(m, marks) for m in messages]
        values = {k: marks.put(v) if isinstance(v, str) else v for k, v in extra.items()}
        rendered = bounded({**values, **self._names, **_ALWAYS, "messages": turns})
        return Prompt(
            self._tokenizer.encode_chat(rendered, marks.literal),
            in_reasoning=self.reasons and rendered.rstrip().endswith(THINK[0]),
        )

    def _under_deadline(self, values: dict[str, Any]) -> str:
        with Deadline(RENDER_SECONDS):
            return self._render(values)

    def _under_alarm(self, values: dict[str, Any]) -> str:
        rendered = self._alarm.within(QUICK_SECONDS, lambda: self._render(values))
        if len(rendered) > 2 * MOST_QUICK:
            raise TooSlow("the template says so much that its tokens take long")
        return rendered

    def _render(self, values: dict[str, Any]) -> str:
        pieces, n_chars = list[str](), 0
        try:
            for piece in self._template.generate(values):
                n_chars += len(piece)
                refuse_huge(n_chars, self._max_chars)
                pieces.append(piece)
        except TooSlow:
            raise
        except (jinja2.TemplateError, *_TEMPLATE_ERRORS) as e:
            raise _refused(e) from e
        return "".join(pieces)


def load_template(folder: Path, tokenizer: Tokenizer, max_context: int) -> ChatTemplate | None:
    """The chat template of the checkpoint in `folder`, or None if it has none. Raises ConfigError."""
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            source = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"{file}: cannot be read ({e})") from e
        return ChatTemplate(source, str(file), tokenizer, max_context)
    where = str(folder / "tokenizer_config.json")
    found = tokenizer.config.get("chat_template")
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
        if found is None:
            raise ConfigError(f"{where}: chat_template is a list without a template named default")
    if found is None:
        return None
    if not isinstance(found, str):
        raise ConfigError(f"{where}: chat_template must be a string or a list, not {type(found).__name__}")
    return ChatTemplate(found, where, tokenizer, max_context)


def refuse_huge(n_chars: int, max_chars: int) -> None:
    """Raise BadRequest if a prompt of so many characters cannot fit into the context."""
    if n_chars > max_chars:
        raise BadRequest(
            f"the prompt has at least {n_chars} characters; the context of {max_chars // CHARS_PER_TOKEN} tokens "
            f"cannot hold more than {max_chars}",
            code="context_length_exceeded",
        )


def _n_chars(messages: Sequence[Message]) -> int:
    return sum(len(m.text()) + len(m.reasoning_content or "") for m in messages)


def _refused(e: Exception) -> BadRequest:
    said = f"the model's chat template refuses these messages: {str(e)[:500]}"
    return BadRequest(said, "messages", "chat_template")


class Marks:
    """The marks of one request: `literal` says which text each one stands for."""

    def __init__(self, control: "Marker", free: Iterator[str]) -> None:
        self._pattern, self._heads, self._head_ends = control.pattern, control.heads, control.head_ends
        self._longest, self._free = control.longest, free
        self._mark_of: dict[str, str] = {}

    @property
    def literal(self) -> dict[str, str]:
        return {mark: text for text, mark in self._mark_of.items()}

    def put(self, text: str, keep: Sequence[str] = ()) -> str:
        """`text` with a mark for each control-token text, but for those in `keep`."""
        out = self._pattern.sub(lambda found: found[0] if found[0] in keep else self._mark(found[0]), text)
        # Two texts side by side in the prompt must not join to a control token either: mark what could begin one.
        bare = out.rstrip()
        if bare[-1:] not in self._head_ends:
            return out
        head = next((bare[-k:] for k in range(self._longest, 0, -1) if bare[-k:] in self._heads), "")
        return bare.removesuffix(head) + self._mark(head) + out[len(bare) :] if head else out

    def _mark(self, text: str) -> str:
        if text not in self._mark_of:
            self._mark_of[text] = next(self._free)
        return self._mark_of[text]


class Marker:
    """Finds control-token text, the longest first, in time that does not grow with the number of control tokens."""

    def __init__(self, control: Iterable[str]) -> None:
        texts = sorted(control, key=len, reverse=True)
        self.pattern = re.compile(_trie_pattern(texts) if texts else r"(?!)")
        self.heads = frozenset(text[:k] for text in texts for k in range(1, len(text))) - set(texts)
        self.head_ends = frozenset(head[-1] for head in self.heads)
        self.longest = max(map(len, self.heads), default=0)

    def marks(self, texts: Iterable[str], template: str) -> Marks:
        """Marks for one request: private characters that are in none of `texts` nor in the template."""
        return Marks(self, _unused(texts, template))


def _unused(texts: Iterable[str], template: str) -> Iterator[str]:
    """Looks at the texts only when the first mark is needed: most requests need none."""
    used = set(template).union(*texts)
    yield from (chr(code) for code in _PRIVATE if chr(code) not in used)


def _trie_pattern(texts: Iterable[str]) -> str:
    trie: dict[str, Any] = {}
    for text in texts:
        node = trie
        for ch in text:
            node = node.setdefault(ch, {})
        node[""] = {}
    return _branch(trie)


def _branch(node: dict[str, Any]) -> str:
    """Every text of a trie node as a regular expression; greedy, so that the longest wins."""
    out = ""
    while len(node) == 1 and "" not in node:
        ch, node = next(iter(node.items()))
        out += re.escape(ch)
    choices = [re.escape(ch) + _branch(child) for ch, child in node.items() if ch]
    if not choices:
        return out
    return f"{out}(?:{'|'.join(choices)}){'?' if '' in node else ''}"


def _texts(messages: Sequence[Message], extra: Mapping[str, Any]) -> list[str]:
    texts = [m.text() for m in messages]
    texts += [m.reasoning_content for m in messages if m.reasoning_content]
    return texts + [value for value in extra.values() if isinstance(value, str)]


def _turn(message: Message, marks: Marks) -> dict[str, str]:
    # Templates cut the reasoning out of earlier answers, so they must be able to see its tags.
    keep = THINK if message.role == "assistant" else ()
    role = "system" if message.role == "developer" else message.role
    turn = {"role": role, "content": marks.put(message.text(), keep)}
    if message.reasoning_content is not None:
        turn["reasoning_content"] = marks.put(message.reasoning_content)
    return turn


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with bounds on the operators that make huge values from small ones. Seeing them here also keeps
    Jinja from computing them while it compiles."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if not all(isinstance(x, (int, float)) and abs(x) <= MOST_OPERAND for x in (left, right)):
            raise jinja2.TemplateError(f"'{operator}' is for numbers up to {MOST_OPERAND} here")
        return super().call_binop(context, operator, left, right)


def _environment() -> ImmutableSandboxedEnvironment:
    env = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock])
    env.filters["tojson"] = _tojson
    del env.globals["lipsum"]
    env.globals["raise_exception"] = _raise
    env.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return env


def _tojson(value: Any, indent: int | None = None, **_: Any) -> str:
    # Jinja's own escapes HTML characters, which models have not seen in training.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


class _GenerationBlock(Extension):
    """{% generation %} marks the assistant's words for training; when serving it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - declared so by Jinja

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
