"""Llama and Qwen2 on the C++ kernels: logits near those of the float32 torch model, and the same ones in any schedule.

The oracle is brigade/model/dense.py in float32 with the same weights rounded to bf16: what differs is the kernels' bf16
activations, keys and values, and for int8 and int4 also the weights.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from brigade.engine import auto
from brigade.engine.config import EngineConfig
from brigade.engine.machine import read_cpu
from brigade.engine.worker import Worker
from brigade.kernels.cpu.build import Built, find_library
from brigade.kernels.cpu.layers import Kernels, unsupported
from brigade.kernels.cpu.packed import Kind
from brigade.model.cache import KvCache
from brigade.model.dense import Dense
from brigade.model.on_cpu_kernels import CpuModel
from brigade.model.weights import Checkpoint
from brigade.spec.config import read_spec
from brigade.spec.model import Gqa
from tests.model.driving import logits
from tests.model.test_parity import prompt
from tests.model.test_schedules import assert_no_schedule_changes_the_text

MODELS = ["llama", "llama with llama3 rope and a tied head", "qwen2"]
N_PAGES, PAGE, CONTEXT = 100, 8, 800
TOLERANCE: dict[Kind, float] = {"bf16": 0.03, "int8": 0.11, "int4": 0.4}
"""Root mean square of the error over the standard deviation of the logits. Measured: at most 0.020, 0.074 and 0.291."""


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    library = find_library(read_cpu().features)
    if not isinstance(library, Built):
        pytest.skip(f"no C++ kernels here: {library}")
    return Kernels(library.path, 2)


def on_kernels(kernels: Kernels, folder: Path, kind: Kind = "bf16") -> Worker:
    spec = read_spec(folder)
    model = CpuModel(spec, Checkpoint(folder, spec).reader(torch.bfloat16), kernels, kind)
    model.attach(KvCache(spec, N_PAGES, PAGE, torch.bfloat16), CONTEXT)
    return Worker(spec, model, PAGE, {})


def on_torch(folder: Path) -> Worker:
    spec = read_spec(folder)
    weights = {name: w.float() for name, w in Checkpoint(folder, spec).load(torch.bfloat16).items()}
    model = Dense(spec, weights)
    model.attach(KvCache(spec, N_PAGES, PAGE, torch.float32), CONTEXT)
    return Worker(spec, model, PAGE, {})


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert want.std() > 0.3  # not a comparison of zeros
    return float((got - want).square().mean().sqrt() / want.std())


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("model", MODELS)
def test_logits_are_near_those_of_the_float32_model(checkpoint, kernels: Kernels, model: str, kind: Kind) -> None:
    folder, _ = checkpoint(model)
    tokens = prompt(150)
    got, want = logits(on_kernels(kernels, folder, kind), tokens), logits(on_torch(folder), tokens)
    assert error(got, want) <= TOLERANCE[kind]


@pytest.mark.parametrize("left_out", ["q_proj", "k_proj", "v_proj"])
def test_the_tolerance_notices_a_bias_that_is_left_out(checkpoint, kernels: Kernels, left_out: str) -> None:
    folder, _ = checkpoint("qwen2")
    tokens = prompt(150)
    oracle = on_torch(folder)
    for name, w in oracle.model.w.items():
        if name.endswith(f"{left_out}.bias"):
            w.zero_()
    assert error(logits(on_kernels(kernels, folder), tokens), logits(oracle, tokens)) > TOLERANCE["bf16"]


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("model", MODELS)
def test_chunks_give_the_logits_of_the_whole_bit_by_bit(checkpoint, kernels: Kernels, model: str, kind: Kind) -> None:
    """Over more than one split of the keys, and with decodes, which are cut into splits, among the chunks."""
    folder, _ = checkpoint(model)
    tokens = prompt(700, seed=2)
    whole = logits(on_kernels(kernels, folder, kind), tokens)
    worker, ends = on_kernels(kernels, folder, kind), (13, 14, 15, 60, 513, 514, 600, 699, 700)
    parts = [logits(worker, tokens[:end], start) for start, end in zip((0, *ends), ends, strict=False)]
    assert torch.equal(torch.cat(parts), whole)


def test_long_contexts_are_as_near_as_short_ones(checkpoint, kernels: Kernels) -> None:
    folder, _ = checkpoint("llama with llama3 rope and a tied head")
    tokens = prompt(700, seed=3)
    got, want = logits(on_kernels(kernels, folder), tokens), logits(on_torch(folder), tokens)
    assert error(got[-100:], want[-100:]) <= TOLERANCE["bf16"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("model", MODELS)
def test_no_schedule_changes_the_text(checkpoint, kernels: Kernels, model: str, kind: Kind, seed: int) -> None:
    assert_no_schedule_changes_the_text(on_kernels(kernels, checkpoint(model)[0], kind), seed)


def test_a_step_of_no_tokens_gives_no_logits(checkpoint, kernels: Kernels) -> None:
    worker = on_kernels(kernels, checkpoint("llama")[0])
    assert logits(worker, [1, 2, 3], start=3).shape == (0, worker.spec.vocab)


def test_heads_of_an_odd_width_are_left_to_torch(checkpoint) -> None:
    spec = read_spec(checkpoint("llama")[0])
    assert isinstance(spec.attention, Gqa)
    assert unsupported(spec) is None
    assert "odd" in str(unsupported(replace(spec, attention=replace(spec.attention, head_dim=13))))


def test_a_model_without_experts_has_no_wire(checkpoint) -> None:
    config = EngineConfig(model=str(checkpoint("llama")[0]), wire="int8")
    with pytest.raises(ValueError, match="wire int8 is for rows of routed experts; this model has none"):
        Worker.load(config, auto.this_machine(), lambda done, total: None)
