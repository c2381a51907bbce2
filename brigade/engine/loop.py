"""The one loop of a rank, and the process around it: take messages, plan, run, commit, tell. Must not know HTTP.

`python -m brigade.engine.loop FD` speaks on an inherited socket. The process ends when the other side closes it.
"""

import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from brigade.comm.channel import Channel, ChannelClosed
from brigade.comm.group import Alone, Group, PeerLost
from brigade.core.lockstep import Shape, agree
from brigade.core.pages import PagePool
from brigade.core.request import Request
from brigade.core.scheduler import Scheduler, StepPlan
from brigade.engine import auto
from brigade.engine.messages import (
    Abort,
    Add,
    Failed,
    Loading,
    Logprob,
    Lost,
    Ping,
    Pong,
    Ready,
    Refused,
    Start,
    Stats,
    Step,
    Token,
    ToWorker,
    Wake,
)
from brigade.engine.unit_rank import UnitRank
from brigade.engine.worker import Worker, stop_ids
from brigade.model.sampling import BROKEN, Choice

log = logging.getLogger("brigade.worker")

Run = Callable[..., Any]


class Loop:
    """Drives one scheduler and one worker, in step with the other ranks of `group`.

    `depth` 1 runs a step where it stands; more plans ahead of a running step.

    Everything the worker is told passes through `_do`, in order, so that with a step running behind, a request is
    forgotten only after the steps that still have it.
    """

    def __init__(
        self,
        worker: Worker,
        scheduler: Scheduler,
        channel: "Channel[ToWorker]",
        depth: int,
        group: Group | None = None,
    ) -> None:
        self.worker, self.scheduler, self.channel, self.depth = worker, scheduler, channel, depth
        self.group = group or Alone()
        self.wake = 0
        """Number of the last wake call heard."""
        self.asleep = True
        self.pending: deque[tuple[StepPlan, Future[dict[int, Choice]]]] = deque()
        self.n_steps = 0
        self._behind = ThreadPoolExecutor(1) if depth > 1 else None

    def run(self) -> None:
        """Until the other side closes the channel."""
        try:
            while True:
                self.turn()
        except ChannelClosed:
            return
        finally:
            if self._behind:
                self._behind.shutdown()

    def turn(self) -> None:
        """Once round: sleeps only when no rank has anything to run or to wait for."""
        for message in self.channel.poll(None if self.asleep else 0):
            self.take(message)
        if self.asleep:
            return  # whatever came, the other ranks are asleep too
        plan = self.scheduler.plan()
        mine = Shape(plan.n_tokens, self.scheduler.busy or bool(self.pending), self.wake)
        agreed = agree([Shape(n, bool(busy), wake) for n, busy, wake in self.group.share(mine)])
        if agreed.run:
            self.pending.append((plan, self._do(self.worker.run, plan)))
        if self.pending and (len(self.pending) >= self.depth or not agreed.run):
            self.commit(*self.pending.popleft())
        self.asleep = agreed.sleep

    def take(self, message: ToWorker) -> None:
        match message:
            case Add():
                self.wake, self.asleep = message.wake, False
                self._add(message)
            case Wake(wake):
                self.wake, self.asleep = wake, False
            case Abort(rid):
                if self.scheduler.abort(rid):
                    self._do(self.worker.forget, rid)
            case Ping(seq):
                self.channel.send(Pong(seq, self.stats()))
            case Start():
                raise ValueError("a running worker was told to start")

    def commit(self, plan: StepPlan, result: "Future[dict[int, Choice]]") -> None:
        """Take a step's results into the scheduler and tell them. Raises what the step raised."""
        choices = result.result()
        broken = [rid for rid, c in choices.items() if c.token == BROKEN and self.scheduler.abort(rid)]
        live = {rid: self.scheduler.live[rid] for rid in choices if rid in self.scheduler.live}
        finished = self.scheduler.commit(plan, {rid: c.token for rid, c in choices.items()})
        tokens = [_token(req, choices[rid]) for rid, req in live.items()]
        tokens += [Token(rid, 0, "error") for rid in broken]
        for req in finished:
            self.scheduler.release(req)
        for rid in [req.rid for req in finished] + broken:
            self._do(self.worker.forget, rid)
        self.n_steps += 1
        if plan:
            self.channel.send(Step(tokens, self.stats()))

    def stats(self) -> Stats:
        s = self.scheduler
        return Stats(self.n_steps, len(s.running), len(s.waiting), s.pool.n_pages - s.pool.n_free, s.n_preempted)

    def _add(self, m: Add) -> None:
        req = Request(m.rid, m.prompt, m.params.max_tokens, stop_ids(self.worker.spec, m.params), m.salt)
        try:
            self.scheduler.add(req)
        except ValueError as e:
            self.channel.send(Refused(m.rid, str(e)))
            return
        self._do(self.worker.add, m.rid, m.prompt, m.params)

    def _do(self, what: Run, *args: Any) -> "Future[Any]":
        if self._behind:
            return self._behind.submit(what, *args)
        done: Future[Any] = Future()
        done.set_result(what(*args))
        return done


def _token(req: Request, choice: Choice) -> Token:
    top = [Logprob(token, logprob) for token, logprob in choice.top]
    return Token(req.rid, choice.token, req.finish or "", choice.logprob, top, req.n_cached or 0)


def _start(channel: "Channel[ToWorker]") -> Start:
    messages: list[ToWorker] = []
    while not messages:
        messages = channel.poll(None)
    if not isinstance(messages[0], Start):
        raise ValueError(f"the first message must be Start, not {type(messages[0]).__name__}")
    return messages[0]


def _progress(channel: "Channel[ToWorker]") -> Callable[[int, int], None]:
    """Tells the other side how much is read, at every half per cent."""
    told = -1

    def tell(done: int, total: int) -> None:
        nonlocal told
        if (part := 200 * done // max(total, 1)) > told:
            told = part
            channel.send(Loading(done, total))

    return tell


def main(fd: int) -> int:
    """The worker process. Exit code 0 when told to end, 2 when the model cannot be loaded, 3 when another rank of the
    unit is lost."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the channel when it is done
    logging.basicConfig(level=os.environ.get("BRIGADE_LOG_LEVEL", "WARNING"), stream=sys.stderr)
    channel: Channel[ToWorker] = Channel(socket.socket(fileno=fd), ToWorker)
    try:
        start = _start(channel)
        config = start.config
        try:
            unit = UnitRank(start.rank, config.ranks, start.segment, config.rank_deadline)
            worker, resolved = Worker.load(config, auto.this_machine(), _progress(channel), unit)
            worker.warm_up()
        except (ValueError, MemoryError) as e:
            channel.send(Failed(str(e)))
            return 2
        pool = PagePool(resolved.n_pages, config.page)
        scheduler = Scheduler(pool, max_step_tokens=config.max_step_tokens, max_running=config.max_running)
        channel.send(Ready(resolved.n_pages, config.page, resolved.max_context, resolved.notes))
        Loop(worker, scheduler, channel, config.depth, unit.group).run()
    except PeerLost as e:
        with suppress(ChannelClosed):  # when a unit ends, its ranks are stopped after their channels
            channel.send(Lost(list(e.ranks), str(e)))
        return 3
    except ChannelClosed:
        log.info("the channel was closed; ending")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
