"""Text to tokens and back. Wraps the `tokenizers` library; what users write can never become a control token."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HfTokenizer

from brigade.engine.output import BadRequest
from brigade.spec.config import BadConfig, read_json

THINK = ("<think>", "</think>")
_HELD_TOKENS = 8
"""Tokens held back while they do not end in a whole character; of more, the older ones are shown as what they are."""
_PART_OF_CHARACTER = 3
"""Tokens at the end that may still begin a character: of its four bytes at most, the last one is missing."""


class Tokenizer:
    """A checkpoint's tokenizer.json with what tokenizer_config.json says about it.

    Control tokens are all added tokens that are not mere white space: DeepSeek marks its role tokens as "not special",
    but a user who could write them could forge a turn.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        content = read_json(path)
        added = content.get("added_tokens") or []
        try:
            self.control = {str(t["content"]): int(t["id"]) for t in added if str(t["content"]).strip()}
            self._full = HfTokenizer.from_str(json.dumps({**content, "added_tokens": _as_written(added)}))
            self._plain = HfTokenizer.from_str(json.dumps({**content, "added_tokens": _all_special(added)}))
        except Exception as e:  # the library raises plain Exception for every malformed file
            raise BadConfig(f"{path}: the tokenizer cannot be read ({e}); download the file again") from e
        for hf in (self._full, self._plain):
            hf.no_truncation()
            hf.no_padding()
        self._plain.encode_special_tokens = True
        self.config: dict[str, Any] = {}
        if (folder / "tokenizer_config.json").exists():
            self.config = read_json(folder / "tokenizer_config.json")
        self._hidden = {i for text, i in self.control.items() if text not in THINK}

    @cached_property
    def vocab(self) -> int:
        """Number of token ids, added tokens included."""
        return int(self._full.get_vocab_size(with_added_tokens=True))

    def special(self, name: str) -> str | None:
        """The text of `bos_token`, `eos_token` and the like, or None if the checkpoint has none."""
        value = self.config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        return value if isinstance(value, str) else None

    @cached_property
    def _bos(self) -> list[int]:
        bos = self.special("bos_token")
        if self.config.get("add_bos_token") and bos in self.control:
            return [self.control[bos]]
        return []

    def encode(self, text: str) -> list[int]:
        """Tokens of a raw prompt. Control-token text stays text. The beginning-of-sequence token is put first if the
        checkpoint asks for one. Raises BadRequest for text that is not valid Unicode."""
        ids = list(self._plain.encode(_checked(text), add_special_tokens=True).ids)
        return ids if not self._bos or ids[:1] == self._bos else self._bos + ids

    def encode_chat(self, rendered: str, literal: Mapping[str, str]) -> list[int]:
        """Tokens of a rendered chat template, whose control tokens count.

        `literal` maps one-character marks in `rendered` to control-token text that a user wrote: it stays text.
        """
        ids: list[int] = []
        for piece, mark in _split(_checked(rendered), literal):
            if piece:
                ids += self._full.encode(piece, add_special_tokens=False).ids
            if mark:
                ids += self._plain.encode(literal[mark], add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, control tokens left out (but `<think>` kept)."""
        return str(self._full.decode([i for i in ids if i not in self._hidden], skip_special_tokens=False))

    def has_text(self, token: int) -> bool:
        """False for control tokens, which decode() leaves out, and for ids that no token has."""
        return token not in self._hidden and token < self.vocab

    def token_text(self, token: int) -> str:
        """One token as text, control tokens shown, for log-probability lists."""
        return str(self._full.decode([token], skip_special_tokens=False))

    def token_bytes(self, token: int) -> list[int] | None:
        """The bytes of one token; None where its text is only part of a character."""
        text = self.token_text(token)
        return None if "�" in text else list(text.encode())


class Detokenizer:
    """Turns a growing list of tokens into a growing text, holding back bytes that do not yet form a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode, self._has_text = tokenizer.decode, tokenizer.has_text
        self._tokens: list[int] = []
        self._start = 0
        """First token of the window that is decoded: one stretch of shown text before the new tokens, since how a token
        decodes (leading spaces above all) can depend on the ones before it."""
        self._shown = 0
        """Tokens whose text has been given out."""

    def push(self, token: int) -> str:
        """Text that became certain with this token, often empty."""
        if not self._has_text(token):
            return ""
        self._tokens.append(token)
        now = self._decode(self._tokens[self._start :])
        n_held = len(self._tokens) - self._shown
        if not now.endswith("�"):
            return self._show(n_held, now)
        if n_held <= _HELD_TOKENS:
            return ""
        n = n_held - _PART_OF_CHARACTER
        return self._show(n, self._decode(self._tokens[self._start : self._shown + n]))

    def flush(self) -> str:
        """What was held back, as replacement characters where bytes are missing."""
        return self._show(len(self._tokens) - self._shown, self._decode(self._tokens[self._start :]))

    def _show(self, n: int, now: str) -> str:
        """Give out the next n tokens' text. `now`: that of the window up to them."""
        before = self._decode(self._tokens[self._start : self._shown])
        self._start, self._shown = self._shown, self._shown + n
        return now[len(before) :]


def _split(text: str, marks: Mapping[str, str]) -> list[tuple[str, str]]:
    """Cut text at one-character marks: pairs of a piece and the mark behind it ("" at the end)."""
    if not marks:
        return [(text, "")]
    out, piece_start = [], 0
    for i, ch in enumerate(text):
        if ch in marks:
            out.append((text[piece_start:i], ch))
            piece_start = i + 1
    out.append((text[piece_start:], ""))
    return out


def _as_written(added: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Control tokens match exact text alone: after a normalizer, look-alikes in a user's text could match too."""
    return [{**t, "normalized": t.get("normalized", False) and not str(t["content"]).strip()} for t in added]


def _all_special(added: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**t, "special": bool(str(t["content"]).strip())} for t in added]


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise BadRequest("the text holds a lone surrogate, which is not valid Unicode", code="invalid_unicode") from e
    return text
