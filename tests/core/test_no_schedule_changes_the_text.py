"""Chunks, batches, prefix reuse, preemption, aborts and planning ahead change the plans, never the tokens.

Each run also checks, after every step, that no page is lost and that the scheduler's account agrees with the plans in
flight. The last tests put bugs in, to see that these tests can fail.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from brigade.core.pages import Known, PagePool
from brigade.core.request import Request
from brigade.core.scheduler import Scheduler, Slice
from tests.core.fake_rank import Load, Run, alone, play, random_load


def check_text(load: Load, run: Run) -> None:
    assert run.tokens.keys() == set(range(len(load.requests))) - run.aborted
    for i, tokens in run.tokens.items():
        prompt, max_new, stops, _ = load.requests[i]
        assert tokens == alone(prompt, max_new, stops), f"request {i}"


@pytest.mark.parametrize("seed", range(60))
def test_every_request_says_what_it_says_alone(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(10):
        load = random_load(rng)
        check_text(load, play(load))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_loads_above_really_preempt_reuse_abort_and_end_late(depth: int) -> None:
    runs = []
    for seed in range(40):
        runs.append(play(replace(random_load(random.Random(seed)), depth=depth), check=False))
    assert sum(r.n_preempted > 0 for r in runs) >= 5
    assert sum(r.n_cached > 0 for r in runs) >= 10
    assert sum(len(r.aborted) > 0 for r in runs) >= 10
    assert sum(r.n_late > 0 for r in runs) >= (10 if depth > 1 else 0)


@pytest.mark.parametrize("seed", range(20))
def test_one_load_says_the_same_on_every_machine(seed: int) -> None:
    rng = random.Random(1000 + seed)
    load = random_load(rng, aborts=False)
    want = play(load).tokens
    for depth in (1, 2, 3):
        other = replace(
            load,
            depth=depth,
            max_step_tokens=rng.randint(1, 40),
            max_running=rng.randint(1, 14),
            n_pages=load.n_pages + rng.randint(0, 20),
            arrivals=[rng.randrange(12) for _ in load.arrivals],
        )
        assert play(other).tokens == want


@pytest.mark.parametrize("seed", range(20))
def test_every_request_ends_also_where_only_one_fits(seed: int) -> None:
    """play() gives up after a number of steps that is linear in the tokens asked for."""
    rng = random.Random(2000 + seed)
    load = random_load(rng, aborts=False)
    need = max(-(-(len(p) + m - 1) // load.page) for p, m, _, _ in load.requests)
    load = replace(load, n_pages=need, max_running=16, arrivals=[0] * len(load.requests))
    check_text(load, play(load))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_identical_prompts_say_the_same(depth: int) -> None:
    prompt = [1, 0, 2, 3, 1, 1, 0, 4, 5]
    load = Load(
        page=2,
        n_pages=40,
        max_step_tokens=16,
        max_running=8,
        depth=depth,
        requests=[(prompt, 9, frozenset[int](), "")] * 8,
        arrivals=[0] * 8,
    )
    run = play(load)
    assert set(map(tuple, run.tokens.values())) == {tuple(alone(prompt, 9))}
    assert run.n_cached == 7 * 8


@pytest.mark.parametrize("seed", range(10))
def test_without_preemption_only_what_is_not_cached_is_computed(seed: int) -> None:
    rng = random.Random(3000 + seed)
    load = random_load(rng, aborts=False)
    load = replace(
        load,
        n_pages=500,
        requests=[(p, m, frozenset[int](), salt) for p, m, _, salt in load.requests],
    )
    run = play(load)
    assert run.n_preempted == 0
    assert run.n_computed == sum(len(p) + m - 1 for p, m, _, _ in load.requests) - run.n_cached


# Drafts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_guesses_change_no_text(seed: int) -> None:
    """Also where a right one is a stop id or the last token, where pages run out for their sake, and where results are
    late."""
    rng = random.Random(5000 + seed)
    for drafts in (1, 1, 2, 3):
        load = random_load(rng)
        check_text(load, play(load, drafts=drafts))
    check_text(load := chats(seed), play(load, drafts=2))


def test_the_loads_above_really_accept_and_reject_guesses() -> None:
    runs = [play(random_load(random.Random(seed)), drafts=2, check=False) for seed in range(60)]
    n_drafted, n_accepted = sum(r.n_drafted for r in runs), sum(r.n_accepted for r in runs)
    assert 0.2 * n_drafted < n_accepted < 0.8 * n_drafted
    assert sum(r.n_preempted > 0 and r.n_accepted > 0 for r in runs) >= 2


def test_right_guesses_save_steps() -> None:
    load = Load(4, 99, 64, 8, 1, [([1, 2, 3], 40, frozenset[int](), "")], [0])
    without, with_drafts = play(load), play(load, drafts=1)
    assert with_drafts.tokens == without.tokens
    assert with_drafts.n_steps == without.n_steps - with_drafts.n_accepted


class KeepsRejectedGuesses(Scheduler):
    """Goes on after what was guessed in vain, as if it had been right."""

    def _drop_rejected(self, req: Request) -> None:
        pass


class TakesTokensAfterTheEnd(Scheduler):
    def commit(self, plan, new):  # type: ignore[no-untyped-def]
        before = {s.rid: len(self.live[s.rid].tokens) for s in plan.slices if s.rid in self.live}
        finished = super().commit(plan, new)
        for req in finished:
            req.tokens[before[req.rid] :] = new[req.rid]
        return finished


@pytest.mark.parametrize("bug", [KeepsRejectedGuesses, TakesTokensAfterTheEnd], ids=lambda bug: bug.__name__)
def test_the_text_shows_a_bug_in_checking_guesses(bug: type[Scheduler]) -> None:
    def is_found(seed: int) -> bool:
        load = random_load(random.Random(seed))
        try:
            check_text(load, play(load, check=False, drafts=2, make_scheduler=bug))
        except (AssertionError, ValueError, IndexError, KeyError):
            return True
        return False

    assert any(is_found(seed) for seed in range(200))


# Ranks that compute prompts and answers in two forms ---------------------------------------------------------------


def chats(seed: int) -> Load:
    """Prompts, and prompts that go on where the answer of another one went, as the next turn of a chat does."""
    rng = random.Random(4000 + seed)
    load = random_load(rng, aborts=False)
    turns = []
    for i, (prompt, n, stops, salt) in enumerate(load.requests):
        if turns and rng.random() < 0.5:
            before, _, _, _ = load.requests[rng.randrange(i)]
            prompt = alone(before, rng.randint(1, 14), page=load.page) + [
                rng.randrange(2) for _ in range(rng.randint(0, 3))
            ]
        turns.append((prompt, n, stops, salt))
    need = max(-(-(len(p) + m - 1) // load.page) for p, m, _, _ in turns)
    return replace(load, requests=turns, n_pages=need + rng.choice((0, 2, 8 * need)))


def texts_are_those_alone(load: Load, **how: Any) -> bool:
    run = play(load, two_forms=True, check=False, **how)
    return all(
        run.tokens[i] == alone(prompt, n, stops, load.page) for i, (prompt, n, stops, _) in enumerate(load.requests)
    )


@pytest.mark.parametrize("seed", range(20))
def test_prompts_and_answers_may_be_computed_in_two_forms(seed: int) -> None:
    for i in range(10):
        assert texts_are_those_alone(chats(10 * seed + i), share_answers=False)


def shows(load: Load, **how: Any) -> bool:
    """Whether a text, or what a request leaves in its pages, is not what it should be."""
    try:
        return not texts_are_those_alone(load, **how)
    except AssertionError:
        return True


def test_answers_that_are_shared_in_spite_of_two_forms_would_be_seen() -> None:
    assert any(shows(chats(seed)) for seed in range(40))


class TakesAPromptForAnAnswer(Scheduler):
    """Publishes only prompts, but finds them also where the request itself has an answer."""

    def shareable(self, req: Request) -> list[int]:
        return req.tokens


def test_prompts_that_are_taken_for_answers_would_be_seen() -> None:
    how = {"share_answers": False, "make_scheduler": TakesAPromptForAnAnswer}
    assert any(shows(chats(seed), **how) for seed in range(400))


# Bugs put in on purpose ----------------------------------------------------------------------------------------------


class PublishesUnfilledPages(Scheduler):
    def _slice(self, req: Request, n: int, n_drafts: int = 0) -> Slice:
        before, req.done = req.done, len(req.pages) * self.pool.page
        self._publish(req)
        req.done = before
        return super()._slice(req, n, n_drafts)

    def _grow(self, req: Request, n: int) -> bool:
        return super()._grow(req, max(n, len(req.tokens) - req.done))


class GivesBackTooMuch(Scheduler):
    """Gives back the first page of a request that goes on."""

    def plan(self):  # type: ignore[no-untyped-def]
        for req in self.running:
            if len(req.tokens) == req.n_prompt + 2 and not req.inflight:
                self.pool.release(req.pages[:1])
        return super().plan()


class ForgetsWhatIsOnItsWay(Scheduler):
    """Resumes a preempted request although a token of its is not known yet."""

    def _admit(self, budget: int) -> Slice | None:
        if self.waiting and self.waiting[0].inflight:
            self.waiting[0].inflight = 0
        return super()._admit(budget)


class KeepsWhatItGaveBack(Scheduler):
    """Resumes a preempted request where it was, as if its new pages held its tokens."""

    def _give_back(self, req: Request) -> None:
        self._done = {**getattr(self, "_done", {}), req.rid: req.done}
        super()._give_back(req)

    def _admit(self, budget: int) -> Slice | None:
        s = super()._admit(budget)
        done = getattr(self, "_done", {}).get(s.rid, 0) if s else 0
        return replace(s, tokens=s.tokens[done - s.start :], start=done) if s and s.start < done < s.end else s


class ComparesHashesOnly(PagePool):
    def match(self, tokens: Sequence[int], salt: str = "") -> tuple[list[int], Known]:
        return super().match([t % 2 for t in tokens], salt)

    def publish(self, tokens: Sequence[int], pages: Sequence[int], known: Known) -> Known:
        return super().publish([t % 2 for t in tokens], pages, known)


class ForgetsNothing(PagePool):
    """An overwritten page stays findable under its old prefix."""

    def _fresh(self) -> int:
        self._prefix_of.clear()
        return super()._fresh()


class IgnoresTheParent(PagePool):
    def match(self, tokens: Sequence[int], salt: str = "") -> tuple[list[int], Known]:
        pages = []
        for end in range(self.page, len(tokens), self.page):
            hit = [p for (_, own), (p, _) in self._found.items() if own == tuple(tokens[end - self.page : end])]
            if not hit:
                break
            pages.append(hit[0])
        return pages, Known(len(pages), salt)


BROKEN_SCHEDULERS = [PublishesUnfilledPages, GivesBackTooMuch, ForgetsWhatIsOnItsWay, KeepsWhatItGaveBack]
BROKEN_POOLS = [ComparesHashesOnly, ForgetsNothing, IgnoresTheParent]


@pytest.mark.parametrize("bug", [*BROKEN_SCHEDULERS, *BROKEN_POOLS], ids=lambda bug: bug.__name__)
def test_the_text_shows_a_bug_that_was_put_in(bug: type) -> None:
    """Without the checks after each step: the text alone must show it."""
    broken = {"make_scheduler": bug} if bug in BROKEN_SCHEDULERS else {"make_pool": bug}

    def is_found(seed: int) -> bool:
        load = random_load(random.Random(seed))
        try:
            check_text(load, play(load, check=False, **broken))
        except (AssertionError, ValueError, IndexError, KeyError):
            return True
        return False

    assert any(is_found(seed) for seed in range(200))


class IgnoresTheSalt(PagePool):
    def match(self, tokens: Sequence[int], salt: str = "") -> tuple[list[int], Known]:
        return super().match(tokens, "")

    def publish(self, tokens: Sequence[int], pages: Sequence[int], known: Known) -> Known:
        return super().publish(tokens, pages, Known(known.n_pages, "" if isinstance(known.node, str) else known.node))


def tables_by_salt(make_pool: type[PagePool]) -> list[set[int]]:
    sched = Scheduler(make_pool(16, 2), max_step_tokens=64, max_running=4)
    for rid, salt in enumerate(("a", "b")):
        sched.add(Request(rid, [1, 2, 3, 4, 5], max_new=3, salt=salt))
    return [set(s.pages) for s in sched.plan().slices]


def test_a_pool_that_ignores_the_salt_would_be_seen() -> None:
    a, b = tables_by_salt(PagePool)
    assert not a & b
    a, b = tables_by_salt(IgnoresTheSalt)
    assert a & b


def play_all(loads: list[Load], **how: Any) -> None:
    for load in loads:
        play(load, **how)


class ReleasesAtTheEnd(Scheduler):
    """Gives pages back when a request ends, not when it is released."""

    def commit(self, plan, new):  # type: ignore[no-untyped-def]
        finished = super().commit(plan, new)
        for req in finished:
            self._give_back(req)
        return finished


def test_pages_given_back_before_their_release_would_be_seen() -> None:
    loads = [replace(random_load(random.Random(seed), aborts=False), hold=3) for seed in range(40)]
    with pytest.raises(AssertionError, match="before their release"):
        play_all(loads, make_scheduler=ReleasesAtTheEnd, check=False)


class LosesAPage(Scheduler):
    def abort(self, rid: int) -> bool:
        if rid in self.live:
            self.live[rid].pages = self.live[rid].pages[:-1]
        return super().abort(rid)


def test_a_page_lost_by_an_abort_would_be_seen() -> None:
    loads = [random_load(random.Random(seed)) for seed in range(40)]
    with pytest.raises(AssertionError):
        play_all(loads, make_scheduler=LosesAPage)
