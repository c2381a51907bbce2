"""Finds stop strings in a growing text. Pure."""

from collections.abc import Sequence


class StopStrings:
    """Passes text through, holding back an ending that may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.hit: str | None = None
        """The stop string that was found; nothing more is passed then."""

    def push(self, text: str) -> str:
        """Text that is certain to stand before any stop string."""
        if self.hit is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:  # the one that is complete first, as if the text had come letter by letter
            _, at, self.hit = min(found)
            out, self._held = self._held[:at], ""
            return out
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        out, self._held = self._held, ""
        return out

    def _overlap(self, stop: str) -> int:
        """Length of the longest ending of the held text that begins `stop`."""
        for n in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:n]):
                return n
        return 0
