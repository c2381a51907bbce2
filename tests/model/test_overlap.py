"""A step in two micro-batches says what it says in one, bit by bit on the C++ kernels, also where one reads what the
other writes."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from brigade.core.overlap import cut
from brigade.core.scheduler import Slice, StepPlan
from brigade.engine import auto
from brigade.engine.config import EngineConfig
from brigade.engine.worker import Worker
from brigade.model.batch import build
from brigade.model.on_cpu_kernels import CpuModel
from brigade.model.overlap import in_turn
from tests.model.checkpoints import VOCAB
from tests.model.conftest import Made
from tests.model.driving import generate
from tests.model.test_deepseek_cpu import WIDE
from tests.model.test_schedules import workload

WIRE = "bf16"
"""Any that rounds: so that one rank has an exchange."""


@pytest.fixture(scope="module", params=["auto", "float32"], ids=["default path", "torch"])
def worker(request: pytest.FixtureRequest) -> Worker:
    config = EngineConfig(wire=WIRE, dtype=request.param, kv_bytes=1 << 26)
    return Worker.load(config, auto.this_machine(), lambda done, total: None)[0]


def test_micro_batches_take_turns_until_all_have_ended() -> None:
    said = []

    def part(name: str, n: int):
        for i in range(n):
            said.append(f"{name}{i}")
            yield
        return name

    assert in_turn([part("a", 3), part("b", 2)]) == ["a", "b"]
    assert said == ["a0", "b0", "a1", "b1", "a2"]
    assert in_turn([]) == []


@torch.inference_mode()
def test_logits_of_a_step_do_not_depend_on_the_cut(worker: Worker) -> None:
    """A long prompt, one that reads its first pages in the same step, decodes, and one more chunk."""
    rng = random.Random(3)
    long = tuple(rng.randrange(5, 500) for _ in range(64))
    tail = tuple(rng.randrange(5, 500) for _ in range(21))
    plan = StepPlan(
        (
            Slice(0, long, 0, (9, 8, 7, 6), True),
            Slice(1, tail, 32, (9, 8, 5, 4), True),
            *(Slice(2 + i, (5 + i,), 63, (9, 8, 7, 10 + i), True) for i in range(5)),
            Slice(9, long[:30], 0, (20, 21), True),
        )
    )
    whole = worker.model.forward(every_row(worker, plan))
    halves = worker.model.forward(*(every_row(worker, part) for part in cut(plan, 2)))
    if worker.dtype == "float32":  # torch sums in another order, and what travels is rounded to bf16 after that
        assert (whole - halves).square().mean().sqrt() < 0.002 * whole.std()
        return
    assert torch.equal(whole, halves)


@torch.inference_mode()
def test_a_prompt_has_one_form_in_one_micro_batch_and_in_two(checkpoint: Callable[[str], Made]) -> None:
    """As DeepSeek's own checkpoints are: the rows of a prompt's whole pages are rounded in a way of their own."""
    config = EngineConfig(model=str(checkpoint(WIDE)[0]), wire=WIRE, kv_bytes=1 << 26)
    worker = Worker.load(config, auto.this_machine(), lambda done, total: None)[0]
    if not isinstance(worker.model, CpuModel):
        pytest.skip("no C++ kernels: torch has one form of a prompt")
    assert worker.model.two_forms
    rng = random.Random(3)
    tokens = tuple(rng.randrange(VOCAB) for _ in range(64))
    plan = StepPlan((Slice(0, tokens, 0, (9, 8, 7, 6), True, prompt_end=48),))
    whole = worker.model.forward(every_row(worker, plan))
    halves = worker.model.forward(*(every_row(worker, part) for part in cut(plan, 2)))
    assert torch.equal(whole, halves)


def every_row(worker: Worker, plan: StepPlan):
    batch = build(plan, worker.page, {})
    return replace(batch, sample_R=torch.arange(plan.n_tokens))


@pytest.mark.parametrize("seed", range(3))
def test_text_does_not_depend_on_micro_batches(worker: Worker, seed: int) -> None:
    prompts, lengths = workload(random.Random(seed))
    limits = {"max_step_tokens": 31, "n_pages": 40, "max_running": 5, "depth": 2, "arrive_every": seed}
    want = generate(worker, prompts, lengths, **limits).texts
    twice = replace(worker)
    twice.run = partial(Worker.run, worker, n=2)  # type: ignore[method-assign]
    assert generate(twice, prompts, lengths, **limits).texts == want
