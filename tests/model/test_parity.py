"""transformers is the oracle: same checkpoints, same logits, same greedy text."""

import random
from pathlib import Path

import pytest
import torch

from tests.model.checkpoints import MODELS, VOCAB, quantize_fp8
from tests.model.driving import generate, load, logits

KINDS = list(MODELS)
TOLERANCE = 1e-4


def prompt(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(n)]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_agree_at_every_position(checkpoint, kind: str) -> None:
    folder, oracle = checkpoint(kind)
    tokens = prompt(150)
    with torch.no_grad():
        want = oracle(torch.tensor([tokens])).logits[0]
    got = logits(load(folder), tokens)
    assert (got - want).abs().max() <= TOLERANCE
    assert want.std() > 0.3  # not a comparison of zeros


@pytest.mark.parametrize("kind", KINDS)
def test_64_greedy_tokens_agree(checkpoint, kind: str) -> None:
    folder, oracle = checkpoint(kind)
    tokens = prompt(37, seed=1)
    ids = torch.tensor([tokens])
    out = oracle.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64, eos_token_id=None, pad_token_id=0
    )
    [got] = generate(load(folder), [tokens], [64]).texts
    assert got == out[0, len(tokens) :].tolist()


@pytest.mark.parametrize("kind", ["v3 with yarn", "qwen2"])
def test_chunks_give_the_logits_of_the_whole(checkpoint, kind: str) -> None:
    folder, _ = checkpoint(kind)
    tokens = prompt(60, seed=2)
    whole = logits(load(folder), tokens)
    worker = load(folder)
    parts = torch.cat([logits(worker, tokens[:end], start) for start, end in ((0, 13), (13, 14), (14, 60))])
    torch.testing.assert_close(parts, whole, atol=TOLERANCE, rtol=0)


def test_fp8_blocks_mean_what_their_float32_twin_says(checkpoint, tmp_path: Path) -> None:
    source, _ = checkpoint("v3 in fp8 blocks, dequantised")
    fp8, twin = tmp_path / "fp8", tmp_path / "twin"
    quantize_fp8(source, fp8, twin)
    tokens = prompt(40, seed=3)
    got, want = logits(load(fp8), tokens), logits(load(twin), tokens)
    assert torch.equal(got, want)
    assert not torch.equal(want, logits(load(source), tokens))  # quantising did change something
    assert generate(load(fp8), [tokens], [64]).texts == generate(load(twin), [tokens], [64]).texts
