"""No schedule changes greedy text: chunking, batching, prefix reuse, preemption, plans ahead."""

import random
from collections import Counter

import pytest

from brigade.engine.worker import Worker
from brigade.spec.sampling import SamplingParams
from tests.model.checkpoints import VOCAB
from tests.model.driving import generate, load

KINDS = ["v3 with group-limited routing", "v3 with yarn", "llama with llama3 rope and a tied head", "qwen2"]


def workload(rng: random.Random) -> tuple[list[list[int]], list[int]]:
    """Prompts with shared beginnings and repeats, of very different lengths."""
    stem = [rng.randrange(VOCAB) for _ in range(40)]
    prompts = [
        stem[: rng.randrange(1, 40)] + [rng.randrange(VOCAB) for _ in range(rng.choice((1, 3, 17)))] for _ in range(6)
    ]
    prompts += [list(rng.choice(prompts)) for _ in range(2)]
    return prompts, [rng.randint(1, 14) for _ in prompts]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", KINDS)
def test_no_schedule_changes_the_text(checkpoint, kind: str, seed: int) -> None:
    assert_no_schedule_changes_the_text(load(checkpoint(kind)[0]), seed)


def assert_no_schedule_changes_the_text(worker: Worker, seed: int) -> None:
    rng = random.Random(seed)
    prompts, lengths = workload(rng)
    alone = [generate(worker, [p], [n])[0][0] for p, n in zip(prompts, lengths, strict=True)]
    eos = Counter(t for text in alone for t in text).most_common(1)[0][0]
    want = [text[: text.index(eos) + 1] if eos in text else text for text in alone]
    assert want != alone  # some stop early, so late ends of sequence are among what is tested
    for depth in (1, 2, 3):
        limits = {
            "max_step_tokens": rng.choice((3, 8, 31, 64)),
            "n_pages": rng.choice((9, 11, 40)),
            "max_running": rng.randint(1, 8),
            "arrive_every": rng.choice((0, 1, 3)),
        }
        got = generate(worker, prompts, lengths, stop_ids=frozenset({eos}), depth=depth, **limits).texts
        assert got == want, (depth, limits)


def test_the_schedules_above_do_preempt_and_reuse(checkpoint) -> None:
    """The property test is worth nothing if its workloads never run out of pages or never hit the cache."""
    worker = load(checkpoint(KINDS[0])[0])
    prompts, lengths = workload(random.Random(3))
    served = generate(worker, prompts, [14 for _ in lengths], n_pages=9, max_step_tokens=31, max_running=8, depth=2)
    assert served.scheduler.n_preempted > 0
    assert sum(r.n_cached or 0 for r in served.requests) > 0


@pytest.mark.parametrize("seed", range(3))
def test_sampled_text_depends_on_the_seed_alone(checkpoint, seed: int) -> None:
    """The same seed draws the same tokens in any company, after preemption, and with plans ahead of results."""
    rng = random.Random(seed)
    worker = load(checkpoint(KINDS[0])[0])
    prompts, lengths = workload(rng)
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=seed, presence_penalty=0.5, max_tokens=1)
    want = [generate(worker, [p], [n], params=params)[0][0] for p, n in zip(prompts, lengths, strict=True)]
    got = generate(worker, prompts, lengths, params=params, n_pages=10, max_step_tokens=9, depth=3)
    assert got.texts == want
    other = SamplingParams(temperature=0.8, top_p=0.9, seed=seed + 1, presence_penalty=0.5, max_tokens=1)
    assert generate(worker, prompts, lengths, params=other).texts != want
