"""Decides what runs next on one rank. Pure: plan() and commit() see ints only, so a test or a simulator can drive it.

Life of a request:
1. add: it waits.
2. plan admits it: cached prefix pages and fresh pages are taken; part of it runs in this step.
3. plan, again and again: the rest of the prompt in chunks, then one token a step.
4. preempted, maybe: pages ran out, the youngest of the least urgent requests gives its pages back and waits again; its
   tokens stay.
5. commit tells its new tokens; the last one finishes it. Its pages stay held.
6. release gives the pages back. (abort is release at any moment.)

A request whose prompt is computed by another rank begins otherwise:
1. reserve: pages for all its tokens are taken, cached ones among them; it does not run while the others are filled.
2. adopt, with the first token that the other rank sampled: it runs on as if all had been computed here.
3. If the pages could not be filled, adopt(..., filled=False): they go back, and it is computed here from the beginning.

A request whose beginning lies in a store below memory (`stored`) does this between 1 and 2:
1. plan takes pages for what is stored, and names them in `filling.begun`; they are filled behind the steps.
2. filled says how far that came: it runs on from there, or waits again to be computed.

With `drafts`, each step guesses what follows the tokens it samples, and the next one runs the guesses after the last
token: those that are what the model says are further tokens of that step. Until commit, `done` counts all of them.

undo takes back plans that will never be run, newest first, as if they had not been made.

plan() may be called again before commit(): steps run in plan order, so a plan relies on earlier plans, not on results.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from brigade.core.filling import Filling
from brigade.core.pages import NOTHING_KNOWN, Known, PagePool
from brigade.core.request import Request

_ADOPTED = -1
"""Where a request began whose pages were filled from elsewhere: no plan of this rank has its beginning."""
LAST = -1
"""Stands for "the token you sampled last for this request", which the planner does not know yet."""
DRAFT = -2
"""Stands for "what you guess to come next"; several of them for the first guess, the second, and so on."""


@dataclass(frozen=True, slots=True)
class Slice:
    """One request's share of one step: run `tokens` at positions start.. with `pages` as its page table.

    Within each layer, slices write the cache in order before any later slice reads it: a slice may use pages that an
    earlier slice of the same step fills.
    """

    rid: int
    tokens: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    sample: bool
    prompt_end: int = 0
    """Positions before it are in whole pages of the prompt. A model may compute them in another way than those after,
    which rounds differently: the border is the same however the request is cut and however often it is computed."""

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def n_drafts(self) -> int:
        """Guesses at its end. Each is run, so that the tokens after it are known if it is right."""
        return self.tokens.count(DRAFT)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one rank runs in one step. An empty plan is falsy."""

    slices: tuple[Slice, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.slices)

    @property
    def n_tokens(self) -> int:
        return sum(len(s.tokens) for s in self.slices)


class Scheduler:
    """Continuous batching with chunked prefill, by priority (lower values first), then first come first served.

    Running requests come first; what is left of the step's token budget admits waiting ones. Each leaves a token of the
    budget to every one behind it, so a decode never waits for more than one chunk of somebody's prompt, also not of a
    more urgent one. Less urgent requests wait as long as there are more urgent ones to admit: nothing ages.

    `share_answers` False is for models that compute the rows before a slice's prompt_end in their own way: then only
    those are found by other requests, and the next turn of a chat computes the last answer once more, as a prompt.

    `drafts`: guesses that a step checks for each request, if there is room.
    """

    def __init__(
        self, pool: PagePool, *, max_step_tokens: int, max_running: int, share_answers: bool = True, drafts: int = 0
    ) -> None:
        if max_step_tokens < 1 or max_running < 1:
            raise ValueError("max_step_tokens and max_running must be at least 1")
        self.pool, self.max_step_tokens, self.max_running = pool, max_step_tokens, max_running
        self.share_answers, self.drafts = share_answers, drafts
        self.waiting: list[Request] = []
        """In the order in which they are admitted; those that were preempted before others of their priority."""
        self.running: list[Request] = []
        """The most urgent first, then the oldest: pages are taken from the end."""
        self.live: dict[int, Request] = {}
        self.arriving: dict[int, Request] = {}
        """Requests that hold pages which are being filled from elsewhere. They are not live: no step has them."""
        self.filling = Filling()
        """Requests that wait for a store below memory. They are live, but no step has them."""
        self._spoilt: set[int] = set()
        """Those that found pages in the cache which were then never computed."""
        self.n_preempted = 0
        self.n_drafted = self.n_accepted = 0
        """Guesses that were checked, and those of them that were right."""

    @property
    def busy(self) -> bool:
        """Whether a step could run something, now or when a step in flight has ended."""
        return bool(self.running or self.waiting)

    def add(self, req: Request) -> None:
        """Queue a request. Its rid must never have been used before: results of an aborted one may still come.

        Raises ValueError if it could never run, so that nothing waits for ever.
        """
        self.check(req)
        self.live[req.rid] = req
        _last_of_its_priority(self.waiting, req)

    def check(self, req: Request) -> None:
        """Raise ValueError if this request could never run here."""
        if req.rid in self.live or req.rid in self.arriving:
            raise ValueError(f"request {req.rid} is already known")
        need = self._n_pages(req.n_prompt + req.max_new - 1)
        if need > self.pool.n_pages:
            raise ValueError(f"request {req.rid} needs {need} pages; the cache has {self.pool.n_pages}")

    def reserve(self, req: Request) -> bool:
        """Hold pages for all tokens of a request whose cache will come from elsewhere; False if there is no room now.

        `req.done` positions are found in the own prefix cache and need not come. Requests that were preempted go
        first, unless they are less urgent. Raises ValueError as `add` does.
        """
        self.check(req)
        before = self.waiting and self.waiting[0].priority <= req.priority
        if before or self._n_taken >= self.max_running:
            return False
        found, known = self.pool.match(self.shareable(req), req.salt)
        pages = self.pool.take(self._n_pages(len(req.tokens)) - len(found), found, spare=self._n_taken)
        if pages is None:
            return False
        req.pages, req.known = pages, known
        req.done = req.begun = req.n_cached = len(found) * self.pool.page
        self.arriving[req.rid] = req
        return True

    def adopt(self, rid: int, token: int, filled: bool = True) -> None:
        """Go on with an arriving request after `token`, which was sampled elsewhere from all its tokens.

        `filled`: whether all its pages hold what they should. Raises ValueError if the token ends the request.
        """
        req = self.arriving[rid]
        filled = filled and rid not in self._spoilt
        self._leave_arriving(req)
        req.tokens.append(token)
        if req.finish:
            self._give_back(req)
            raise ValueError(f"request {rid} ends with its first token, so there is nothing to adopt")
        self.live[rid] = req
        if not filled:
            self._give_back(req)
            _last_of_its_priority(self.waiting, req)
            return
        req.done, req.begun = len(req.tokens) - 1, _ADOPTED
        _last_of_its_priority(self.running, req)
        self._publish(req)

    def filled(self, rid: int, end: int) -> None:
        """Go on with a request whose pages the store has filled up to position `end`, of those that were asked for."""
        req, others = self.filling.end(rid)
        self._wait_again(others)
        end = max(end, req.done)
        if not end or rid in self._spoilt:
            self._spoilt.discard(rid)
            self._give_back(req)
            self._wait_again([req])
            return
        keep = self._n_pages(end)
        self.pool.release(req.pages[keep:])
        req.n_cached, req.n_stored = end, end - req.done
        req.pages, req.done, req.begun = req.pages[:keep], end, _ADOPTED
        _last_of_its_priority(self.running, req)
        self._publish(req)

    def plan(self) -> StepPlan:
        """The next step. Empty when nothing can run before a commit, or nothing is left to do."""
        budget, slices = self.max_step_tokens, list[Slice]()
        n_preempted = self.n_preempted
        n_behind = len(self.running)
        for req in list(self.running):  # a victim of preemption is always behind, so never already in `slices`
            n_behind -= 1
            n = min(req.todo, budget, max(budget - n_behind, 1))
            if n and req in self.running and self._grow(req, n):
                slices.append(self._slice(req, n, self._add_drafts(req, n, budget - n - n_behind)))
                budget -= len(slices[-1].tokens)
        if self.n_preempted == n_preempted:  # pages just ran out: admitting now would only preempt again
            while budget and (new := self._admit(budget)):
                slices.append(new)
                budget -= len(new.tokens)
        return StepPlan(tuple(slices))

    def commit(self, plan: StepPlan, new: Mapping[int, Sequence[int]]) -> list[Request]:
        """Take the tokens that `plan` sampled; returns the requests that are finished. Their pages stay held.

        `new`: of each request the token after its last one, then those after the guesses that were right. Those after
        one that ends the request are not taken.
        """
        finished = []
        for s in plan.slices:
            req = self.live.get(s.rid)
            if req is None or not s.sample:  # None: it finished or was aborted while this step ran
                continue
            req.inflight -= 1
            n_before = len(req.tokens)
            for token in new[s.rid]:
                req.tokens.append(token)
                if req.finish:
                    break
            req.drafted = self.drafts > 0
            if s.n_drafts:
                self.n_drafted += s.n_drafts
                self.n_accepted += max(len(req.tokens) - n_before - 1, 0)
                self._drop_rejected(req)
            if req.finish:
                req.done = min(req.done, len(req.tokens) - 1)  # a plan ahead may have its last token, and may be undone
                self._forget(req)
                finished.append(req)
        return finished

    def undo(self, plan: StepPlan) -> None:
        """Take back a plan that was not run and will not be. Of several, the newest first; commit what was run before.

        Each request stands again where the plan found it, except that one which was preempted goes on waiting. No page
        stays findable for what was not computed, also where its request has ended meanwhile.
        """
        for s in reversed(plan.slices):
            page = self.pool.page
            # Who got a page of an ended request has it from a later plan, which is undone by now, or was handed over.
            gone = s.pages[s.start // page : self._n_pages(s.end)]
            self.pool.unpublish(gone)
            self._spoil(gone, s.rid)
            req = self.live.get(s.rid)
            if req is None:
                continue
            req.inflight -= s.sample
            if not req.pages:  # preempted since
                continue
            if s.start == req.begun:
                self._unadmit(req)
                continue
            keep = self._n_pages(s.start)
            self.pool.release(req.pages[keep:])
            req.pages, req.done = req.pages[:keep], s.start
            req.known = Known(0, req.salt)
            self._publish(req)

    def release(self, req: Request) -> None:
        """Give back the pages of a finished request, leaving what it computed findable for the next turn of a chat."""
        self._publish(req)
        self._give_back(req)

    def abort(self, rid: int) -> bool:
        """Drop a request in any state; False if it is not known (any more). Safe while a step that has it runs:
        whoever gets its pages next writes them in a later step, or, if they are filled from elsewhere, after this one.
        Not while pages of its own are being filled."""
        if req := self.arriving.get(rid):
            self._leave_arriving(req)
        elif req := self.live.get(rid):
            self._forget(req)
        else:
            return False
        self._give_back(req)
        return True

    @property
    def _n_taken(self) -> int:
        """Places among the running ones that are taken or promised."""
        return len(self.running) + len(self.arriving) + len(self.filling.holding)

    def _leave_arriving(self, req: Request) -> None:
        del self.arriving[req.rid]
        self._spoilt.discard(req.rid)

    def _spoil(self, pages: Sequence[int], owner: int) -> None:
        """What was to be written into these pages never came: requests from elsewhere that had found them there are
        computed from the beginning. `owner` was to write them."""
        gone = set(pages)
        for req in (*self.arriving.values(), *self.filling.holding.values()):
            if not gone.isdisjoint(req.pages):
                self._spoilt.add(req.rid)
        for req in list(self.running):
            if req.begun == _ADOPTED and req.rid != owner and not gone.isdisjoint(req.pages):
                self._unadmit(req)

    def _forget(self, req: Request) -> None:
        del self.live[req.rid]
        self._spoilt.discard(req.rid)
        if req in self.running:
            self.running.remove(req)
        elif req.rid in self.filling:
            self._wait_again(self.filling.end(req.rid)[1])
        else:
            self.waiting.remove(req)

    def _admit(self, budget: int) -> Slice | None:
        """Move the first waiting request to the running ones, if there is room for it and for its pages. Those before
        it that a store may have the beginning of wait for that instead."""
        while self.waiting and self._n_taken < self.max_running:
            req = self.waiting[0]
            if req.inflight:  # preempted with a sample on its way: its next token is not known yet
                return None
            found, known = self.pool.match(self.shareable(req), req.salt)
            n_cached = len(found) * self.pool.page
            fetch = req.stored > n_cached
            if fetch and self.filling.join(req, n_cached + self.pool.page):
                self.waiting.pop(0)
                continue
            end = req.stored if fetch else n_cached + min(len(req.tokens) - n_cached, budget)
            # A spare page for each running request: without it, their growth would preempt this one in the next step.
            pages = self.pool.take(self._n_pages(end) - len(found), found, spare=self._n_taken)
            if pages is None:
                return None
            req.pages, req.known, req.done, req.begun = pages, known, n_cached, n_cached
            self.waiting.pop(0)
            if fetch:
                self.filling.begin(req)
                continue
            if req.n_cached is None:
                req.n_cached, req.n_stored = n_cached, 0
            _last_of_its_priority(self.running, req)
            return self._slice(req, end - n_cached)
        return None

    def _wait_again(self, reqs: Sequence[Request]) -> None:
        """In this order, before others of their priority."""
        for req in reversed(reqs):
            _first_of_its_priority(self.waiting, req)

    def _unadmit(self, req: Request) -> None:
        """The opposite of `_admit`."""
        self.running.remove(req)
        self._give_back(req)
        _first_of_its_priority(self.waiting, req)
        if len(req.tokens) == req.n_prompt:
            req.n_cached = None  # pages that it found may have been taken back as well

    def _grow(self, req: Request, n: int) -> bool:
        """Get the pages for n more positions, preempting from the last one on; False if req itself had to go."""
        need = self._n_pages(req.done + n) - len(req.pages)
        while (pages := self.pool.take(max(need, 0))) is None:
            victim = self.running.pop()
            self.n_preempted += 1
            self._give_back(victim)
            _first_of_its_priority(self.waiting, victim)
            if victim is req:
                return False
        req.pages += pages
        return True

    def _add_drafts(self, req: Request, n: int, budget: int) -> int:
        """How many guesses are run after its next n tokens, with pages for them. Nobody has to go for their sake."""
        end = req.done + n
        n_drafts = min(self.drafts, budget, req.most - end)
        if n_drafts <= 0 or not req.drafted or req.inflight or end < len(req.tokens):
            return 0
        need = self._n_pages(end + n_drafts) - len(req.pages)
        pages = self.pool.take(need, spare=self._n_taken) if need > 0 else []
        if pages is None:
            return min(n_drafts, len(req.pages) * self.pool.page - end)
        req.pages += pages
        return n_drafts

    def _drop_rejected(self, req: Request) -> None:
        """Go on after its last known token. Positions beyond hold what was guessed in vain."""
        req.done = min(req.done, len(req.tokens) - 1)
        keep = self._n_pages(req.done)
        self.pool.release(req.pages[keep:])
        del req.pages[keep:]

    def _slice(self, req: Request, n: int, n_drafts: int = 0) -> Slice:
        start, req.done = req.done, req.done + n
        sample = req.done == len(req.tokens) + req.inflight
        known = req.tokens[start : req.done]
        tokens = (*known, *[LAST] * (n - len(known)), *[DRAFT] * n_drafts)
        self._publish(req)
        req.done += n_drafts
        req.inflight += sample
        return Slice(req.rid, tokens, start, tuple(req.pages), sample, self._prompt_end(req))

    def _publish(self, req: Request) -> None:
        page, n = self.pool.page, min(req.done, len(req.tokens))
        if not self.share_answers:
            n = min(n, self._prompt_end(req))
        if n // page > req.known.n_pages:
            req.known = self.pool.publish(req.tokens[:n], req.pages, req.known)

    def shareable(self, req: Request) -> list[int]:
        """Tokens whose pages may be another request's, and one more."""
        return req.tokens if self.share_answers else req.tokens[: self._prompt_end(req) + 1]

    def _prompt_end(self, req: Request) -> int:
        """The end of the prompt's whole pages; at least its last token is left over."""
        return (req.n_prompt - 1) // self.pool.page * self.pool.page

    def _give_back(self, req: Request) -> None:
        self.pool.release(req.pages)
        req.pages, req.done, req.known = [], 0, NOTHING_KNOWN

    def _n_pages(self, n: int) -> int:
        return -(-n // self.pool.page)


def _priority(req: Request) -> int:
    return req.priority


def _last_of_its_priority(queue: list[Request], req: Request) -> None:
    queue.insert(bisect_right(queue, req.priority, key=_priority), req)


def _first_of_its_priority(queue: list[Request], req: Request) -> None:
    queue.insert(bisect_left(queue, req.priority, key=_priority), req)
