"""Reading a config.json: what is served is read exactly, everything else is refused by name."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brigade.spec.config import BadConfig, read_spec, spec_from
from brigade.spec.model import Gqa, Llama3Rope, Mla, ModelSpec, Moe, Rope, Yarn

CONFIGS = Path(__file__).parent / "configs"
DEMO = Path(__file__).parents[2] / "brigade" / "demo"


def config(name: str, **changes: Any) -> dict[str, Any]:
    return {**json.loads((CONFIGS / f"{name}.json").read_text()), **changes}


V3 = config("deepseek_v3")
QWEN = config("r1_distill_qwen_1_5b")
LLAMA = config("r1_distill_llama_8b")


def without(source: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in source.items() if k not in keys}


def test_deepseek_v3_is_read_exactly() -> None:
    assert spec_from(V3) == ModelSpec(
        architecture="DeepseekV3ForCausalLM",
        vocab=129280,
        dim=7168,
        n_layers=61,
        n_dense=3,
        context=163840,
        attention=Mla(n_heads=128, q_rank=1536, kv_rank=512, nope=128, rope=64, v=128),
        rope=Rope(
            dim=64,
            theta=10000.0,
            interleaved=True,
            scaling=Yarn(
                factor=40.0, original_context=4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0
            ),
        ),
        ffn=18432,
        moe=Moe(
            n_experts=256,
            n_shared=1,
            top_k=8,
            ffn=2048,
            n_groups=8,
            top_groups=4,
            route_scale=2.5,
            norm_weights=True,
        ),
        norm_eps=1e-6,
        tied_head=False,
        n_mtp=1,
        dtype="bfloat16",
        block_scale=(128, 128),
        eos_ids=(1,),
    )


def test_deepseek_v3_caches_576_numbers_a_token_a_layer() -> None:
    assert spec_from(V3).kv_width == 576


def test_only_layers_after_the_dense_ones_have_experts() -> None:
    spec = spec_from(V3)
    assert [spec.is_moe(layer) for layer in range(61)] == [False] * 3 + [True] * 58


def test_qwen_has_biases_and_two_kv_heads() -> None:
    spec = spec_from(QWEN)
    assert spec.attention == Gqa(n_heads=12, n_kv_heads=2, head_dim=128, qkv_bias=True)
    assert spec.rope == Rope(dim=128, theta=10000.0, interleaved=False)
    assert (spec.kv_width, spec.moe, spec.n_dense, spec.n_mtp, spec.block_scale) == (512, None, 28, 0, None)


def test_llama_has_llama3_rope_scaling_and_no_biases() -> None:
    spec = spec_from(LLAMA)
    assert spec.attention == Gqa(n_heads=32, n_kv_heads=8, head_dim=128, qkv_bias=False)
    assert spec.rope.theta == 500000.0
    assert spec.rope.scaling == Llama3Rope(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    assert (spec.norm_eps, spec.eos_ids) == (1e-5, (128001,))


def test_smollm2_is_read_although_its_config_talks_to_other_programs() -> None:
    spec = spec_from(config("smollm2_135m_instruct"))
    assert spec.tied_head
    assert spec.attention == Gqa(n_heads=9, n_kv_heads=3, head_dim=64, qkv_bias=False)


def test_the_bundled_demo_model_is_read() -> None:
    spec = read_spec(DEMO)
    assert (spec.dim, spec.n_layers, spec.moe and spec.moe.n_experts) == (192, 4, 32)
    assert spec.dtype == "bfloat16"
    assert 2 in spec.eos_ids


def test_without_q_lora_rank_queries_are_projected_at_once() -> None:
    attention = spec_from({**V3, "q_lora_rank": None}).attention
    assert isinstance(attention, Mla)
    assert attention.q_rank is None


@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (None, None)])
def test_without_group_limits_there_is_one_group(n_group: int | None, topk_group: int | None) -> None:
    moe = spec_from({**V3, "n_group": n_group, "topk_group": topk_group}).moe
    assert moe is not None
    assert (moe.n_groups, moe.top_groups) == (1, 1)


@pytest.mark.parametrize("n_dense", [0, 1, 60])
def test_any_number_of_first_layers_may_be_dense(n_dense: int) -> None:
    spec = spec_from({**V3, "first_k_dense_replace": n_dense})
    assert (spec.n_dense, spec.is_moe(n_dense)) == (n_dense, True)


def test_a_model_of_dense_layers_only_has_no_experts() -> None:
    assert spec_from({**V3, "first_k_dense_replace": 61}).moe is None


def test_without_yarn_there_is_no_scaling() -> None:
    assert spec_from({**V3, "rope_scaling": None}).rope.scaling is None


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [({}, "bfloat16"), ({"torch_dtype": "float16"}, "float16"), ({"torch_dtype": None, "dtype": "float32"}, "float32")],
)
def test_the_type_of_the_weights_is_read_from_either_key(changes: dict[str, Any], dtype: str) -> None:
    assert spec_from({**V3, **changes}).dtype == dtype


@pytest.mark.parametrize(("value", "ids"), [(None, ()), (7, (7,)), ([7, 9], (7, 9))])
def test_end_of_sequence_is_none_one_or_many_ids(value: Any, ids: tuple[int, ...]) -> None:
    assert spec_from({**V3, "eos_token_id": value}).eos_ids == ids


def test_end_of_sequence_of_the_generation_config_wins(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [128001, 128009]}))
    assert read_spec(tmp_path).eos_ids == (128001, 128009)


def test_a_generation_config_without_end_of_sequence_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    assert read_spec(tmp_path).eos_ids == (128001,)


def test_a_bad_end_of_sequence_names_the_file_it_stands_in(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(BadConfig, match=r"generation_config\.json.*eos_token_id"):
        read_spec(tmp_path)


# Refusals ------------------------------------------------------------------------------------------------------------

V3_REQUIRED = """
    architectures num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim
    n_group topk_group n_routed_experts n_shared_experts num_experts_per_tok moe_intermediate_size
    routed_scaling_factor norm_topk_prob num_hidden_layers first_k_dense_replace vocab_size hidden_size
    max_position_embeddings rope_theta intermediate_size rms_norm_eps
""".split()  # noqa: SIM905
DENSE_REQUIRED = """
    architectures num_attention_heads num_hidden_layers vocab_size hidden_size max_position_embeddings rope_theta
    intermediate_size rms_norm_eps
""".split()  # noqa: SIM905


@pytest.mark.parametrize(
    ("source", "key"),
    [(V3, k) for k in V3_REQUIRED] + [(QWEN, k) for k in DENSE_REQUIRED] + [(LLAMA, k) for k in DENSE_REQUIRED],
    ids=lambda v: v["model_type"] if isinstance(v, dict) else v,
)
def test_a_missing_key_is_named(source: dict[str, Any], key: str) -> None:
    with pytest.raises(BadConfig, match=rf"a/config\.json.*'{key}' is missing"):
        spec_from(without(source, key), "a/config.json")


@pytest.mark.parametrize("source", [V3, QWEN, LLAMA], ids=lambda c: c["model_type"])
def test_an_unknown_key_is_named(source: dict[str, Any]) -> None:
    with pytest.raises(BadConfig, match=r"a/config\.json.*'attention_sinks'"):
        spec_from({**source, "attention_sinks": 4}, "a/config.json")


@pytest.mark.parametrize(
    ("section", "key"),
    [("rope_scaling", "low_freq_factor"), ("quantization_config", "weights")],
)
def test_an_unknown_key_of_a_section_is_named_with_its_section(section: str, key: str) -> None:
    with pytest.raises(BadConfig, match=f"{section}.*'{key}'"):
        spec_from({**V3, section: {**V3[section], key: 1}})


@pytest.mark.parametrize("key", ["factor", "original_max_position_embeddings"])
def test_a_missing_yarn_key_is_named(key: str) -> None:
    with pytest.raises(BadConfig, match=f"rope_scaling.*'{key}' is missing"):
        spec_from({**V3, "rope_scaling": without(V3["rope_scaling"], key)})


INTEGERS = [k for k in V3_REQUIRED if isinstance(V3[k], int) and not isinstance(V3[k], bool)]
WRONG_INTEGERS = ["7168", True, -1, 2.5, [8], {}, 1e400, float("nan"), 10**400]


@pytest.mark.parametrize("key", [k for k in INTEGERS if k != "rope_theta"])
def test_what_is_no_natural_number_is_refused_with_its_key(key: str) -> None:
    for value in WRONG_INTEGERS:
        with pytest.raises(BadConfig, match=f"'{key}'"):
            spec_from({**V3, key: value})


@pytest.mark.parametrize("value", ["2.5", True, -1, 0, None, [2.5], float("nan"), float("inf"), 1e400])
@pytest.mark.parametrize("key", ["routed_scaling_factor", "rms_norm_eps", "rope_theta"])
def test_what_is_no_positive_finite_number_is_refused_with_its_key(key: str, value: Any) -> None:
    with pytest.raises(BadConfig, match=f"'{key}'"):
        spec_from({**V3, key: value})


@pytest.mark.parametrize("key", ["routed_scaling_factor", "rms_norm_eps", "rope_theta"])
def test_a_whole_number_beyond_floats_is_refused_with_its_key(key: str) -> None:
    with pytest.raises(BadConfig, match=f"'{key}'"):
        spec_from({**V3, key: 10**400})


@pytest.mark.parametrize("value", ["true", 1, 0, None, []])
@pytest.mark.parametrize("key", ["norm_topk_prob", "tie_word_embeddings"])
def test_what_is_neither_true_nor_false_is_refused_with_its_key(key: str, value: Any) -> None:
    with pytest.raises(BadConfig, match=f"'{key}'"):
        spec_from({**V3, key: value})


@pytest.mark.parametrize(
    ("source", "key", "value"),
    [
        (V3, "attention_bias", True),
        (V3, "scoring_func", "softmax"),
        (V3, "topk_method", "greedy"),
        (V3, "moe_layer_freq", 2),
        (V3, "hidden_act", "gelu"),
        (V3, "num_key_value_heads", 8),
        (V3, "head_dim", 128),
        (V3, "qk_rope_head_dim", 63),
        (V3, "torch_dtype", "float64"),
        (LLAMA, "attention_bias", True),
        (LLAMA, "mlp_bias", True),
        (LLAMA, "hidden_act", "relu"),
        (LLAMA, "rope_interleaved", True),
        (LLAMA, "head_dim", 127),
        (QWEN, "use_sliding_window", True),
        (QWEN, "use_mrope", True),
        (QWEN, "layer_types", ["full_attention", "sliding_attention"]),
    ],
)
def test_a_value_that_is_not_implemented_is_refused_with_its_key(source: dict[str, Any], key: str, value: Any) -> None:
    with pytest.raises(BadConfig, match=key):
        spec_from({**source, key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quant_method", "awq"),
        ("fmt", "e5m2"),
        ("activation_scheme", "static"),
        ("modules_to_not_convert", ["model.layers.0"]),
        ("weight_block_size", None),
        ("weight_block_size", [128]),
        ("weight_block_size", [128, 0]),
        ("weight_block_size", [128, "128"]),
    ],
)
def test_a_quantisation_that_is_not_implemented_is_refused_with_its_key(key: str, value: Any) -> None:
    with pytest.raises(BadConfig, match=f"quantization_config.*'{key}'"):
        spec_from({**V3, "quantization_config": {**V3["quantization_config"], key: value}})


@pytest.mark.parametrize("key", ["quant_method", "weight_block_size"])
def test_a_quantisation_must_say_what_it_is(key: str) -> None:
    with pytest.raises(BadConfig, match=f"quantization_config.*'{key}'"):
        spec_from({**V3, "quantization_config": without(V3["quantization_config"], key)})


@pytest.mark.parametrize("kind", ["linear", "dynamic", "longrope", 7, None])
def test_a_rope_type_that_is_not_implemented_is_refused(kind: Any) -> None:
    with pytest.raises(BadConfig, match="rope_scaling"):
        spec_from({**V3, "rope_scaling": {**V3["rope_scaling"], "type": kind}})


def test_two_rope_types_that_differ_are_refused() -> None:
    with pytest.raises(BadConfig, match="rope_scaling"):
        spec_from({**V3, "rope_scaling": {**V3["rope_scaling"], "rope_type": "default"}})


def test_rope_in_the_old_and_the_new_way_is_refused() -> None:
    with pytest.raises(BadConfig, match="rope_parameters"):
        spec_from({**V3, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}})


def test_two_types_of_the_weights_that_differ_are_refused() -> None:
    with pytest.raises(BadConfig, match="dtype"):
        spec_from({**V3, "torch_dtype": "bfloat16", "dtype": "float16"})


@pytest.mark.parametrize("value", ["", 0, False, [], 16])
def test_a_type_of_the_weights_that_is_no_name_is_refused(value: Any) -> None:
    with pytest.raises(BadConfig, match="dtype"):
        spec_from({**V3, "torch_dtype": value})


def test_llama3_rope_needs_a_ramp_between_low_and_high() -> None:
    with pytest.raises(BadConfig, match="high_freq_factor"):
        spec_from({**LLAMA, "rope_scaling": {**LLAMA["rope_scaling"], "low_freq_factor": 4.0}})


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"n_group": 7, "topk_group": 4}, "n_group"),
        ({"topk_group": 9}, "topk_group"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok"),
        ({"n_group": 1, "topk_group": 1, "num_experts_per_tok": 257}, "num_experts_per_tok"),
        ({"n_group": 256, "topk_group": 8}, "n_group"),
    ],
)
def test_groups_of_experts_that_do_not_fit_are_refused(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(BadConfig, match=names):
        spec_from({**V3, **changes})


def test_groups_without_a_number_of_groups_to_choose_are_refused() -> None:
    with pytest.raises(BadConfig, match="topk_group"):
        spec_from({**V3, "topk_group": None})


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_routed_experts"])
def test_more_layers_or_experts_than_any_model_has_are_refused_before_they_are_counted(key: str) -> None:
    with pytest.raises(BadConfig, match=key):
        spec_from({**V3, key: 1 << 40})


def test_kv_heads_must_divide_heads() -> None:
    with pytest.raises(BadConfig, match="num_key_value_heads"):
        spec_from({**LLAMA, "num_key_value_heads": 7})


def test_more_heads_than_numbers_are_refused() -> None:
    with pytest.raises(BadConfig, match=r"head_dim|num_attention_heads"):
        spec_from({**QWEN, "hidden_size": 8})


@pytest.mark.parametrize(
    "value", [None, [], "DeepseekV3ForCausalLM", ["MixtralForCausalLM"], ["LlamaForCausalLM", "Qwen2ForCausalLM"], [3]]
)
def test_an_architecture_that_is_not_supported_is_refused(value: Any) -> None:
    with pytest.raises(BadConfig, match="architectures"):
        spec_from({**V3, "architectures": value})


@pytest.mark.parametrize("value", ["1", -1, True, 1.0, [1, "2"], {"id": 1}])
def test_an_end_of_sequence_that_is_no_token_is_refused(value: Any) -> None:
    with pytest.raises(BadConfig, match="eos_token_id"):
        spec_from({**V3, "eos_token_id": value})


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe{", b"[" * 100_000, b'{"a": ' * 100_000])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(BadConfig, match=r"config\.json"):
        read_spec(tmp_path)


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="nowhere"):
        read_spec(tmp_path / "nowhere")


# Anything at all -----------------------------------------------------------------------------------------------------

JSON_LIKE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, -1, 10**400, 1 << 62])
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
PLACES = [(k,) for k in V3] + [(s, k) for s in ("rope_scaling", "quantization_config") for k in V3[s]]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(source=st.sampled_from([V3, QWEN, LLAMA]), place=st.sampled_from(PLACES), value=JSON_LIKE)
def test_any_value_at_any_key_gives_a_spec_or_a_bad_config(
    source: dict[str, Any], place: tuple[str, ...], value: Any
) -> None:
    mutated = copy.deepcopy(source)
    inner = mutated
    for key in place[:-1]:
        inner = inner.setdefault(key, {})
    inner[place[-1]] = value
    try:
        spec = spec_from(mutated)
    except BadConfig as refusal:
        message = str(refusal)
    else:
        message = "config.json: "
        assert spec.rope.dim >= 2
        assert hash(spec) == hash(spec_from(mutated))
    assert message.startswith("config.json: ")
