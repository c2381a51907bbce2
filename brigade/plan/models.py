"""Which models the planner knows: by name, or from any config.json that says enough about shapes.

The loader's reader (spec/config.py) refuses whatever it cannot run. The planner only needs sizes, so its reader is
wider; what it reads this way is for planning and never reaches the loader.
"""

import json
import os.path
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from brigade.spec.config import BadConfig, read_json, read_spec
from brigade.spec.model import Gqa, Mla, ModelSpec, Moe, Rope
from brigade.spec.params import active, count
from brigade.spec.work import PRECISIONS, Facts, Precision, facts

RUN = frozenset(("deepseek_v3", "kimi_k2", "llama", "qwen2"))
"""Model types that the loader reads: Kimi-K2's checkpoints name DeepSeek-V3's architecture."""


class BadModel(ValueError):
    """A model that is not known. The message names the nearest one."""


@dataclass(frozen=True)
class Model:
    """A model as the planner sees it."""

    name: str
    spec: ModelSpec
    stored: str
    """Precision in which its authors publish the weights."""
    source: str
    window: int = 0
    windowed: float = 0.0
    """Share of layers that look back `window` positions only."""
    runs: bool = False
    """Brigade itself serves this architecture."""
    folder: str = ""
    """Where its config.json was read; empty: shipped with the planner."""

    def facts(self, precision: Precision) -> Facts:
        return facts(self.spec, precision, self.window, self.windowed)

    @property
    def found_by(self) -> str:
        """What find_model finds it by."""
        return self.folder or self.name

    @property
    def n_experts(self) -> int:
        """Routed experts of a layer."""
        return self.spec.moe.n_experts if self.spec.moe else 0

    @property
    def billions(self) -> tuple[float, float]:
        """Parameters, and those a token multiplies by, in billions."""
        return count(self.spec) / 1e9, active(self.spec) / 1e9


@lru_cache(maxsize=1)
def known() -> dict[str, Model]:
    """The models shipped with the planner, by each of their names."""
    text = (resources.files("brigade.plan") / "data/models.json").read_text(encoding="utf-8")
    out: dict[str, Model] = {}
    for entry in json.loads(text):
        runs = entry["config"]["model_type"] in RUN
        model = replace(_model(entry["config"], entry["name"], entry["precision"], entry["source"]), runs=runs)
        out |= dict.fromkeys((entry["name"], *entry["also"]), model)
    return out


def find_model(name: str) -> Model:
    """By name, or from a folder with a config.json (or that file). Raises BadModel or BadConfig."""
    path = Path(name)
    if path.name == "config.json":
        path = path.parent
    if os.path.isfile(path / "config.json"):  # also where the name is no path at all
        return _local(path)
    key = name.lower().rsplit("/", 1)[-1].removesuffix("-instruct").replace("_", "-")
    models = known()
    if key in models:
        return models[key]
    if (short := key.removeprefix("deepseek-")) in models:
        return models[short]
    near = get_close_matches(key, models, 1, 0.0)[0]
    raise BadModel(f"model '{name[:60]}' is not known; the nearest is {near} (or give a folder with its config.json)")


def _local(folder: Path) -> Model:
    where, at = str(folder / "config.json"), str(folder.absolute())
    try:
        spec = read_spec(folder)
    except BadConfig:
        config = read_json(folder / "config.json")
        return replace(_model(config, folder.name or str(folder), _stored(config), where), folder=at)
    stored = "fp8" if spec.block_scale else "bf16"
    return Model(folder.name or str(folder), spec, stored, where, runs=True, folder=at)


def _stored(config: dict[str, Any]) -> str:
    quant = config.get("quantization_config")
    method = quant.get("quant_method", "") if isinstance(quant, dict) else ""
    return {"fp8": "fp8", "mxfp4": "fp4", "compressed-tensors": "int4", "awq": "int4", "gptq": "int4"}.get(
        method, "bf16"
    )


def _model(config: dict[str, Any], name: str, stored: str, source: str) -> Model:
    window = config.get("sliding_window") or 0
    is_windowed = config["model_type"] == "gpt_oss" if "model_type" in config else False
    share = 0.5 if is_windowed else 0.0  # gpt-oss: every second layer
    return Model(name, wide_spec(config, source), stored, source, window if share else 0, share)


def wide_spec(config: dict[str, Any], where: str) -> ModelSpec:
    """Sizes from a config.json of a known family, ignoring keys that do not change them. Raises BadConfig.

    Small vectors that only some families have (norms of query and key, biases, sinks) are not counted: under 0.01 %.
    """

    def take(*keys: str, default: int | None = None) -> int:
        for key in keys:
            value = config.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31:
                return value
        if default is None:
            raise BadConfig(f"{where}: key '{keys[0]}' is missing or not a number; the planner needs it")
        return default

    heads, dim, layers = take("num_attention_heads"), take("hidden_size"), take("num_hidden_layers")
    if not (heads and dim and 0 < layers < 10_000):
        raise BadConfig(f"{where}: num_attention_heads, hidden_size and num_hidden_layers must be at least 1")
    attention: Mla | Gqa
    if config.get("kv_lora_rank"):
        attention = Mla(
            n_heads=heads,
            q_rank=take("q_lora_rank", default=0) or None,
            kv_rank=take("kv_lora_rank"),
            nope=take("qk_nope_head_dim"),
            rope=take("qk_rope_head_dim"),
            v=take("v_head_dim"),
        )
    else:
        attention = Gqa(
            n_heads=heads,
            n_kv_heads=take("num_key_value_heads", default=heads),
            head_dim=take("head_dim", default=dim // heads),
            qkv_bias=bool(config.get("attention_bias")) or config.get("model_type") == "qwen2",
        )
    n_experts = take("n_routed_experts", "num_experts", "num_local_experts", default=0)
    dense = take("first_k_dense_replace", default=0) if n_experts else layers
    moe = None
    if n_experts:
        moe = Moe(
            n_experts=n_experts,
            n_shared=take("n_shared_experts", default=0),
            top_k=take("num_experts_per_tok", "experts_per_token"),
            ffn=take("moe_intermediate_size", "intermediate_size"),
            n_groups=take("n_group", default=1) or 1,
            top_groups=take("topk_group", default=1) or 1,
            route_scale=1.0,
            norm_weights=True,
        )
    width = attention.rope if isinstance(attention, Mla) else attention.head_dim
    _check(where, attention, moe)
    return ModelSpec(
        architecture=str(config.get("model_type", "unknown")),
        vocab=take("vocab_size"),
        dim=dim,
        n_layers=layers,
        n_dense=min(dense, layers),
        context=take("max_position_embeddings", default=131072),
        attention=attention,
        rope=Rope(dim=width, theta=10000.0, interleaved=False),
        ffn=take("intermediate_size"),
        moe=moe,
        norm_eps=1e-6,
        tied_head=bool(config.get("tie_word_embeddings", False)),
        n_mtp=take("num_nextn_predict_layers", default=0),
        dtype="bfloat16",
        block_scale=None,
        eos_ids=(),
    )


def _check(where: str, a: Mla | Gqa, moe: Moe | None) -> None:
    """Sizes that cannot be. Raises BadConfig."""
    if isinstance(a, Mla) and not (a.nope and a.rope and a.v):
        raise BadConfig(f"{where}: qk_nope_head_dim, qk_rope_head_dim and v_head_dim must be at least 1")
    if isinstance(a, Gqa) and not (a.head_dim and 0 < a.n_kv_heads <= a.n_heads):
        raise BadConfig(f"{where}: head_dim must be at least 1, and num_key_value_heads from 1 to num_attention_heads")
    if moe is None:
        return
    if not (0 < moe.top_k <= moe.n_experts and moe.ffn):
        raise BadConfig(
            f"{where}: num_experts_per_tok must be from 1 to the number of experts, moe_intermediate_size 1"
        )
    if not 0 < moe.top_groups <= moe.n_groups <= moe.n_experts:
        raise BadConfig(f"{where}: topk_group must be at most n_group, and that at most the number of experts")


def precision_of(name: str, kv: str = "") -> Precision:
    """A deployment's precision by the name of its weights, with another type for the cache if given."""
    if name not in PRECISIONS:
        raise BadModel(
            f"precision '{name}' is not known; the nearest is {get_close_matches(name, PRECISIONS, 1, 0.0)[0]}"
        )
    found = PRECISIONS[name]
    return replace(found, kv=kv) if kv else found
