"""The one loop of a rank, and the process around it: take messages, plan, run, commit, tell. Must not know HTTP.

`python -m brigade.engine.loop FD` speaks on an inherited socket. The process ends when the other side closes it.
"""

import ctypes
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from brigade.comm.channel import Channel, ChannelClosed
from brigade.comm.group import Alone, Group, PeerLost
from brigade.core.laps import Laps
from brigade.core.lockstep import Shape, agree
from brigade.core.overlap import Overlap, Way
from brigade.core.pages import PagePool
from brigade.core.request import Request
from brigade.core.scheduler import Scheduler, StepPlan
from brigade.engine import auto
from brigade.engine.fingerprint import fingerprint
from brigade.engine.handing import Handing
from brigade.engine.membership import Membership
from brigade.engine.messages import (
    Abort,
    Add,
    Adopt,
    Failed,
    Follow,
    Form,
    Loaded,
    Loading,
    Logprob,
    Lost,
    Ping,
    Pong,
    Portion,
    Ready,
    Record,
    Refused,
    Reserve,
    Rouse,
    Start,
    Stats,
    Step,
    TellLoads,
    TellSpans,
    Token,
    ToWorker,
    Wake,
)
from brigade.engine.recorded import Recorded
from brigade.engine.storing import Storing
from brigade.engine.unit_rank import UnitRank
from brigade.engine.worker import Worker, Wrote, stop_ids
from brigade.model.sampling import BROKEN, Choice

log = logging.getLogger("brigade.worker")

_PR_SET_PDEATHSIG = 1

Run = Callable[..., Any]
Told = TypeVar("Told", Start, Form)


class Loop:
    """Drives one scheduler and one worker, in step with the other ranks of its unit.

    `depth` 1 runs a step where it stands; more plans ahead of a running step.

    Everything the worker is told passes through `_do`, in order, so that with a step running behind, a request is
    forgotten only after the steps that still have it.

    When another rank is lost, the steps that were not finished are taken back, newest first, and the loop does nothing
    but take messages until Form calls the unit together again.
    """

    def __init__(
        self,
        worker: Worker,
        scheduler: Scheduler,
        channel: "Channel[ToWorker]",
        depth: int,
        membership: Membership | None = None,
        micro_batches: int = 1,
        handing: Handing | None = None,
        storing: Storing | None = None,
        recorded: Recorded | None = None,
    ) -> None:
        """`membership`: of a unit that has been formed; None for a worker that runs alone. `micro_batches`: of a step,
        0 to choose while running. `handing`: how prompts come from other units or go there, if they do. `storing`:
        what is kept on disk, if anything is. `recorded`: of a worker that times the parts of its steps."""
        self.worker, self.scheduler, self.channel, self.depth = worker, scheduler, channel, depth
        self.membership, self.handing, self.storing = membership, handing, storing
        self.group: Group = membership.group if membership else Alone()
        self.whole = True
        """False from the loss of another rank until the next Form."""
        self.wake = 0
        """Number of the last wake call heard since the unit was formed."""
        self._called = -1
        """The last wake call heard before this rank asked for another one."""
        self.asleep = membership is None
        """A unit that was just formed is awake: any of its ranks may have requests."""
        self.pending: deque[tuple[StepPlan, Future[dict[int, list[Choice]]]]] = deque()
        self.n_steps = 0
        self._behind = ThreadPoolExecutor(1) if depth > 1 else None
        self._lost: PeerLost | None = None
        self._micro_batches = micro_batches
        self.overlap = Overlap(micro_batches)
        self._ways: deque[Way] = deque()
        """How the steps in `pending` run."""
        self._times: deque[int] = deque()
        """Microseconds of those that are done."""
        self.recorded = recorded or Recorded(Laps(time.monotonic_ns))
        if handing:
            handing.laps = self.recorded.turns
            handing.steps = partial(self._do, _nothing) if self._behind else None
        self._told, self._took = Way(1, 0), 0
        """The last committed step and its microseconds; 0: told already. All ranks commit in step."""

    def run(self) -> None:
        """Until the other side closes the channel."""
        try:
            while True:
                self.turn()
        except ChannelClosed:
            return
        finally:
            n, right = self.scheduler.n_drafted, self.scheduler.n_accepted
            if n:
                log.info("%d of %d drafts were right (%.0f %%)", right, n, 100 * right / n)
            if self._behind:
                self._behind.shutdown()
            if self.worker.mover:
                self.worker.mover.close()
            if self.handing:
                self.handing.close()
            if self.storing:
                self.storing.close()

    def turn(self) -> None:
        """Once round: waits for messages only when no rank has anything to run or to wait for, or one is lost."""
        for message in self.channel.poll(0 if self.whole and not self.asleep else self._rests):
            self.take(message)
        if self.handing:
            for adopted in self.handing.turn():
                self._do(self.worker.add, *adopted)
                self.asleep = self.asleep and not isinstance(self.group, Alone)  # others are woken by Wake
        if self.storing:
            self.storing.turn()
            self._rouse()
        if self.asleep or not self.whole:
            return  # whatever came, the other ranks do not run either
        try:
            self.step()
        except PeerLost as e:
            self._tell(e)
            self.roll_back()

    def _rouse(self) -> None:
        """Wake up, with all other ranks, if a request can run that could not when the unit went to sleep."""
        if not self.asleep or not self.scheduler.busy:
            return
        if isinstance(self.group, Alone):
            self.asleep = False
        elif self._called != self.wake:
            self._called = self.wake
            self.channel.send(Rouse())

    def step(self) -> None:
        """Plan, agree with the other ranks, run, and commit what is due. Raises PeerLost."""
        turns = self.recorded.turns
        self.recorded.turn()
        plan = self.scheduler.plan()
        turns.end("schedule")
        if self.storing and self.scheduler.filling.begun:
            self.storing.begin(self._do(_nothing))
        mover = self.worker.mover
        staged = mover.staged if mover else 0
        mine = Shape(plan.n_tokens, self.scheduler.busy or bool(self.pending), self.wake, staged, self._took)
        try:
            shapes = [Shape(n, bool(busy), *rest) for n, busy, *rest in self._share(mine)]
        except PeerLost:
            self.scheduler.undo(plan)
            raise
        agreed = agree(shapes)
        turns.end("agree")
        if self._took:
            self.overlap.learn(self._told, max(s.took for s in shapes))
            self._took = 0
        if agreed.portion and mover:
            self._do(mover.agreed(agreed.portion))
        if agreed.run:
            way = self.overlap.choose(max(s.n_tokens for s in shapes))
            self._ways.append(way)
            wrote = self.handing.planned(plan) if self.handing else None
            self.pending.append((plan, self._do(self._run, plan, way.n, wrote)))
        turns.begin()
        if self.pending and (len(self.pending) >= self.depth or not agreed.run):
            self._commit_oldest()
            turns.end("commit")
        self.asleep = agreed.sleep

    def take(self, message: ToWorker) -> None:
        match message:
            case Add():
                self.wake, self.asleep = message.wake, False
                self._add(message)
            case Wake(wake):
                self.wake, self.asleep = wake, False
            case Abort(rid):
                known = self.scheduler.live.get(rid)
                if self.handing and self.handing.drop(rid):
                    return
                if self.storing:
                    self.storing.drop(rid)
                if self.scheduler.abort(rid) and known:
                    self._do(self.worker.forget, rid)
            case Reserve() | Follow() | Adopt():
                if self.handing is None:
                    raise ValueError("a worker that runs alone was told to take a prompt from another one")
                self.handing.take(message)
            case Ping(seq):
                self.channel.send(Pong(seq, self.stats(), time.monotonic_ns()))
            case Record(seconds, most):
                self.recorded.record(seconds, most)
            case TellSpans(seq):
                for portion in self.recorded.tell(seq):
                    self.channel.send(portion)
            case Form():
                self.form(message)
            case Portion():
                if self.worker.mover is None:
                    raise ValueError("a worker that has all experts was told to move some")
                self.worker.mover.take(message, self.channel.send)
            case TellLoads(seq):
                self.channel.send(self.worker.loads(seq))
            case Start():
                raise ValueError("a running worker was told to start")

    def form(self, form: Form) -> None:
        """Meet the others in a new generation. All ranks take Form between the same two wake calls, so all count them
        from 0 again."""
        if self.membership is None:
            raise ValueError("a worker that runs alone was told to form a unit")
        self.roll_back()
        self._forget_times()
        if self.worker.mover:
            self._do(self.worker.mover.hold, form.portion).result()
        self.wake, self._called, self.asleep = 0, -1, False
        try:
            ready = self.membership.form(form)
        except PeerLost as e:
            self._tell(e)
            return
        self.whole, self.group = True, self.membership.group
        self.channel.send(ready)

    def roll_back(self) -> None:
        """Commit the steps in flight that were finished and take back the others, as if they had not been planned.

        Waits for a step that runs: its own waits end when the generation is stopped, or at the deadline.
        """
        while self.pending and not isinstance(self.pending[0][1].exception(), PeerLost):
            self._commit_oldest()
        while self.pending:
            plan, result = self.pending.pop()
            result.exception()
            self.scheduler.undo(plan)
        if self.handing:
            self.handing.rolled_back()
        self._lost = None

    def _share(self, mine: Shape) -> list[tuple[int, ...]]:
        """Over a network, a step that runs behind and the agreement on the next one take turns: they share one wire."""
        if self.membership is not None and self.membership.one_wire:
            shared: list[tuple[int, ...]] = self._do(self.group.share, mine).result()
            return shared
        return self.group.share(mine)

    def _tell(self, e: PeerLost) -> None:
        self.whole = False
        generation = self.membership.generation if self.membership else 0
        self.channel.send(Lost(list(e.ranks), str(e), generation))

    def _commit_oldest(self) -> None:
        self.commit(*self.pending[0])
        self.pending.popleft()
        self._told, self._took = self._ways.popleft(), max(self._times.popleft(), 1)

    def _forget_times(self) -> None:
        """Choose micro-batches anew, as a rank that joins now does: all ranks must choose alike."""
        self.overlap, self._took = Overlap(self._micro_batches), 0
        self._ways.clear()
        self._times.clear()

    def _run(self, plan: StepPlan, n: int, wrote: Wrote | None) -> dict[int, list[Choice]]:
        """A step after one that was given up would compute from what that one left out."""
        if self._lost is not None:
            raise self._lost
        try:
            begin = time.monotonic()
            choices = self.worker.run(plan, n, wrote)
        except PeerLost as e:
            self._lost = e
            raise
        self._times.append(int(1e6 * (time.monotonic() - begin)))
        self.recorded.ran(begin, plan, n)
        return choices

    def commit(self, plan: StepPlan, result: "Future[dict[int, list[Choice]]]") -> None:
        """Take a step's results into the scheduler and tell them. Raises what the step raised."""
        choices = result.result()
        broken = [rid for rid, (first, *_) in choices.items() if first.token == BROKEN and self.scheduler.abort(rid)]
        live = [self.scheduler.live[rid] for rid in choices if rid in self.scheduler.live]
        before = [len(req.tokens) for req in live]
        finished = self.scheduler.commit(plan, {rid: [c.token for c in cs] for rid, cs in choices.items()})
        if self.storing:
            self._store(live)
        new = {req.rid: _tokens(req, choices[req.rid], n) for req, n in zip(live, before, strict=True)}
        held = {req.rid for req in finished if self.handing and self.handing.hold(req, new[req.rid][-1])}
        tokens = [token for rid, some in new.items() if rid not in held for token in some]
        tokens += [Token(rid, 0, "error") for rid in broken]
        for req in finished:
            if req.rid not in held:
                self.scheduler.release(req)
        for rid in [req.rid for req in finished] + broken:
            self._do(self.worker.forget, rid)
        if self.handing:
            for rid in broken:
                self.handing.drop(rid)
        self.n_steps += 1
        if plan:
            self.channel.send(Step(tokens, self.stats()))

    def stats(self) -> Stats:
        s = self.scheduler
        reserved, offered = self.handing.pages if self.handing else (0, 0)
        used = s.pool.n_pages - s.pool.n_free
        waiting = len(s.waiting) + len(s.filling)
        store = self.storing.stats if self.storing else None
        return Stats(
            self.n_steps,
            len(s.running),
            waiting,
            used,
            s.n_preempted,
            reserved,
            offered,
            store,
            s.n_drafted,
            s.n_accepted,
        )

    @property
    def _rests(self) -> float | None:
        """Seconds after which the loop must come round again although nothing runs; None: only when told something."""
        rests = [x.rests for x in (self.handing, self.storing) if x]
        return min((seconds for seconds in rests if seconds is not None), default=None)

    def _store(self, reqs: Iterable[Request]) -> None:
        """Keep the prompts of those that got their first token, and where answers are shared, those of the finished."""
        assert self.storing is not None
        for req in reqs:
            if len(req.tokens) == req.n_prompt + 1 or (req.finish and self.scheduler.share_answers):
                self.storing.computed(req)

    def _add(self, m: Add) -> None:
        n_prompt = m.n_prompt or len(m.prompt)
        n_new = len(m.prompt) - n_prompt
        most = n_new + 1 if m.hold >= 0 else m.params.max_tokens
        stops = stop_ids(self.worker.spec, m.params)
        try:
            req = Request(m.rid, m.prompt, most, stops, m.salt, n_prompt=n_prompt, priority=m.priority)
            if self.storing:
                self.storing.look(req)
            self.scheduler.add(req)
        except ValueError as e:
            self.channel.send(Refused(m.rid, str(e)))
            return
        if m.hold >= 0 and self.handing and n_new + 1 < m.params.max_tokens:
            self.handing.expect(m.rid, m.hold)
        self._do(self.worker.add, m.rid, m.prompt[:n_prompt], m.params, *([m.prompt[n_prompt:]] if n_new else []))

    def _do(self, what: Run, *args: Any) -> "Future[Any]":
        if self._behind:
            return self._behind.submit(what, *args)
        done: Future[Any] = Future()
        try:
            done.set_result(what(*args))
        except PeerLost as e:
            done.set_exception(e)
        return done


def _tokens(req: Request, choices: Sequence[Choice], n_before: int) -> list[Token]:
    """Those of a step that the request has taken: it had `n_before`, and may have ended before the last choice."""
    n = len(req.tokens) - n_before
    out = []
    for i, choice in enumerate(choices[:n], 1):
        top = [Logprob(token, logprob) for token, logprob in choice.top]
        finish = req.finish or "" if i == n else ""
        out.append(Token(req.rid, choice.token, finish, choice.logprob, top, req.n_cached or 0, req.n_stored))
    return out


def _nothing() -> None:
    """Done when all before it is."""


def _first(channel: "Channel[ToWorker]", kind: type[Told]) -> Told:
    """Wait for the next message, which must be of that kind. Of several the last one counts."""
    messages: list[ToWorker] = []
    while not messages:
        messages = channel.poll(None)
    for message in messages:
        if not isinstance(message, kind):
            raise ValueError(f"{kind.__name__} was due, not {type(message).__name__}")
    return cast(Told, messages[-1])


def _join(channel: "Channel[ToWorker]", membership: Membership) -> Ready:
    """Wait for Form and meet the others; again each time one of them is lost meanwhile."""
    while True:
        form = _first(channel, Form)
        try:
            return membership.form(form)
        except PeerLost as e:
            channel.send(Lost(list(e.ranks), str(e), form.generation))


def _progress(channel: "Channel[ToWorker]") -> Callable[[int, int], None]:
    """Tells the other side how much is read, at every half per cent."""
    told = -1

    def tell(done: int, total: int) -> None:
        nonlocal told
        if (part := 200 * done // max(total, 1)) > told:
            told = part
            channel.send(Loading(done, total))

    return tell


def _end_with_parent() -> None:
    """Have the system end this process when its parent has ended: one that stands still, or is inside a long step, does
    not see that its channel was closed. Elsewhere than on Linux the channel must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(fd: int) -> int:
    """The worker process. Exit code 0 when told to end, 2 when the model cannot be loaded."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the channel when it is done
    _end_with_parent()
    logging.basicConfig(level=os.environ.get("BRIGADE_LOG_LEVEL", "WARNING"), stream=sys.stderr)
    channel: Channel[ToWorker] = Channel(socket.socket(fileno=fd), ToWorker)
    try:
        start = _first(channel, Start)
        config = start.config
        try:
            unit = UnitRank.of(start)
            where = start.placement, start.portion
            worker = Worker.read(config, auto.this_machine().part(unit.n_sharing), _progress(channel), unit, *where)
            if start.kv is not None and start.kv.files:
                worker.kv_file = start.kv.files[start.kv.first + start.rank]
            checkpoint = fingerprint(Path(config.model)) if config.kv_disk else b""
            channel.send(Loaded(unit.port))
            membership = Membership(config, unit, worker)
            ready = _join(channel, membership)
            scheduler = Scheduler(
                PagePool(ready.n_pages, config.page),
                max_step_tokens=config.max_step_tokens,
                max_running=config.max_running,
                share_answers=not worker.model.two_forms,
                drafts=config.drafts,
            )
            handing = None if start.kv is None else Handing.of(start.kv, start.rank, worker, scheduler, channel)
            storing = Storing.of(config, checkpoint, worker, scheduler) if config.kv_disk else None
        except (ValueError, MemoryError) as e:
            channel.send(Failed(str(e)))
            return 2
        if storing:
            ready.notes.append(storing.note)
        channel.send(ready)
        micro_batches = config.micro_batches if worker.wire and unit.size > 1 else 1
        recorded = Recorded(worker.model.laps)
        Loop(worker, scheduler, channel, config.depth, membership, micro_batches, handing, storing, recorded).run()
    except ChannelClosed:
        log.info("the channel was closed; ending")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
