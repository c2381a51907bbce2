"""Writes a checkpoint with random weights in DeepSeek-V3's layout, the same for the same seed. Must not run a model.

    python -m bench.make_checkpoint /tmp/mid                   1.26 B parameters, 0.26 B active: the one of the tables
    python -m bench.make_checkpoint /tmp/tiny --preset tiny    0.6 M parameters: for trying the scripts
    python -m bench.make_checkpoint /tmp/mid-mtp --mtp         with a multi-token-prediction layer: what drafts cost

Speed depends on shapes and not on what the weights mean, so random ones serve; they are drawn so that activations keep
their size through the layers and greedy choices have margins above rounding. Every reader of Hugging Face checkpoints
can load the result: safetensors shards with an index, config.json, generation_config.json, a byte-level BPE tokenizer
trained on Python's own standard library, a chat template.
"""

import argparse
import hashlib
import json
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from brigade.spec.config import read_spec
from brigade.spec.model import ModelSpec
from brigade.spec.params import active, count, params

PRESETS: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "vocab_size": 2048,
        "max_position_embeddings": 1024,
    },
    "mid": {
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "first_k_dense_replace": 1,
        "intermediate_size": 4096,
        "moe_intermediate_size": 512,
        "n_routed_experts": 64,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "q_lora_rank": 768,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "vocab_size": 32000,
        "max_position_embeddings": 8192,
    },
}

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
CONTROL = (BOS, EOS, PAD, USER, ASSISTANT, "<think>", "</think>")
"""Control tokens in the order of their ids."""

CHAT_TEMPLATE = (
    "{% if add_generation_prompt is not defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}" + "{{ '" + USER + "' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    + "{{ '"
    + ASSISTANT
    + "' + message['content'] + '"
    + EOS
    + "' }}"
    + "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}" + "{{ '" + ASSISTANT + "' }}" + "{% endif %}"
)

WEIGHT_STD = 0.02
HEAD_STD = 0.08
"""Of the output head: wide enough that the best token leads by more than rounding: greedy texts can be compared."""
NORM_STD = 0.05
"""Norm weights scatter around 1: a norm that is forgotten then shows in the output."""
BIAS_STD = 0.02

SMALL_VOCAB = 8192
"""Up to this many tokens a quarter of the sources is plenty to train on."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def make_checkpoint(folder: Path, preset: str, seed: int, shard_bytes: int, mtp: bool = False) -> dict[str, Any]:
    """Write the checkpoint into `folder`, which must not hold one yet, and say what it is. `mtp`: with one
    multi-token-prediction layer; the other tensors are the same with it and without.

    Raises ValueError for an unknown preset and FileExistsError if there is a config.json already.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, not {preset!r}")
    if (folder / "config.json").exists():
        raise FileExistsError(f"{folder}: already holds a checkpoint; give another folder or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    sizes = PRESETS[preset]
    write_tokenizer(folder, sizes["vocab_size"])
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1, "do_sample": False})
    # config.json comes before the weights because the table of parameters is read from it
    write_json(folder / "config.json", config(sizes) | {"num_nextn_predict_layers": int(mtp)})
    spec = read_spec(folder, drafts=int(mtp))
    write_weights(folder, list(tensors(spec)), seed, shard_bytes)
    return {"preset": preset, "seed": seed, "parameters": count(spec), "active_parameters": round(active(spec))}


def config(sizes: dict[str, int]) -> dict[str, Any]:
    """A config.json with the keys that DeepSeek-V3's has."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **sizes,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": CONTROL.index(BOS),
        "eos_token_id": CONTROL.index(EOS),
        "ep_size": 1,
        "hidden_act": "silu",
        "initializer_range": WEIGHT_STD,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def tensors(spec: ModelSpec) -> Iterator[Tensor]:
    """Every tensor of the model; the gate's bias is float32, as DeepSeek stores it."""
    for param in params(spec):
        dtype = torch.float32 if param.name.endswith("e_score_correction_bias") else torch.bfloat16
        for name, shape in param.tensors():
            yield Tensor(name, shape, dtype)


def draw(tensor: Tensor, seed: int) -> torch.Tensor:
    """The values of one tensor. They depend on the seed and its name alone, not on the order or the shards."""
    digest = hashlib.sha256(f"{seed} {tensor.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    values = torch.randn(tensor.shape, generator=generator)
    if tensor.name.endswith("e_score_correction_bias"):
        values *= BIAS_STD
    elif tensor.name.endswith("norm.weight"):
        values = 1 + NORM_STD * values
    else:
        values *= HEAD_STD if tensor.name.startswith("lm_head") else WEIGHT_STD
    return values.to(tensor.dtype)


def write_weights(folder: Path, all_tensors: list[Tensor], seed: int, shard_bytes: int) -> None:
    """Write the shards one by one, so that memory holds one at most, and the index that says what is where."""
    shards = cut(all_tensors, shard_bytes)
    where: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file({t.name: draw(t, seed) for t in shard}, folder / file, metadata={"format": "pt"})
        where |= {t.name: file for t in shard}
    total = sum(t.n_bytes for t in all_tensors)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def cut(all_tensors: list[Tensor], shard_bytes: int) -> list[list[Tensor]]:
    """Runs of tensors of at most `shard_bytes` (a larger tensor stands alone)."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in all_tensors:
        if shards[-1] and size + tensor.n_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.n_bytes
    return shards


def write_tokenizer(folder: Path, vocab: int) -> None:
    """Train a byte-level BPE of exactly `vocab` tokens and write it with its chat template.

    It cuts text into words as DeepSeek-V3's does, so that programs which know that cut by name can be told so.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    cuts = (
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(c), "isolated") for c in cuts]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sources(every=4 if vocab <= SMALL_VOCAB else 1), trainer)
    missing = vocab - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<｜filler {i}｜>" for i in range(missing)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, CONTROL.index(BOS))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings)


def sources(every: int) -> Iterator[str]:
    """Texts of the standard library's modules, one in `every`, always in the same order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(f for pattern in ("*.py", "*/*.py") for f in root.glob(pattern) if "site-packages" not in f.parts)
    for file in files[::every]:
        yield file.read_text(encoding="utf-8", errors="replace")  # a few are kept in other encodings on purpose


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(args: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="bench.make_checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write it")
    parser.add_argument("--preset", choices=list(PRESETS), default="mid")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--shard-bytes", type=int, default=1_000_000_000)
    parser.add_argument("--mtp", action="store_true", help="with one multi-token-prediction layer")
    a = parser.parse_args(args)
    start = time.monotonic()
    try:
        made = make_checkpoint(a.folder, a.preset, a.seed, a.shard_bytes, a.mtp)
    except (OSError, ValueError) as e:
        print(e, file=sys.stderr)
        return 1
    print(json.dumps(made | {"seconds": round(time.monotonic() - start, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
