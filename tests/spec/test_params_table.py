"""The table of parameters: it counts published models right and names exactly the tensors of real checkpoints."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from brigade.spec.config import read_spec, spec_from
from brigade.spec.model import ModelSpec
from brigade.spec.params import EXPERT, active, count, params

CONFIGS = Path(__file__).parent / "configs"
DEMO = Path(__file__).parents[2] / "brigade" / "demo"

DEEPSEEK: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "intermediate_size": 40,
    "moe_intermediate_size": 11,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 3,
    "topk_group": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 10,
    "kv_lora_rank": 9,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
    "max_position_embeddings": 131,
}
DENSE: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "intermediate_size": 41,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.707,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TINY = {
    "deepseek": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**DEEPSEEK)),
    "deepseek without q_lora": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**{**DEEPSEEK, "q_lora_rank": None})),
    "deepseek with yarn": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**DEEPSEEK, rope_parameters=YARN)),
    "deepseek without groups": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(**{**DEEPSEEK, "n_group": 1, "topk_group": 1, "n_shared_experts": 1})
    ),
    "deepseek all sparse": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**{**DEEPSEEK, "first_k_dense_replace": 0})),
    "deepseek all dense": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**{**DEEPSEEK, "first_k_dense_replace": 3})),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DENSE)),
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**DENSE, tie_word_embeddings=True)),
    "llama with its own head_dim": lambda: LlamaForCausalLM(LlamaConfig(**DENSE, head_dim=10, rope_parameters=LLAMA3)),
    "qwen": lambda: Qwen2ForCausalLM(Qwen2Config(**DENSE)),
    "qwen tied": lambda: Qwen2ForCausalLM(Qwen2Config(**DENSE, tie_word_embeddings=True)),
}


def published(name: str) -> ModelSpec:
    return spec_from(json.loads((CONFIGS / f"{name}.json").read_text()))


def stored(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes from a safetensors header."""
    with path.open("rb") as f:
        header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def described(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    tensors = [t for p in params(spec) for t in p.tensors()]
    assert len(dict(tensors)) == len(tensors), "a tensor is described twice"
    return dict(tensors)


@pytest.mark.parametrize("name", TINY)
def test_the_table_names_exactly_the_tensors_of_a_saved_checkpoint(name: str, tmp_path: Path) -> None:
    model = TINY[name]()
    model.save_pretrained(tmp_path)
    spec = read_spec(tmp_path)
    assert described(spec) == stored(tmp_path / "model.safetensors")
    assert count(spec) == sum(p.numel() for p in model.parameters()) + sum(
        b.numel() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")
    )


def test_what_transformers_writes_into_a_config_is_read_back(tmp_path: Path) -> None:
    TINY["deepseek with yarn"]().save_pretrained(tmp_path)
    spec = read_spec(tmp_path)
    assert (spec.vocab, spec.dim, spec.context, spec.dtype) == (67, 24, 131, "float32")
    assert spec.rope.scaling is not None
    assert (spec.rope.dim, spec.rope.interleaved, spec.rope.scaling.factor) == (4, True, 4.0)


def test_deepseek_v3_counts_671_billion_parameters_of_which_37_are_active() -> None:
    spec = published("deepseek_v3")
    assert count(spec) == pytest.approx(671.0e9, rel=1e-3)
    assert 36.6e9 <= active(spec) <= 37.0e9


@pytest.mark.parametrize(
    ("name", "n_params"),
    [
        ("r1_distill_qwen_1_5b", 1_777_088_000),
        ("r1_distill_qwen_7b", 7_615_616_512),
        ("r1_distill_llama_8b", 8_030_261_248),
        ("smollm2_135m_instruct", 134_515_008),
    ],
)
def test_dense_models_count_their_published_size(name: str, n_params: int) -> None:
    assert count(published(name)) == n_params


def test_a_dense_model_uses_every_weight_but_the_embedding_table() -> None:
    spec = published("r1_distill_llama_8b")
    norms = (2 * spec.n_layers + 1) * spec.dim
    assert active(spec) == count(spec) - spec.vocab * spec.dim - norms


def test_a_tied_head_is_one_table_that_is_used_once() -> None:
    spec = published("smollm2_135m_instruct")
    assert active(spec) == count(spec) - (2 * spec.n_layers + 1) * spec.dim


def test_the_table_names_the_tensors_of_the_demo_model_except_its_draft_layer() -> None:
    spec = read_spec(DEMO)
    main = {n: s for n, s in stored(DEMO / "model.safetensors").items() if not n.startswith("model.layers.4.")}
    assert described(spec) == main


def test_with_drafts_the_table_names_all_tensors_of_the_demo_model() -> None:
    assert described(read_spec(DEMO, drafts=1)) == stored(DEMO / "model.safetensors")


def test_the_draft_layer_of_deepseek_v3_has_12_billion_parameters_of_its_own() -> None:
    """Published: 14 billion, with embedding and head, which are the main model's."""
    spec = published("deepseek_v3")
    more = replace(spec, drafting=True)
    assert count(more) - count(spec) == pytest.approx(11.6e9, rel=0.01)
    assert more.n_blocks == 62
    assert more.n_moe == 59


def test_experts_are_stacked_along_an_axis_that_ranks_may_share() -> None:
    routed = [p for p in params(published("deepseek_v3")) if p.per_expert]
    assert len(routed) == 58 * 3
    for p in routed:
        assert (p.axes, p.shape[0], p.uses) == ((EXPERT, None, None), 256, 8 / 256)
    names = [name for name, _ in routed[0].tensors()]
    assert names[0] == "model.layers.3.mlp.experts.0.gate_proj.weight"
    assert names[255] == "model.layers.3.mlp.experts.255.gate_proj.weight"


def test_every_axis_of_every_parameter_is_described() -> None:
    for name in ("deepseek_v3", "r1_distill_qwen_7b", "r1_distill_llama_8b"):
        for p in params(published(name)):
            assert len(p.axes) == len(p.shape), p.name


def test_block_scales_go_with_linear_layers_and_not_with_gate_embedding_norms_or_head() -> None:
    kinds = {p.name.split(".")[-2]: p.scaled for p in params(published("deepseek_v3"))}
    assert {kind for kind, scaled in kinds.items() if scaled} == {
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    }


def test_only_the_gate_is_kept_exact() -> None:
    exact = {p.name for p in params(published("deepseek_v3")) if p.exact}
    names = ("gate.weight", "gate.e_score_correction_bias")
    assert exact == {f"model.layers.{layer}.mlp.{name}" for layer in range(3, 61) for name in names}
