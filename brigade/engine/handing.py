"""One rank's side of hand-overs: prompts that it gives to ranks of other units, or takes from them. Decides no order of
steps; `brigade.core.handover` has the rules.

Giving: `expect` -> Offered with the first step that has it -> each layer of each step is told as finished -> `hold` and
Computed at the first token -> `drop`, or the lease ends.
Taking: Reserve -> Reserved when there is room -> Follow: rows are fetched as they are finished -> Adopt: the others are
fetched -> Adopted; `drop` at any moment.
"""

import logging
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from brigade.comm.kv.link import Fetches, Open
from brigade.comm.kv.nixl import Nixl
from brigade.comm.kv.offer import Offer
from brigade.comm.kv.offers import Offers
from brigade.comm.kv.rows import Fast, Rows
from brigade.comm.kv.shared import SharedCaches
from brigade.comm.kv.tcp import Caller, KvServer
from brigade.core.handover import Leases
from brigade.core.laps import Laps
from brigade.core.request import Request
from brigade.core.scheduler import Scheduler, Slice, StepPlan
from brigade.engine.config import KvConfig
from brigade.engine.messages import (
    Adopt,
    Adopted,
    Computed,
    Follow,
    Gone,
    Offered,
    Refused,
    Reserve,
    Reserved,
    Token,
    ToWorker,
)
from brigade.engine.worker import Worker, Wrote, stop_ids
from brigade.kernels.cpu.checked import CheckedCopy
from brigade.model.on_cpu_kernels import CpuModel
from brigade.spec.sampling import SamplingParams

if TYPE_CHECKING:
    from brigade.comm.channel import Channel

log = logging.getLogger("brigade.kv")

LEASE = 120.0
"""Seconds that the pages of a computed prompt are held for whoever fetches it: longer than the gateway waits."""
RESERVATION = 900.0
"""Seconds that reserved pages wait for a Follow, and then for an Adopt: longer than the gateway waits for either."""
TRANSFER = 30.0
"""Seconds that rows may take after the prompt was computed."""
TRANSFER_SPAN = "transfer"
"""What a span of fetching rows is called; its layer is the request's number."""
_SOON, _LATER = 0.0005, 0.25
"""Seconds between two looks of an idle loop at work in the background, and at the clock."""

Begun = tuple[int, list[int], SamplingParams, list[int]]
"""What the worker is told of an adopted request: its number, prompt, parameters and the tokens generated so far."""


def _sources(kv: KvConfig, caller: Caller, nixl: Nixl | None, fast: Fast | None) -> Open:
    """Opens what ranks of this host offer in the memory that they share, and what others do over TCP; or all over
    NIXL."""
    if nixl is not None:
        return nixl.open
    shared = SharedCaches(kv.files, caller, fast)
    return lambda offer, have: (shared if shared.has(offer.file) else caller).open(offer, have)


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
        self._offered: dict[int, tuple[Request, list[int]]] = {}
        """Those of them that are being computed, and the pages that they had when the last step was planned."""
        self._asked: deque[tuple[Request, Reserve]] = deque()
        self._reserved: dict[int, tuple[Reserve, float]] = {}
        """Arriving requests, and until when they wait for a Follow or an Adopt."""
        self._adopting: dict[int, tuple[int, float]] = {}
        """Those whose prompt is computed -> their first token, and since when it is known."""
        self._ended: dict[int, str] = {}
        """Those whose transfer has ended before that -> why it failed; empty: it did not."""
        self._dropped: set[int] = set()
        self.server: KvServer | None = None
        self.nixl: Nixl | None = None
        """Others read this rank's memory as long as it is there."""
        self._began: dict[int, int] = {}
        """Transfers that run -> when they began, in nanoseconds."""
        self.laps: Laps | None = None
        """Where transfers are noted while somebody records."""
        self.steps: Callable[[], Future[Any]] | None = None
        """Gives what is done once all steps planned so far have run; None: none ever runs behind. They may write into
        pages that were given back, by a request that has left, and reserved for another one since."""

    @classmethod
    def of(
        cls, kv: KvConfig, rank: int, worker: Worker, scheduler: Scheduler, channel: "Channel[ToWorker]"
    ) -> "Handing":
        """Of a rank that is ready to run. Raises ValueError for a link that cannot be used here."""
        layers = worker.model.cache.layers
        memory = layers.view(torch.uint8).reshape(-1).numpy()
        rows = Rows(memory, layers.shape[0], worker.page, layers.shape[-1] * layers.element_size())
        caller = Caller(kv.secret)
        fast = CheckedCopy(worker.model.kernels.library) if isinstance(worker.model, CpuModel) else None
        nixl = Nixl.start(caller, fast) if kv.link == "nixl" else None
        offers = Offers(rows, kv.first + rank if kv.files else -1, registered=nixl.register(memory) if nixl else None)
        handing = cls(worker, scheduler, channel, offers, Fetches(rows, _sources(kv, caller, nixl, fast), TRANSFER))
        handing.nixl = nixl
        handing.server = KvServer(offers, kv.address, kv.secret, TRANSFER)
        offers.address = handing.server.address
        return handing

    @property
    def rests(self) -> float | None:
        """Seconds after which an idle loop must come round again; None: only when told something."""
        if self._adopting or self._dropped:
            return _SOON
        return _LATER if self._asked or self._reserved or len(self._leases) else None

    @property
    def pages(self) -> tuple[int, int]:
        """Pages reserved, pages offered."""
        computing = sum(len(req.pages) for req, _ in self._offered.values())
        return sum(len(r.pages) for r in self._scheduler.arriving.values()), computing + self._leases.n_pages

    # Giving

    def expect(self, rid: int, start: int) -> None:
        """This request is to be held after its first token."""
        self._expected[rid] = start

    def planned(self, plan: StepPlan) -> Wrote | None:
        """Before a new plan runs: offers what it begins, and takes back what was preempted for it. What the step is to
        call after each layer; None if nobody waits for its rows."""
        if self._offers is None or not self._expected:
            return None
        for rid, (req, pages) in self._offered.items():
            if req.pages[: len(pages)] != pages:
                self._offers.retract(rid)
            self._offered[rid] = req, list(req.pages)
        attempts = {}
        for s in plan.slices:
            if (start := self._expected.get(s.rid)) is None:
                continue
            if s.rid not in self._offered:
                req = self._scheduler.live[s.rid]
                self._offered[s.rid] = req, list(req.pages)
                self._channel.send(Offered(s.rid, self._offers.offer(s.rid, start, len(req.tokens))))
            attempts[s.rid] = self._offers.attempt(s.rid)
        return partial(self._wrote, self._offers, attempts) if attempts else None

    def rolled_back(self) -> None:
        """Plans were taken back, and pages with them."""
        for rid in self._offered:
            if self._offers:
                self._offers.retract(rid)

    @staticmethod
    def _wrote(offers: Offers, attempts: dict[int, int], slices: Sequence[Slice], layer: int) -> None:
        """From the thread that computes: in this layer all rows before the ends of these slices are finished, since
        whatever they stand on was planned before and so is computed by now."""
        for s in slices:
            if (attempt := attempts.get(s.rid)) is not None:
                offers.wrote(s.rid, attempt, layer, s.end, s.pages)

    def hold(self, req: Request, first: Token) -> bool:
        """Keep the pages of a request that has ended here, if it goes on elsewhere; whether it does."""
        if self._offers is None or self._expected.pop(req.rid, None) is None:
            return False
        self._offered.pop(req.rid, None)
        if first.finish == "stop":
            self._offers.withdraw(req.rid)
            return False
        self._leases.hold(req, time.monotonic() + LEASE)
        self._offers.complete(req.rid, req.pages)
        self._channel.send(Computed(msgspec.structs.replace(first, finish="")))
        return True

    # Taking

    def take(self, message: Reserve | Follow | Adopt) -> None:
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
            case Follow(rid) | Adopt(rid) if rid not in self._reserved or self._fetches is None:
                self._channel.send(Gone(rid))
            case Follow(rid, offer):
                self._follow(rid, offer)
            case Adopt(rid, token):
                if rid in self._adopting:  # it may be told twice
                    return
                self._adopting[rid] = token, time.monotonic()
                self._fetches.hurry(rid)
                if not self._fetches.fetching(rid):
                    self._ended.setdefault(rid, "nobody has offered them")

    def _follow(self, rid: int, offer: Offer) -> None:
        assert self._fetches is not None
        asked, _ = self._reserved[rid]
        self._reserved[rid] = asked, time.monotonic() + RESERVATION
        if self._fetches.fetching(rid):
            self._fetches.move(rid, offer)
        elif self._ended.get(rid) != "":  # it may be told twice
            req = self._scheduler.arriving[rid]
            self._ended.pop(rid, None)
            self._began[rid] = time.monotonic_ns()
            self._fetches.fetch(rid, offer, req.pages, req.done, self.steps() if self.steps else None)

    def drop(self, rid: int) -> bool:
        """Nobody wants this request any more. False if it is the scheduler's alone."""
        if self._fetches and self._fetches.fetching(rid):
            self._fetches.stop(rid)
            self._dropped.add(rid)
            return True
        self._expected.pop(rid, None)
        self._offered.pop(rid, None)
        if self._offers:
            self._offers.withdraw(rid)
        if req := self._leases.end(rid):
            self._scheduler.release(req)
            return True
        self._asked = deque(x for x in self._asked if x[0].rid != rid)
        self._adopting.pop(rid, None)
        self._ended.pop(rid, None)
        return self._reserved.pop(rid, None) is not None and self._scheduler.abort(rid)

    def turn(self) -> list[Begun]:
        """Whatever is due: reservations, transfers, deadlines. Gives the requests that run from now on."""
        now = time.monotonic()
        while self._asked and self._scheduler.reserve(self._asked[0][0]):
            req, asked = self._asked.popleft()
            self._reserved[req.rid] = asked, now + RESERVATION
            self._channel.send(Reserved(req.rid, req.done))
        for rid, failure in self._fetches.poll() if self._fetches else []:
            if (began := self._began.pop(rid, None)) and self.laps:
                self.laps.note(TRANSFER_SPAN, began, time.monotonic_ns(), rid)
            if rid in self._dropped:
                self._dropped.discard(rid)
                self.drop(rid)
            else:
                self._ended[rid] = failure
        begun = [self._adopt(rid, now) for rid in self._adopting if rid in self._ended]
        for rid, *_ in begun:
            del self._adopting[rid]
        self._expire(now)
        return begun

    def close(self) -> None:
        """End what runs in the background, soon."""
        if self._fetches:
            self._fetches.close()
        if self.server:
            self.server.close()

    def _adopt(self, rid: int, now: float) -> Begun:
        token, since = self._adopting[rid]
        failure, (asked, _) = self._ended.pop(rid), self._reserved.pop(rid)
        if failure:
            log.warning("request %d: its rows could not be fetched, so its prompt is computed here: %s", rid, failure)
        self._scheduler.adopt(rid, token, not failure)
        self._channel.send(Adopted(rid, failure, now - since))
        return rid, asked.tokens[: asked.n_prompt], asked.params, [*asked.tokens[asked.n_prompt :], token]

    def _expire(self, now: float) -> None:
        for req in self._leases.expired(now):
            log.warning("request %d: nobody has fetched its pages within %.0f s", req.rid, LEASE)
            if self._offers:
                self._offers.withdraw(req.rid)
            self._scheduler.release(req)
        waiting = self._reserved.keys() - self._adopting.keys() - self._dropped
        for rid in [rid for rid in waiting if now >= self._reserved[rid][1]]:
            log.warning("request %d: its prompt has not come within %.0f s", rid, RESERVATION)
            self.drop(rid)
