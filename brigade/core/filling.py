"""Requests whose beginning is being read from a store below memory: which pages it fills, and who waits for whom. Pure.

Two requests with the same beginning do not read it twice: the second one waits for the first, without pages, and then
finds them in memory.
"""

from dataclasses import dataclass

from brigade.core.request import Request


@dataclass(frozen=True, slots=True)
class Fill:
    """Fill `pages` of a request with positions start..end of `tokens`, as they were computed under this salt.

    Not before the steps have run that were in flight when it was begun: they may still write pages of a request that
    has left meanwhile.
    """

    rid: int
    tokens: tuple[int, ...]
    """All up to `end`: what is at a position depends on everything before it."""
    salt: str
    pages: tuple[int, ...]
    """Page table from position 0 on. Those before `start` are other requests' as well and must not be written."""
    start: int

    @property
    def end(self) -> int:
        return len(self.tokens)


class Filling:
    """What the scheduler remembers of such requests. It decides; who reads tells it `filled`."""

    def __init__(self) -> None:
        self.begun: list[Fill] = []
        """Fills that nobody has begun yet: whoever reads takes them from here."""
        self.holding: dict[int, Request] = {}
        """Requests whose pages are being filled."""
        self._behind: dict[int, list[Request]] = {}
        """Request -> those that wait for what it reads."""

    def __contains__(self, rid: int) -> bool:
        return rid in self.holding or any(r.rid == rid for others in self._behind.values() for r in others)

    def __len__(self) -> int:
        return len(self.holding) + sum(map(len, self._behind.values()))

    def join(self, req: Request, end: int) -> bool:
        """Wait for a request that is reading what this one would: its tokens up to `end`. False if there is none."""
        for rid, other in self.holding.items():
            if other.done < end <= other.stored and other.salt == req.salt and other.tokens[:end] == req.tokens[:end]:
                self._behind.setdefault(rid, []).append(req)
                return True
        return False

    def begin(self, req: Request) -> None:
        """Its pages are there to be filled up to `req.stored`."""
        self.holding[req.rid] = req
        self.begun.append(Fill(req.rid, tuple(req.tokens[: req.stored]), req.salt, tuple(req.pages), req.done))

    def end(self, rid: int) -> tuple[Request, list[Request]]:
        """This request waits no more; gives it, and those that waited for it."""
        if (req := self.holding.pop(rid, None)) is None:
            return self._step_back(rid), []
        req.stored = 0
        self.begun = [fill for fill in self.begun if fill.rid != rid]
        return req, self._behind.pop(rid, [])

    def _step_back(self, rid: int) -> Request:
        for others in self._behind.values():
            for req in others:
                if req.rid == rid:
                    others.remove(req)
                    return req
        raise ValueError(f"request {rid} waits for no store")
