"""Reads a Hugging Face config.json into a ModelSpec, strictly: a missing or unknown key is an error that names it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from brigade.spec.model import Dtype, Gqa, Llama3Rope, Mla, ModelSpec, Moe, Rope, Yarn

# Keys that describe training, tooling or other programs' defaults: no value of theirs changes what a token computes.
WITHOUT_EFFECT = frozenset(
    """
    _name_or_path _attn_implementation_autoset attention_dropout auto_map bos_token_id ep_size
    initializer_range is_llama_config max_window_layers model_type output_router_logits pad_token_id
    pretraining_tp router_aux_loss_coef seq_aux aux_loss_alpha sliding_window transformers_version use_cache
    architectures tokenizer_class task_specific_params transformers.js_config unsloth_fixed chunk_size_feed_forward
    id2label label2id is_encoder_decoder output_attentions output_hidden_states problem_type return_dict
    """.split()  # noqa: SIM905
)


MOST_JSON_BYTES = 1 << 27


class BadConfig(ValueError):
    """A config.json that Brigade cannot serve. The message names the file, the key and what to do."""


def read_spec(folder: Path, drafts: int = 0) -> ModelSpec:
    """Read `folder`/config.json (and eos ids from generation_config.json). `drafts`: tokens that the model's own
    multi-token-prediction layer is to draft in a step. Raises BadConfig, also if it has none."""
    path = folder / "config.json"
    config = read_json(path)
    generation = folder / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.exists() else None
    spec = spec_from(config, str(path), _token_ids(eos, str(generation)) or None)
    if drafts and not spec.n_mtp:
        raise BadConfig(
            f"{path}: drafts is {drafts}, but the model has no multi-token-prediction layer to draft with "
            "(num_nextn_predict_layers); leave drafts at 0"
        )
    return replace(spec, drafting=drafts > 0)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or BadConfig naming the file."""
    try:
        if path.exists() and not path.is_file():
            raise BadConfig(f"{path}: is not a regular file; give a folder with a Hugging Face checkpoint")
        if path.exists() and path.stat().st_size > MOST_JSON_BYTES:
            raise BadConfig(f"{path}: is longer than {MOST_JSON_BYTES} bytes, which no checkpoint's is")
        value = json.loads(path.read_bytes())
    except OSError as e:
        raise BadConfig(f"{path}: cannot be read ({e.strerror}); give a folder with a Hugging Face checkpoint") from e
    except BadConfig:
        raise
    except (ValueError, RecursionError) as e:
        raise BadConfig(f"{path}: not valid JSON ({e}); download the file again") from e
    if not isinstance(value, dict):
        raise BadConfig(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def spec_from(config: dict[str, Any], where: str = "config.json", eos: tuple[int, ...] | None = None) -> ModelSpec:
    """Build a ModelSpec from a config.json's content; `eos` overrides its eos_token_id. Raises BadConfig."""
    keys = _Keys(config, where)
    architectures = keys.take("architectures", _list_of_str)
    known = {"DeepseekV3ForCausalLM": _deepseek, "LlamaForCausalLM": _llama, "Qwen2ForCausalLM": _qwen2}
    build = known.get(architectures[0]) if len(architectures) == 1 else None
    if build is None:
        raise BadConfig(f"{where}: architectures {architectures} is not supported; supported: {', '.join(known)}")
    own_eos = _token_ids(keys.take("eos_token_id", _any, None), where)
    spec = build(keys, architectures[0], own_eos if eos is None else eos)
    keys.finish()
    _check(spec, where)
    return spec


class _Keys:
    """Takes keys out of a config one by one, so that what is left over is unknown."""

    def __init__(self, config: dict[str, Any], where: str) -> None:
        self.left = dict(config)
        self.where = where

    def take(self, key: str, kind: Callable[[Any], Any], *default: Any) -> Any:
        if key not in self.left:
            if default:
                return default[0]
            raise BadConfig(f"{self.where}: key '{key}' is missing; it has no default")
        value = self.left.pop(key)
        try:
            return kind(value)
        except (TypeError, ValueError) as e:
            raise BadConfig(f"{self.where}: key '{key}' is {value!r}; {e}") from e

    def must_be(self, key: str, *allowed: Any) -> None:
        """A key that may be absent, and of which only some values are implemented."""
        if key not in self.left:
            return
        value = self.left.pop(key)
        if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
            raise BadConfig(f"{self.where}: key '{key}' must be {' or '.join(map(repr, allowed))} to be served")

    def finish(self) -> None:
        unknown = sorted(set(self.left) - WITHOUT_EFFECT)
        if unknown:
            raise BadConfig(
                f"{self.where}: unknown key '{unknown[0]}' ({len(unknown)} unknown in all); it may change what the "
                "model computes, so it is not ignored; remove it if you know that it does not"
            )


def _deepseek(k: _Keys, architecture: str, eos_ids: tuple[int, ...]) -> ModelSpec:
    k.must_be("attention_bias", False)
    k.must_be("scoring_func", "sigmoid")
    k.must_be("topk_method", "noaux_tc")
    k.must_be("moe_layer_freq", 1)
    n_heads = k.take("num_attention_heads", _positive)
    k.must_be("num_key_value_heads", n_heads)
    attention = Mla(
        n_heads=n_heads,
        q_rank=k.take("q_lora_rank", _positive_or_none),
        kv_rank=k.take("kv_lora_rank", _positive),
        nope=k.take("qk_nope_head_dim", _positive),
        rope=k.take("qk_rope_head_dim", _even),
        v=k.take("v_head_dim", _positive),
    )
    k.must_be("head_dim", attention.rope, attention.qk)
    k.must_be("qk_head_dim", attention.qk)
    n_experts = k.take("n_routed_experts", _count)
    k.must_be("num_local_experts", n_experts)
    moe = Moe(
        n_experts=n_experts,
        n_shared=k.take("n_shared_experts", _natural_or_none) or 0,
        top_k=k.take("num_experts_per_tok", _positive),
        ffn=k.take("moe_intermediate_size", _positive),
        n_groups=(n_groups := k.take("n_group", _positive_or_none) or 1),
        top_groups=k.take("topk_group", _positive if n_groups > 1 else _positive_or_none) or 1,
        route_scale=k.take("routed_scaling_factor", _positive_float),
        norm_weights=k.take("norm_topk_prob", _bool),
    )
    interleaved = k.take("rope_interleave", _bool, True)
    n_layers = k.take("num_hidden_layers", _count)
    n_dense = min(k.take("first_k_dense_replace", _natural), n_layers)
    return _model(
        k,
        architecture,
        eos_ids,
        attention,
        lambda: _rope(k, attention.rope, interleaved),
        n_layers=n_layers,
        n_dense=n_dense,
        moe=moe if n_dense < n_layers else None,
        n_mtp=k.take("num_nextn_predict_layers", _natural, 0),
    )


def _llama(k: _Keys, architecture: str, eos_ids: tuple[int, ...]) -> ModelSpec:
    k.must_be("attention_bias", False)
    k.must_be("mlp_bias", False)
    k.must_be("rope_interleaved", False)
    return _dense(k, architecture, eos_ids, qkv_bias=False)


def _qwen2(k: _Keys, architecture: str, eos_ids: tuple[int, ...]) -> ModelSpec:
    k.must_be("use_sliding_window", False)
    k.must_be("use_mrope", False)
    layers = k.take("layer_types", _list_of_str, [])
    if set(layers) - {"full_attention"}:
        raise BadConfig(f"{k.where}: key 'layer_types' holds {sorted(set(layers))}; only full_attention can be served")
    return _dense(k, architecture, eos_ids, qkv_bias=True)


def _dense(k: _Keys, architecture: str, eos_ids: tuple[int, ...], *, qkv_bias: bool) -> ModelSpec:
    n_heads = k.take("num_attention_heads", _positive)
    n_kv_heads = k.take("num_key_value_heads", _positive_or_none) or n_heads
    dim = k.left.get("hidden_size")
    head_dim = k.take("head_dim", _positive_or_none, None) or (dim // n_heads if isinstance(dim, int) else 2)
    n_layers = k.take("num_hidden_layers", _count)
    attention = Gqa(n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, qkv_bias=qkv_bias)
    return _model(
        k,
        architecture,
        eos_ids,
        attention,
        lambda: _rope(k, head_dim, interleaved=False),
        n_layers=n_layers,
        n_dense=n_layers,
        moe=None,
        n_mtp=0,
    )


def _model(
    k: _Keys,
    architecture: str,
    eos_ids: tuple[int, ...],
    attention: Mla | Gqa,
    rope: Callable[[], Rope],
    *,
    n_layers: int,
    n_dense: int,
    moe: Moe | None,
    n_mtp: int,
) -> ModelSpec:
    """The keys that every architecture shares."""
    k.must_be("hidden_act", "silu")
    return ModelSpec(
        architecture=architecture,
        vocab=k.take("vocab_size", _positive),
        dim=k.take("hidden_size", _positive),
        n_layers=n_layers,
        n_dense=n_dense,
        context=k.take("max_position_embeddings", _positive),
        attention=attention,
        rope=rope(),
        ffn=k.take("intermediate_size", _positive),
        moe=moe,
        norm_eps=k.take("rms_norm_eps", _positive_float),
        tied_head=k.take("tie_word_embeddings", _bool, False),
        n_mtp=n_mtp,
        dtype=_dtype(k),
        block_scale=_block_scale(k),
        eos_ids=eos_ids,
    )


def _dtype(k: _Keys) -> Dtype:
    """transformers 4 writes `torch_dtype`, transformers 5 writes `dtype`; float32 is what both mean by neither."""
    old, new = k.take("torch_dtype", _dtype_or_none, None), k.take("dtype", _dtype_or_none, None)
    if old and new and old != new:
        raise BadConfig(f"{k.where}: 'torch_dtype' is {old} but 'dtype' is {new}; keep one")
    return cast(Dtype, new or old or "float32")


def _block_scale(k: _Keys) -> tuple[int, int] | None:
    quant = k.take("quantization_config", _dict_or_none, None)
    if quant is None:
        return None
    q = _Keys(quant, f"{k.where}: quantization_config")
    if (method := q.take("quant_method", str)) != "fp8":
        raise BadConfig(f"{q.where}: key 'quant_method' is '{method}'; only fp8 can be served")
    q.must_be("fmt", "e4m3")
    q.must_be("activation_scheme", "dynamic")  # activations are not quantised here: weights are dequantised at load
    q.must_be("scale_fmt", "ue8m0", "float", None)
    q.must_be("modules_to_not_convert", None, [], ["lm_head"])
    rows, cols = q.take("weight_block_size", _pair)
    q.finish()
    return rows, cols


def _rope(k: _Keys, dim: int, interleaved: bool) -> Rope:
    """transformers 4 writes `rope_theta` and `rope_scaling`; transformers 5 puts both into `rope_parameters`."""
    new = k.take("rope_parameters", _dict_or_none, None)
    old_theta = k.take("rope_theta", _positive_float, None)
    old = k.take("rope_scaling", _dict_or_none, None)
    if new is not None and (old is not None or old_theta is not None):
        raise BadConfig(f"{k.where}: 'rope_parameters' and 'rope_theta'/'rope_scaling' are both given; keep one")
    r = _Keys(new or old or {}, f"{k.where}: {'rope_parameters' if new else 'rope_scaling'}")
    theta = r.take("rope_theta", _positive_float) if new else old_theta
    if theta is None:
        raise BadConfig(f"{k.where}: key 'rope_theta' is missing; it has no default")
    r.must_be("partial_rotary_factor", 1.0, None)
    new_name, old_name = r.take("rope_type", str, None), r.take("type", str, None)  # older files say "type", some both
    if new_name and old_name and new_name != old_name:
        raise BadConfig(f"{r.where}: 'rope_type' is {new_name} but 'type' is {old_name}; keep one")
    scaling = _scaling(r, new_name or old_name or "default")
    r.finish()
    return Rope(dim=dim, theta=theta, interleaved=interleaved, scaling=scaling)


def _scaling(r: _Keys, kind: str) -> Yarn | Llama3Rope | None:
    if kind == "default":
        return None
    if kind == "yarn":
        r.must_be("attention_factor", None)
        r.must_be("truncate", True)
        return Yarn(
            factor=r.take("factor", _positive_float),
            original_context=r.take("original_max_position_embeddings", _positive),
            beta_fast=r.take("beta_fast", _positive_float, 32.0),
            beta_slow=r.take("beta_slow", _positive_float, 1.0),
            mscale=r.take("mscale", _natural_float, 0.0),
            mscale_all_dim=r.take("mscale_all_dim", _natural_float, 0.0),
        )
    if kind == "llama3":
        llama3 = Llama3Rope(
            factor=r.take("factor", _positive_float),
            low_freq_factor=r.take("low_freq_factor", _positive_float),
            high_freq_factor=r.take("high_freq_factor", _positive_float),
            original_context=r.take("original_max_position_embeddings", _positive),
        )
        if llama3.low_freq_factor >= llama3.high_freq_factor:
            raise BadConfig(f"{r.where}: low_freq_factor must be less than high_freq_factor")
        return llama3
    raise BadConfig(f"{r.where}: rope type '{kind}' is not supported; supported: default, yarn, llama3")


def _check(s: ModelSpec, where: str) -> None:
    """Numbers that must fit each other."""
    if any(e >= s.vocab for e in s.eos_ids):
        raise BadConfig(f"{where}: eos_token_id {list(s.eos_ids)} holds a token beyond vocab_size {s.vocab}")
    if isinstance(s.attention, Gqa):
        if s.attention.n_heads % s.attention.n_kv_heads:
            raise BadConfig(f"{where}: num_attention_heads must be a multiple of num_key_value_heads")
        if s.rope.dim % 2 or not s.rope.dim:
            raise BadConfig(f"{where}: head_dim (hidden_size / num_attention_heads) must be even, not {s.rope.dim}")
    m = s.moe
    if m is None:
        return
    if m.n_experts % m.n_groups:
        raise BadConfig(f"{where}: n_routed_experts must be a multiple of n_group")
    if m.top_groups > m.n_groups:
        raise BadConfig(f"{where}: topk_group is {m.top_groups}, more than n_group {m.n_groups}")
    if m.top_k > m.top_groups * (m.n_experts // m.n_groups):
        raise BadConfig(f"{where}: num_experts_per_tok is {m.top_k}, more than the experts of topk_group groups")
    if m.n_groups > 1 and m.n_experts // m.n_groups < 2:
        raise BadConfig(f"{where}: each of the n_group groups needs at least 2 experts")


def _token_ids(value: Any, where: str) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise BadConfig(f"{where}: key 'eos_token_id' is {value!r}; it must be a token id or a list of them")
    return tuple(ids)


def _any(v: Any) -> Any:
    return v


def _natural(v: Any) -> int:
    if not isinstance(v, int) or isinstance(v, bool) or v < 0 or v > 1 << 40:
        raise ValueError("it must be a whole number, 0 or more")
    return v


def _natural_or_none(v: Any) -> int | None:
    return None if v is None else _natural(v)


def _positive(v: Any) -> int:
    if _natural(v) == 0:
        raise ValueError("it must be at least 1")
    return int(v)


def _count(v: Any) -> int:
    """Of things that are listed one by one: a bound keeps a wrong number from filling the memory."""
    if _positive(v) > 1 << 16:
        raise ValueError(f"it must be at most {1 << 16}")
    return int(v)


def _dtype_or_none(v: Any) -> str | None:
    if v is not None and v not in ("bfloat16", "float16", "float32"):
        raise ValueError("it must be bfloat16, float16 or float32")
    return cast(str | None, v)


def _positive_or_none(v: Any) -> int | None:
    return None if v is None else _positive(v)


def _even(v: Any) -> int:
    if _positive(v) % 2:
        raise ValueError("it must be even")
    return int(v)


def _natural_float(v: Any) -> float:
    if not isinstance(v, (int, float)) or isinstance(v, bool) or not 0 <= v <= 1e30:
        raise ValueError("it must be a number from 0 to 1e30")
    return float(v)


def _positive_float(v: Any) -> float:
    if _natural_float(v) == 0:
        raise ValueError("it must be greater than 0")
    return float(v)


def _bool(v: Any) -> bool:
    if not isinstance(v, bool):
        raise ValueError("it must be true or false")
    return v


def _list_of_str(v: Any) -> list[str]:
    if not isinstance(v, list) or not all(isinstance(x, str) for x in v):
        raise ValueError("it must be a list of strings")
    return v


def _dict_or_none(v: Any) -> dict[str, Any] | None:
    if v is not None and not isinstance(v, dict):
        raise ValueError("it must be an object or null")
    return v


def _pair(v: Any) -> tuple[int, int]:
    if not isinstance(v, list) or len(v) != 2:
        raise ValueError("it must be a list of two numbers")
    return _positive(v[0]), _positive(v[1])
