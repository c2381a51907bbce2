"""Tiny random checkpoints, written by transformers, for the parity tests. Sizes are odd on purpose."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB = 160

V3 = {
    "vocab_size": VOCAB,
    "hidden_size": 72,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "intermediate_size": 112,
    "moe_intermediate_size": 40,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "max_position_embeddings": 512,
    "routed_scaling_factor": 2.5,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.8,
    "mscale_all_dim": 1.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DENSE = {
    "vocab_size": VOCAB,
    "hidden_size": 72,
    "num_hidden_layers": 3,
    "intermediate_size": 112,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "v3 with group-limited routing": lambda: _v3(topk_group=2),
    "v3 without groups": lambda: _v3(n_group=1, topk_group=1),
    "v3 with yarn": lambda: _v3(rope_parameters=YARN),
    "v3 without q_lora": lambda: _v3(q_lora_rank=None),
    "v3 with two shared experts, unnormalised weights, no dense layer": lambda: _v3(
        n_shared_experts=2, norm_topk_prob=False, first_k_dense_replace=0
    ),
    "v3 with a wide latent": lambda: _v3(kv_lora_rank=84),
    "v3 with half-split rotary, all layers dense": lambda: _v3(rope_interleave=False, first_k_dense_replace=3),
    "v3 in fp8 blocks, dequantised": lambda: _v3(hidden_size=200, intermediate_size=264, moe_intermediate_size=136),
    "llama": lambda: _randomised(LlamaForCausalLM(LlamaConfig(**DENSE))),
    "llama with llama3 rope and a tied head": lambda: _randomised(
        LlamaForCausalLM(LlamaConfig(**DENSE, rope_parameters=LLAMA3, tie_word_embeddings=True, head_dim=16))
    ),
    "qwen2": lambda: _randomised(Qwen2ForCausalLM(Qwen2Config(**DENSE))),
}


def make(kind: str, folder: Path) -> PreTrainedModel:
    """Write the checkpoint of one kind and return the transformers model that it came from."""
    torch.manual_seed(hash(len(kind)))
    model = MODELS[kind]()
    model.save_pretrained(folder)
    return model


def quantize_fp8(source: Path, fp8: Path, twin: Path, block: int = 128) -> None:
    """Write `source` once as DeepSeek's block-scaled FP8 and once as the float32 numbers those bytes stand for."""
    tensors = load_file(source / "model.safetensors")
    as_fp8, as_twin = {}, {}
    for name, w in tensors.items():
        scaled = name.endswith("_proj.weight") or name.endswith("kv_a_proj_with_mqa.weight")
        if not scaled:
            as_fp8[name] = as_twin[name] = w
            continue
        as_fp8[name], as_fp8[name + "_scale_inv"], as_twin[name] = _blocks(w, block)
    quant = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    for folder, content, extra in (fp8, as_fp8, {"quantization_config": quant}), (twin, as_twin, {}):
        folder.mkdir()
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((source / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **extra}))


def _blocks(w: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise block by block, in plain loops: an implementation of its own, to hold the loader against."""
    q = torch.empty_like(w, dtype=torch.float8_e4m3fn)
    twin = torch.empty_like(w)
    scale = torch.empty(-(-w.shape[0] // block), -(-w.shape[1] // block))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            scale[i, j] = w[at].abs().max() / 448
            q[at] = (w[at] / scale[i, j]).to(torch.float8_e4m3fn)
            twin[at] = q[at].float() * scale[i, j]
    return q, scale, twin


def _v3(**changes: Any) -> PreTrainedModel:
    return _randomised(DeepseekV3ForCausalLM(DeepseekV3Config(**{**V3, **changes})))


def _randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Weights large enough for clear greedy choices; norms that are not 1 and biases that are not 0."""
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if "e_score_correction_bias" in name:
                p.uniform_(0, 0.1)
            elif p.ndim == 1 and "inv_freq" not in name:
                p.normal_(1.0 if "norm" in name else 0.0, 0.1)
            elif p.ndim >= 2:
                p.normal_(0, 1.5 * p.shape[-1] ** -0.5)
    return model.eval()
