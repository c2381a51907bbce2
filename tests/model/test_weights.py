"""Reading checkpoints: every number arrives exactly, and every fault is named before anything is served."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from brigade.model.stored import Stored
from brigade.model.weights import BadCheckpoint, Checkpoint, dequantize
from brigade.spec.config import spec_from
from brigade.spec.model import ModelSpec
from brigade.spec.params import params

DENSE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "intermediate_size": 36,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
MOE: dict[str, Any] = {
    **DENSE,
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 20,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 8]}
GATE_PROJ = "model.layers.0.mlp.gate_proj.weight"


def tensors(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape).to(dtype) for p in params(spec) for name, shape in p.tensors()}


def single(folder: Path, content: dict[str, Tensor]) -> Path:
    save_file(content, folder / "model.safetensors")
    return folder


def sharded(folder: Path, content: dict[str, Tensor], n: int = 3) -> Path:
    names = sorted(content)
    files = [f"model-{i:05}-of-{n:05}.safetensors" for i in range(n)]
    for i, file in enumerate(files):
        save_file({name: content[name] for name in names[i::n]}, folder / file)
    index(folder, {name: files[i % n] for i, name in enumerate(names)})
    return folder


def index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def fp8(content: dict[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """Every scaled tensor as float8 with random scales."""
    out = dict(content)
    for p in params(spec):
        for name, shape in p.tensors() if p.scaled else ():
            out[name] = content[name].to(torch.float8_e4m3fn)
            out[name + "_scale_inv"] = torch.rand(-(-shape[0] // 16), -(-shape[1] // 8)) + 0.5
    return out


def stacked(content: dict[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    want = {}
    for p in params(spec):
        parts = [content[name].float() for name, _ in p.tensors()]
        want[p.name] = torch.stack(parts) if p.per_expert else parts[0]
    return want


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)


# What is read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("write", [single, sharded])
@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_every_number_arrives_exactly_as_float32(
    tmp_path: Path, config: dict[str, Any], write: Callable[..., Path], dtype: torch.dtype
) -> None:
    spec = spec_from(config)
    content = tensors(spec, dtype)
    got = Checkpoint(write(tmp_path, content), spec).load(torch.float32)
    assert same(got, stacked(content, spec))
    assert {t.dtype for t in got.values()} == {torch.float32}


def test_the_gate_stays_float32_whatever_the_compute_type(tmp_path: Path) -> None:
    spec = spec_from(MOE)
    content = tensors(spec)
    got = Checkpoint(single(tmp_path, content), spec).load(torch.bfloat16)
    exact = {name for name, t in got.items() if t.dtype == torch.float32}
    assert exact == {"model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.e_score_correction_bias"}
    assert all(torch.equal(got[name], content[name]) for name in exact)


def test_float8_weights_are_multiplied_by_their_blocks_scales(tmp_path: Path) -> None:
    spec = spec_from({**MOE, "quantization_config": FP8})
    content = fp8(tensors(spec), spec)
    want = {}
    for name, t in content.items():
        if name.endswith("_scale_inv"):
            continue
        want[name] = t.float()
        if t.dtype == torch.float8_e4m3fn:
            scale = content[name + "_scale_inv"]
            for i in range(t.shape[0]):
                for j in range(t.shape[1]):
                    want[name][i, j] *= scale[i // 16, j // 8]
    assert same(Checkpoint(sharded(tmp_path, content), spec).load(torch.float32), stacked(want, spec))


@pytest.mark.parametrize("shape", [(1, 1), (16, 8), (17, 9), (5, 30)])
def test_blocks_at_the_edges_may_be_cut(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-shape[0] // 16), -(-shape[1] // 8))
    out = torch.empty(shape)
    dequantize(weight, scale, (16, 8), out)
    want = [[float(weight[i, j]) * float(scale[i // 16, j // 8]) for j in range(shape[1])] for i in range(shape[0])]
    assert torch.allclose(out, torch.tensor(want))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "fp8", "mixed"])
def test_progress_grows_and_ends_at_the_total(tmp_path: Path, kind: str) -> None:
    spec = spec_from({**MOE, "quantization_config": FP8})
    content = tensors(spec, torch.bfloat16 if kind == "bfloat16" else torch.float32)
    if kind != "float32" and kind != "bfloat16":
        content = fp8(content, spec)
    if kind == "mixed":
        content["lm_head.weight"] = content["lm_head.weight"].half()
    checkpoint = Checkpoint(single(tmp_path, content), spec)
    heard: list[int] = []
    checkpoint.load(torch.float32, heard.append)
    assert heard == sorted(heard)
    assert heard[0] > 0
    assert heard[-1] == checkpoint.n_bytes()
    weights = sum(t.numel() * t.element_size() for n, t in content.items() if not n.endswith("_scale_inv"))
    assert checkpoint.n_bytes() == weights


def test_only_tensors_of_the_model_are_read(tmp_path: Path) -> None:
    """Multi-token-prediction layers and tables of old exporters stay on the disk."""
    spec = spec_from({**MOE, "num_nextn_predict_layers": 1})
    content = tensors(spec)
    extra = {
        "model.layers.2.eh_proj.weight": torch.zeros(4, 4),
        "model.layers.2.mlp.experts.3.up_proj.weight": torch.zeros(2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2),
    }
    checkpoint = Checkpoint(single(tmp_path, {**content, **extra}), spec)
    read: list[str] = []

    class Spy(dict[str, Stored]):
        def __getitem__(self, name: str) -> Stored:
            read.append(name)
            return super().__getitem__(name)

    checkpoint._stored = Spy(checkpoint._stored)
    checkpoint.load(torch.float32)
    assert sorted(read) == sorted(content)


def test_a_tied_head_that_is_stored_twice_is_fine(tmp_path: Path) -> None:
    spec = spec_from({**DENSE, "tie_word_embeddings": True})
    content = tensors(spec)
    assert "lm_head.weight" not in content
    content["lm_head.weight"] = content["model.embed_tokens.weight"].clone()
    assert "lm_head.weight" not in Checkpoint(single(tmp_path, content), spec).load(torch.float32)


# What is refused


def refused(folder: Path, spec: ModelSpec, *words: str) -> None:
    with pytest.raises(BadCheckpoint) as e:
        Checkpoint(folder, spec)
    assert all(word in str(e.value) for word in words), str(e.value)
    assert "\n" not in str(e.value)


def test_a_folder_without_tensors_is_named(tmp_path: Path) -> None:
    refused(tmp_path, spec_from(DENSE), str(tmp_path), "model.safetensors")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    spec = spec_from(DENSE)
    sharded(tmp_path, tensors(spec))
    (tmp_path / "model-00001-of-00003.safetensors").unlink()
    refused(tmp_path, spec, "model-00001-of-00003.safetensors", "missing")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -4000])
def test_a_truncated_shard_is_named(tmp_path: Path, keep: int) -> None:
    spec = spec_from(DENSE)
    sharded(tmp_path, tensors(spec))
    path = tmp_path / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(tmp_path, spec, path.name, "copy it again")


@pytest.mark.parametrize(
    "content",
    [b"\xff" * 64, b"PK\x03\x04" + bytes(100), (1 << 62).to_bytes(8, "little") + b"{}", b"\x02" + bytes(7) + b"[]"],
    ids=["noise", "a zip of pickles", "huge header", "header that is no object"],
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(tmp_path, spec_from(DENSE), "model.safetensors", "not a safetensors file")


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    refused(tmp_path, spec_from(DENSE), "model.safetensors")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    spec = spec_from(DENSE)
    content = tensors(spec)
    sharded(tmp_path, content)
    save_file({"model.norm.weight": content["model.norm.weight"]}, tmp_path / "more.safetensors")
    index(tmp_path, {"a": "more.safetensors", **{f"b{i}": f"model-{i:05}-of-00003.safetensors" for i in range(3)}})
    refused(tmp_path, spec, "model.norm.weight", "also in")


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "..", "", "model.bin", "x.pt"]
)
def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    single(tmp_path, tensors(spec_from(DENSE)))
    index(inner, {"model.norm.weight": name})
    refused(inner, spec_from(DENSE), "index.json", "plain name")


def test_an_index_with_an_impossible_name_is_refused(tmp_path: Path) -> None:
    index(tmp_path, {"a": "x\0.safetensors"})
    refused(tmp_path, spec_from(DENSE))


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {"a": ["b"]}, "x"])
def test_an_index_of_the_wrong_form_is_refused(tmp_path: Path, weight_map: Any) -> None:
    index(tmp_path, weight_map)
    refused(tmp_path, spec_from(DENSE), "index.json", "weight_map")


def test_an_empty_index_lacks_tensors(tmp_path: Path) -> None:
    index(tmp_path, {})
    refused(tmp_path, spec_from(DENSE), "model.embed_tokens.weight")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    spec = spec_from(MOE)
    content = tensors(spec)
    del content["model.layers.1.mlp.experts.2.up_proj.weight"]
    refused(single(tmp_path, content), spec, "model.layers.1.mlp.experts.2.up_proj.weight", str(tmp_path))


@pytest.mark.parametrize("shape", [(36, 25), (24, 36), (36 * 24,), (36, 24, 1)])
def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    spec = spec_from(DENSE)
    content = {**tensors(spec), GATE_PROJ: torch.zeros(shape)}
    refused(single(tmp_path, content), spec, GATE_PROJ, str(list(shape)), "[36, 24]", "model.safetensors", "copy")


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.mlp.bias", "model.layers.x.y", "model", "lora_A"]
)
def test_a_tensor_that_is_not_part_of_the_model_is_named(tmp_path: Path, name: str) -> None:
    for config in (DENSE, MOE):
        spec = spec_from(config)
        folder = tmp_path / config["architectures"][0]
        folder.mkdir()
        refused(single(folder, {**tensors(spec), name: torch.zeros(1)}), spec, name, "not part of")


def test_extra_layers_are_fine_only_as_far_as_the_config_says_so(tmp_path: Path) -> None:
    spec = spec_from({**MOE, "num_nextn_predict_layers": 1})
    content = {**tensors(spec), "model.layers.3.eh_proj.weight": torch.zeros(1)}
    refused(single(tmp_path, content), spec, "model.layers.3.eh_proj.weight")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.bool, torch.uint8, torch.int64])
def test_a_type_that_cannot_be_served_is_named(tmp_path: Path, dtype: torch.dtype) -> None:
    spec = spec_from(DENSE)
    content = {**tensors(spec), GATE_PROJ: torch.zeros(36, 24).to(dtype)}
    refused(single(tmp_path, content), spec, GATE_PROJ, "cannot be served")


def test_float8_without_a_quantization_config_is_refused(tmp_path: Path) -> None:
    plain, scaled = spec_from(MOE), spec_from({**MOE, "quantization_config": FP8})
    refused(single(tmp_path, fp8(tensors(plain), scaled)), plain, "quantization_config")


def test_float8_without_scales_is_refused(tmp_path: Path) -> None:
    spec = spec_from({**MOE, "quantization_config": FP8})
    content = fp8(tensors(spec), spec)
    del content[GATE_PROJ + "_scale_inv"]
    refused(single(tmp_path, content), spec, GATE_PROJ + "_scale_inv", "missing")


@pytest.mark.parametrize("shape", [(3, 4), (2, 3), (1,), (36, 24)])
def test_scales_of_the_wrong_shape_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    spec = spec_from({**MOE, "quantization_config": FP8})
    content = {**fp8(tensors(spec), spec), GATE_PROJ + "_scale_inv": torch.ones(shape)}
    refused(single(tmp_path, content), spec, GATE_PROJ + "_scale_inv", str(list(shape)), "[3, 3]")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.gate.weight"])
def test_float8_where_no_scales_belong_is_refused(tmp_path: Path, name: str) -> None:
    spec = spec_from({**MOE, "quantization_config": FP8})
    content = tensors(spec)
    content[name] = content[name].to(torch.float8_e4m3fn)
    refused(single(tmp_path, content), spec, name)


def test_scales_beside_weights_that_are_not_float8_are_not_ignored(tmp_path: Path) -> None:
    """They would change what the model computes, so leaving them out cannot be right."""
    spec = spec_from({**MOE, "quantization_config": FP8})
    content = {**tensors(spec), GATE_PROJ + "_scale_inv": torch.full((3, 3), 7.0)}
    refused(single(tmp_path, content), spec, GATE_PROJ)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_scales_of_a_type_that_is_no_number_with_a_fraction_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    spec = spec_from({**MOE, "quantization_config": FP8})
    content = {**fp8(tensors(spec), spec), GATE_PROJ + "_scale_inv": torch.ones(3, 3).to(dtype)}
    refused(single(tmp_path, content), spec, GATE_PROJ + "_scale_inv")


def test_a_missing_tensor_is_found_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_from(DENSE)
    content = tensors(spec)
    del content["lm_head.weight"]
    monkeypatch.setattr(Checkpoint, "_copy", lambda *_: pytest.fail("a tensor was read"))
    refused(single(tmp_path, content), spec, "lm_head.weight")


def test_what_was_loaded_does_not_change_with_the_file(tmp_path: Path) -> None:
    spec = spec_from(DENSE)
    got = Checkpoint(single(tmp_path, tensors(spec)), spec).load(torch.float32)
    before = {k: v.clone() for k, v in got.items()}
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    with (tmp_path / "model.safetensors").open("r+b") as f:
        f.write(bytes(len(data)))
    assert same(got, before)


@pytest.mark.parametrize("stored", ["bfloat16", "float32", "fp8"])
def test_experts_that_are_read_one_by_one_are_those_that_are_read_stacked(tmp_path: Path, stored: str) -> None:
    spec = spec_from(MOE | {"quantization_config": FP8} if stored == "fp8" else MOE)
    content = tensors(spec, torch.float32 if stored == "fp8" else getattr(torch, stored))
    single(tmp_path, fp8(content, spec) if stored == "fp8" else content)
    checkpoint, name, heard = Checkpoint(tmp_path, spec, [[3, 0, 3]]), "model.layers.1.mlp.experts.*.up_proj.weight", []
    experts = checkpoint.reader(torch.bfloat16, heard.append).experts(name)
    assert len(experts) == 3
    assert not heard, "nothing is read before its turn"
    assert torch.equal(torch.stack(list(experts)), checkpoint.reader(torch.bfloat16)(name))
    assert len(heard) == 3
    assert heard[0] > 0


def test_a_file_that_is_cut_short_while_it_is_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    spec = spec_from(DENSE)
    checkpoint = Checkpoint(single(tmp_path, tensors(spec)), spec)
    os.truncate(tmp_path / "model.safetensors", 3000)
    with pytest.raises(BadCheckpoint, match=r"model\.safetensors: was cut short"):
        checkpoint.load(torch.float32)


def test_only_the_experts_of_own_slots_are_read_in_their_order_and_as_often(tmp_path: Path) -> None:
    spec = spec_from(MOE)
    content = tensors(spec)
    whole, part = Checkpoint(single(tmp_path, content), spec), Checkpoint(tmp_path, spec, [[3, 0, 3]])
    name = "model.layers.1.mlp.experts.*.up_proj.weight"
    assert torch.equal(part.load(torch.float32)[name], whole.load(torch.float32)[name][[3, 0, 3]])
    assert whole.n_bytes() - part.n_bytes() == 3 * 4 * 24 * 20
