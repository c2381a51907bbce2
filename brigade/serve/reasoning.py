"""Cuts a growing answer into reasoning (between <think> and </think>) and content. Knows text only, no tokens."""

from brigade.engine.tokenizer import THINK

OPEN, CLOSE = THINK


class Splitter:
    """One answer's text, piece by piece. What could be the start of a tag is held back until it is certain.

    1. Unless the prompt already opened the reasoning, the answer may begin with <think>, white space before it or not.
    2. Reasoning goes on to the first </think>; without one, the whole answer is reasoning.
    3. All after it is content. Line breaks right after either tag belong to the tag.
    """

    def __init__(self, inside: bool) -> None:
        self._part = "reasoning" if inside else "start"
        self._after_tag = inside
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """Reasoning and content that became certain with this text; either may be empty."""
        self._held += text
        reasoning = ""
        if self._part == "start":
            self._start()
        if self._part == "reasoning":
            reasoning = self._reason()
        return reasoning, self._take() if self._part == "content" else ""

    def flush(self) -> tuple[str, str]:
        """What was still held back when the answer ended."""
        rest, self._held = self._held, ""
        return (rest, "") if self._part == "reasoning" else ("", rest)

    def _start(self) -> None:
        seen = self._held.lstrip()
        if seen.startswith(OPEN):
            self._held = seen.removeprefix(OPEN)
            self._part, self._after_tag = "reasoning", True
        elif not OPEN.startswith(seen):
            self._part = "content"

    def _reason(self) -> str:
        before, tag, after = self._held.partition(CLOSE)
        if tag:
            self._held = before
            out = self._take()
            self._part, self._after_tag, self._held = "content", True, after
            return out
        n_held = _overlap(self._held, CLOSE)
        certain, tail = self._held[: len(self._held) - n_held], self._held[len(self._held) - n_held :]
        self._held = certain
        out = self._take()
        self._held = tail
        return out

    def _take(self) -> str:
        out, self._held = self._held, ""
        if self._after_tag:
            out = out.lstrip("\r\n")
            self._after_tag = not out
        return out


def _overlap(text: str, tag: str) -> int:
    """Characters at the end of `text` that could be the start of `tag`."""
    return next((k for k in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-k:])), 0)
