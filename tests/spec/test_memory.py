"""A rank's bytes by part: hand-made sums for DeepSeek-V3, and no part is forgotten."""

from pathlib import Path

import pytest

from brigade.spec.config import read_json, spec_from
from brigade.spec.memory import PARTS, WeightKind, kv_bytes, weight_bytes
from brigade.spec.model import ModelSpec
from brigade.spec.params import count, params

V3 = spec_from(read_json(Path(__file__).parent / "configs/deepseek_v3.json"))
QWEN = spec_from(read_json(Path(__file__).parent / "configs/r1_distill_qwen_1_5b.json"))
ONE_EXPERT = 3 * 2048 * 7168


def test_two_experts_of_58_layers_at_a_byte_and_a_scale() -> None:
    outputs = 2048 + 2048 + 7168
    assert weight_bytes(V3, "int8", 2)["routed experts"] == 58 * 2 * (ONE_EXPERT + 8 * outputs)
    assert weight_bytes(V3, "bf16", 2)["routed experts"] == 58 * 2 * 2 * ONE_EXPERT
    assert weight_bytes(V3, "bf16", 9)["shared experts"] == 58 * 2 * ONE_EXPERT


def test_int4_takes_half_a_byte_and_a_scale_for_32_numbers() -> None:
    assert weight_bytes(V3, "int4", 1)["routed experts"] == 58 * ONE_EXPERT * 9 // 16
    assert weight_bytes(V3, "int4", 1)["attention"] == weight_bytes(V3, "int8", 1)["attention"]


def test_the_latent_cache_of_v3_takes_70_kb_a_token() -> None:
    assert kv_bytes(V3, 1) == 61 * 576 * 2 == 70272


@pytest.mark.parametrize("spec", [V3, QWEN])
def test_all_parameters_are_counted_once_in_bfloat16(spec: ModelSpec) -> None:
    exact = sum(p.size for p in params(spec) if p.exact)
    n_slots = spec.moe.n_experts if spec.moe else 0
    assert sum(weight_bytes(spec, "bfloat16", n_slots).values()) == 2 * count(spec) + 2 * exact


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4", "float32"])
def test_only_routed_experts_depend_on_the_slots(kind: WeightKind) -> None:
    few, many = weight_bytes(V3, kind, 1), weight_bytes(V3, kind, 9)
    assert {part for part in PARTS if few[part] != many[part]} == {"routed experts"}
    assert many["routed experts"] == 9 * few["routed experts"]


def test_a_tied_head_is_packed_beside_the_embedding() -> None:
    config = read_json(Path(__file__).parent / "configs/smollm2_135m_instruct.json")
    tied = spec_from(config)
    assert tied.tied_head
    one = tied.vocab * tied.dim
    assert weight_bytes(tied, "bf16", 0)["embedding and head"] == 2 * 2 * one
    assert weight_bytes(tied, "float32", 0)["embedding and head"] == 4 * one
