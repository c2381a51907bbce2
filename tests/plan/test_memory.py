"""The planner's bytes: worked numbers of DeepSeek-V3, and models that are really loaded, to the byte."""

from pathlib import Path

import pytest
import torch

import brigade
from brigade.model.cache import KvCache
from brigade.model.weights import Checkpoint
from brigade.plan.memory import memory, weight_bytes
from brigade.plan.models import find_model
from brigade.spec.config import read_spec
from brigade.spec.device import find_device
from brigade.spec.model import ModelSpec
from brigade.spec.work import BF16, FP8, Grid, Precision, facts
from tests.model.checkpoints import MODELS, make

F = find_model("deepseek-v3").facts(FP8)
AS_LOADED = Precision(linear="bf16", experts="bf16", dispatch="bf16", gate="fp32")
"""How Brigade's own loader keeps a model in bfloat16: the gate stays exact."""


def test_weights_of_a_rank_of_an_eight_card_box() -> None:
    assert memory(F, Grid(8, 8, 1, 8), find_device("H200")).weights / 1e9 == pytest.approx(100.8, rel=2e-3)
    assert weight_bytes(F) / 8 / 1e9 == pytest.approx(84.2, rel=2e-3)  # if TP could cut all of it; 1 % cannot be cut
    assert memory(F, Grid(8, 8, 8, 1), find_device("H20")).weights / 1e9 == pytest.approx(85.1, rel=2e-3)


@pytest.mark.parametrize(
    ("device", "grid", "thousands"),
    [
        *(("H200", Grid(8, 8, 1, 8), 286), ("H800", Grid(16, 8, 1, 16), 86), ("H800", Grid(32, 8, 1, 32, 32), 341)),
        ("H800", Grid(144, 8, 1, 144, 32), 595),
    ],
)
def test_tokens_of_cache_on_a_rank(device: str, grid: Grid, thousands: int) -> None:
    assert memory(F, grid, find_device(device)).tokens / 1e3 == pytest.approx(thousands, rel=5e-3)


def test_eight_h800_cannot_hold_it_in_fp8() -> None:
    assert memory(F, Grid(8, 8, 1, 8), find_device("H800")).free < 0
    assert memory(F, Grid(8, 8, 8, 1), find_device("H800")).free < 0


def test_a_latent_cache_is_whole_on_every_tp_rank_but_heads_are_cut() -> None:
    h20 = find_device("H20")
    assert memory(F, Grid(8, 8, 8, 1), h20).kv_token == 70_272
    gqa = find_model("r1-distill-llama-70b").facts(BF16)
    assert memory(gqa, Grid(8, 8, 8, 1), h20).kv_token == gqa.kv_bytes / 8


def test_a_layer_that_drafts_is_held_with_its_experts_and_has_a_cache() -> None:
    """DeepSeek-V3's README: 14 G parameters, of which embedding and head (1.85 G) are those of the main model."""
    h200 = find_device("H200")
    plain, drafting = (memory(F, Grid(8, 8, 1, 8), h200, drafts=n) for n in (0, 1))
    whole = F.n_experts * F.expert + F.shared
    attention = 187.1e6 + 1.84e6 * 2 + 2 * 7168**2  # the gate is kept in bf16
    assert whole + attention + 1.85e9 == pytest.approx(14e9, rel=0.04)
    assert drafting.weights - plain.weights == pytest.approx(
        F.n_experts / 8 * F.expert + F.shared + attention, rel=1e-3
    )
    assert drafting.kv_token / plain.kv_token == pytest.approx(62 / 61)


def test_pipeline_stages_share_layers_and_the_cache_of_each_token() -> None:
    h800 = find_device("H800")
    box, two = memory(F, Grid(8, 8, 8, 1), h800), memory(F, Grid(16, 8, 8, 1, pp=2), h800)
    assert two.dense / box.dense == pytest.approx(31 / 61)
    assert two.kv_token / box.kv_token == pytest.approx(31 / 61)
    assert box.free < 0 < two.free


def test_a_rank_without_the_shared_expert_holds_less() -> None:
    grid = Grid(320, 320, 1, 320, 32)
    apart = Grid(320, 320, 1, 320, 32, shared_ranks=32)
    ascend = find_device("Ascend-910C")
    assert memory(F, apart, ascend).shared == 0
    assert memory(F, apart, ascend).experts == memory(F, grid, ascend).experts
    with pytest.raises(ValueError, match="shared_ranks"):
        Grid(8, 8, 1, 8, shared_ranks=8)


DEMO = Path(brigade.__file__).parent / "demo"


def loaded_bytes(folder: Path, spec: ModelSpec, experts: range | None = None) -> int:
    layers = None if experts is None else [experts] * spec.n_moe
    tensors = Checkpoint(folder, spec, layers).load(torch.bfloat16).values()
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("drafts", [0, 1])
def test_the_demo_model_as_loaded_to_the_byte(drafts: int) -> None:
    spec = read_spec(DEMO, drafts)
    assert weight_bytes(facts(spec, AS_LOADED)) == loaded_bytes(DEMO, spec)


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_one_rank_of_the_demo_model_to_the_byte(n_ranks: int) -> None:
    spec = read_spec(DEMO)
    assert spec.moe is not None
    mine = range(spec.moe.n_experts // n_ranks)
    host = find_device("EPYC-9654")
    planned = memory(facts(spec, AS_LOADED), Grid(n_ranks, n_ranks, 1, n_ranks), host).weights
    assert planned == loaded_bytes(DEMO, spec, mine)


@pytest.mark.parametrize("kind", [*[k for k in MODELS if "v3" in k][:5], "llama"])
def test_tiny_random_models_to_the_byte(kind: str, tmp_path: Path) -> None:
    kind = next(k for k in MODELS if k.startswith(kind))
    make(kind, tmp_path)
    spec = read_spec(tmp_path)
    assert weight_bytes(facts(spec, AS_LOADED)) == loaded_bytes(tmp_path, spec)


@pytest.mark.parametrize("drafts", [0, 1])
def test_the_cache_of_the_demo_model_to_the_byte(drafts: int) -> None:
    spec = read_spec(DEMO, drafts)
    cache = KvCache(spec, 7, 16, torch.bfloat16).layers
    assert facts(spec, AS_LOADED).kv_bytes * 7 * 16 == cache.numel() * cache.element_size()
