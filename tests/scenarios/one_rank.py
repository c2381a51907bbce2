"""What one rank alone says to the prompts of the scenarios: the text that nothing may change."""

import functools
import random

from brigade import Brigade, SamplingParams
from brigade.engine.config import DEMO_MODEL
from brigade.engine.output import Completion
from brigade.spec.config import read_spec

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.9, max_tokens=24, seed=5, presence_penalty=0.4, ignore_eos=True)


def some_prompts(n: int, seed: int = 7) -> list[list[int]]:
    """Of very different lengths; some begin alike."""
    rng, vocab = random.Random(seed), read_spec(DEMO_MODEL).vocab
    prompts = [[rng.randrange(5, vocab) for _ in range(rng.choice((1, 2, 9, 40, 70, 150)))] for _ in range(n)]
    return [*prompts, [*prompts[-1], 5, 6, 7], [*prompts[0], 8, 9], prompts[-1]]


PROMPTS = some_prompts(9)
MANY = [5 + i % 700 for i in range(800)]
"""A prompt of many steps."""
ALL = [*PROMPTS, MANY]


@functools.cache
def _table() -> dict[tuple[tuple[int, ...], SamplingParams], Completion]:
    kinds = (GREEDY, LONG, DRAWN)
    with Brigade(max_step_tokens=64) as model:
        answers = [model.generate(ALL, params) for params in kinds]
    return {
        (tuple(prompt), params): completion
        for params, completions in zip(kinds, answers, strict=True)
        for prompt, completion in zip(ALL, completions, strict=True)
    }


def says(prompt: list[int], params: SamplingParams = LONG) -> list[int]:
    """The tokens of one of ALL, with GREEDY, LONG or DRAWN."""
    return _table()[tuple(prompt), params].token_ids


def text(prompt: list[int]) -> str:
    """Its text, with LONG."""
    return _table()[tuple(prompt), LONG].text
