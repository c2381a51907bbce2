"""Runs scheduler and model together in one process: the loop of the engine, without processes or messages."""

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from brigade.core.pages import PagePool
from brigade.core.request import Request
from brigade.core.scheduler import Scheduler, Slice, StepPlan
from brigade.engine.worker import MODELS, Worker
from brigade.model.batch import build
from brigade.model.cache import KvCache
from brigade.model.weights import Checkpoint
from brigade.spec.config import read_spec
from brigade.spec.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=1)


class Served(NamedTuple):
    texts: list[list[int]]
    """New tokens of each request."""
    scheduler: Scheduler
    requests: list[Request]


def load(folder: Path, n_pages: int = 64, page: int = 8, context: int = 512, drafts: int = 0) -> Worker:
    spec = read_spec(folder, drafts)
    weights = Checkpoint(folder, spec).load(torch.float32)
    model = MODELS[spec.architecture](spec, weights)
    model.attach(KvCache(spec, n_pages, page, torch.float32), context)
    return Worker(spec, model, page, {})


@torch.inference_mode()
def logits(worker: Worker, tokens: list[int], start: int = 0, prompt_end: int = 0) -> torch.Tensor:
    """Logits of every position of tokens[start:], the ones before being cached already; pages are used backwards."""
    pages = tuple(range(worker.model.cache.layers.shape[1]))[::-1]
    table = pages[: -(-len(tokens) // worker.page)]
    plan = StepPlan((Slice(0, tuple(tokens[start:]), start, table, True, prompt_end),))
    batch = build(plan, worker.page, {})
    every_row = replace(batch, sample_R=torch.arange(len(tokens) - start))
    return worker.model.forward(every_row)


def generate(
    worker: Worker,
    prompts: list[list[int]],
    n_new: list[int],
    *,
    params: SamplingParams = GREEDY,
    stop_ids: frozenset[int] = frozenset(),
    n_pages: int = 64,
    max_step_tokens: int = 64,
    max_running: int = 8,
    depth: int = 1,
    arrive_every: int = 0,
) -> Served:
    """Serve all prompts. With depth 2 and more, plans are made before results are known."""
    sched = Scheduler(
        PagePool(n_pages, worker.page),
        max_step_tokens=max_step_tokens,
        max_running=max_running,
        share_answers=not worker.model.two_forms,
        drafts=int(worker.spec.drafting),
    )
    requests = [Request(i, list(p), n, stop_ids) for i, (p, n) in enumerate(zip(prompts, n_new, strict=True))]
    arriving, pending, turn = deque(requests), deque[tuple[StepPlan, dict[int, list[int]]]](), 0
    worker.histories.clear()
    while arriving or sched.busy or pending:
        while arriving and (not arrive_every or turn % arrive_every == 0):
            req = arriving.popleft()
            sched.add(req)
            worker.add(req.rid, req.tokens[:], params)
            if arrive_every:
                break
        turn += 1
        plan = sched.plan()
        if plan:
            pending.append((plan, {rid: [c.token for c in cs] for rid, cs in worker.run(plan).items()}))
        if pending and (len(pending) >= depth or not plan):
            for done in sched.commit(*pending.popleft()):
                sched.release(done)
    assert sched.pool.n_free == n_pages
    return Served([r.tokens[r.n_prompt :] for r in requests], sched, requests)
