"""One rank's side of hand-overs: prompts that it gives to ranks of other units, or takes from them. Decides no order of
steps; `brigade.core.handover` has the rules.

Giving: `expect` -> `hold` at the first token -> Offered when checksums are made -> `drop`, or the lease ends.
Taking: Reserve -> Reserved when there is room -> Adopt -> the rows are fetched -> Adopted; `drop` at any moment.
"""

import logging
import time
from bisect import insort
from collections import deque
from typing import TYPE_CHECKING

import torch

from brigade.comm.kv.link import Fetches, Offers, Open
from brigade.comm.kv.rows import Rows
from brigade.comm.kv.shared import SharedCaches
from brigade.comm.kv.tcp import Caller, KvServer
from brigade.core.handover import Leases
from brigade.core.request import Request
from brigade.core.scheduler import Scheduler
from brigade.engine.config import KvConfig
from brigade.engine.messages import Adopt, Adopted, Gone, Offered, Refused, Reserve, Reserved, Token, ToWorker
from brigade.engine.worker import Worker, stop_ids
from brigade.spec.sampling import SamplingParams

if TYPE_CHECKING:
    from brigade.comm.channel import Channel

log = logging.getLogger("brigade.kv")

LEASE = 120.0
"""Seconds that the pages of a computed prompt are held for whoever fetches it: longer than the gateway waits."""
RESERVATION = 900.0
"""Seconds that reserved pages wait for an Adopt: longer than the gateway waits for the prompt."""
TRANSFER = 30.0
"""Seconds that the rows of one prompt may take."""
_SOON, _LATER = 0.002, 0.25
"""Seconds between two looks of an idle loop at work in the background, and at the clock."""

Begun = tuple[int, list[int], SamplingParams, list[int]]
"""What the worker is told of an adopted request: its number, prompt, parameters and the tokens generated so far."""


def _sources(kv: KvConfig) -> Open:
    """Opens what ranks of this host offer in the memory that they share, and what others do over TCP."""
    shared, caller = SharedCaches(kv.files), Caller(kv.secret)
    return lambda offer, until: (shared if shared.has(offer.file) else caller).open(offer, until)


class Handing:
    """Used by the loop, between two steps."""

    def __init__(
        self,
        worker: Worker,
        scheduler: Scheduler,
        channel: "Channel[ToWorker]",
        offers: Offers | None,
        fetches: Fetches | None,
    ) -> None:
        """`offers`: of a prefill rank; `fetches`: of a decode rank."""
        self._worker, self._scheduler, self._channel = worker, scheduler, channel
        self._offers, self._fetches = offers, fetches
        self._leases = Leases()
        self._expected: dict[int, int] = {}
        """Requests to be held -> from which token on their rows are wanted."""
        self._first: dict[int, Token] = {}
        """First tokens that are told with the offer."""
        self._asked: deque[tuple[Request, Reserve]] = deque()
        self._reserved: dict[int, tuple[Reserve, float]] = {}
        """Arriving requests, and until when they wait for an Adopt."""
        self._adopting: dict[int, int] = {}
        """Those whose rows are on their way -> their first token."""
        self._dropped: set[int] = set()
        self.server: KvServer | None = None

    @classmethod
    def of(
        cls, kv: KvConfig, rank: int, worker: Worker, scheduler: Scheduler, channel: "Channel[ToWorker]"
    ) -> "Handing":
        """Of a rank that is ready to run."""
        layers = worker.model.cache.layers
        memory = layers.view(torch.uint8).reshape(-1).numpy()
        rows = Rows(memory, layers.shape[0], worker.page, layers.shape[-1] * layers.element_size())
        offers = Offers(rows, kv.first + rank if kv.files else -1)
        handing = cls(worker, scheduler, channel, offers, Fetches(rows, _sources(kv), TRANSFER))
        if kv.address:
            handing.server = KvServer(offers, kv.address, kv.secret, TRANSFER)
            offers.address = handing.server.address
        return handing

    @property
    def rests(self) -> float | None:
        """Seconds after which an idle loop must come round again; None: only when told something."""
        if (self._offers and self._offers.pending) or (self._fetches and self._fetches.pending):
            return _SOON
        return _LATER if self._asked or self._reserved or len(self._leases) else None

    @property
    def pages(self) -> tuple[int, int]:
        """Pages reserved, pages offered."""
        return sum(len(r.pages) for r in self._scheduler.arriving.values()), self._leases.n_pages

    def expect(self, rid: int, start: int) -> None:
        """This request is to be held after its first token."""
        self._expected[rid] = start

    def hold(self, req: Request, first: Token) -> bool:
        """Keep the pages of a request that has ended here, if it goes on elsewhere; whether it does."""
        start = self._expected.pop(req.rid, None)
        if start is None or self._offers is None or first.finish == "stop":
            return False
        self._leases.hold(req, time.monotonic() + LEASE)
        self._first[req.rid] = Token(first.rid, first.token, "", first.logprob, first.top, first.n_cached)
        self._offers.offer(req.rid, req.pages, start, len(req.tokens) - 1)
        return True

    def take(self, message: Reserve | Adopt) -> None:
        match message:
            case Reserve(rid, tokens, n_prompt, params, salt, priority):
                stops = stop_ids(self._worker.spec, params)
                try:
                    req = Request(rid, tokens, params.max_tokens, stops, salt, n_prompt=n_prompt, priority=priority)
                    self._scheduler.check(req)
                except ValueError as e:
                    self._channel.send(Refused(rid, str(e)))
                    return
                insort(self._asked, (req, message), key=lambda asked: asked[0].priority)
            case Adopt(rid, token, offer):
                req_or_none = self._scheduler.arriving.get(rid)
                if req_or_none is None or self._fetches is None:
                    self._channel.send(Gone(rid))
                elif rid not in self._adopting:  # it may be told twice
                    self._adopting[rid] = token
                    self._fetches.fetch(rid, offer, req_or_none.pages, req_or_none.done)

    def drop(self, rid: int) -> bool:
        """Nobody wants this request any more. False if it is the scheduler's alone."""
        if self._fetches and self._fetches.fetching(rid):
            self._fetches.stop(rid)
            self._dropped.add(rid)
            return True
        self._expected.pop(rid, None)
        if self._offers:
            self._offers.withdraw(rid)
            self._first.pop(rid, None)
        if req := self._leases.end(rid):
            self._scheduler.release(req)
            return True
        self._asked = deque(x for x in self._asked if x[0].rid != rid)
        return self._reserved.pop(rid, None) is not None and self._scheduler.abort(rid)

    def turn(self) -> list[Begun]:
        """Whatever is due: reservations, offers, transfers, deadlines. Gives the requests that run from now on."""
        now = time.monotonic()
        while self._asked and self._scheduler.reserve(self._asked[0][0]):
            req, asked = self._asked.popleft()
            self._reserved[req.rid] = asked, now + RESERVATION
            self._channel.send(Reserved(req.rid, req.done))
        for offer in self._offers.poll() if self._offers else []:
            self._channel.send(Offered(self._first.pop(offer.rid), offer))
        begun = []
        for rid, failure, seconds in self._fetches.poll() if self._fetches else []:
            if one := self._fetched(rid, failure, seconds):
                begun.append(one)
        self._expire(now)
        return begun

    def close(self) -> None:
        """End what runs in the background, soon."""
        if self._fetches:
            self._fetches.close()
        if self._offers:
            self._offers.close()
        if self.server:
            self.server.close()

    def _fetched(self, rid: int, failure: str, seconds: float) -> Begun | None:
        token = self._adopting.pop(rid)
        asked, _ = self._reserved.pop(rid)
        if rid in self._dropped:
            self._dropped.discard(rid)
            self._scheduler.abort(rid)
            return None
        if failure:
            log.warning("request %d: its rows could not be fetched, so its prompt is computed here: %s", rid, failure)
        self._scheduler.adopt(rid, token, not failure)
        self._channel.send(Adopted(rid, failure, seconds))
        return rid, asked.tokens[: asked.n_prompt], asked.params, [*asked.tokens[asked.n_prompt :], token]

    def _expire(self, now: float) -> None:
        for req in self._leases.expired(now):
            log.warning("request %d: nobody has fetched its pages within %.0f s", req.rid, LEASE)
            if self._offers:
                self._offers.withdraw(req.rid)
            self._first.pop(req.rid, None)
            self._scheduler.release(req)
        for rid in [rid for rid, (_, until) in self._reserved.items() if now >= until and rid not in self._adopting]:
            log.warning("request %d: its prompt has not come within %.0f s", rid, RESERVATION)
            self.drop(rid)
