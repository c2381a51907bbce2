"""A model that cannot be loaded: one clear line that names the file or the setting, soon, and no process left."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from brigade.engine import auto
from brigade.engine.client import Engine
from brigade.engine.config import DEMO_MODEL, EngineConfig
from brigade.engine.messages import Loading
from brigade.engine.output import LoadError
from brigade.engine.worker import Worker
from tests.engine.asking import ask
from tests.engine.conftest import workers

MACHINE = auto.Machine(2, 8 << 30)


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.unlink()
    path.write_bytes((DEMO_MODEL / "model.safetensors").read_bytes()[:-1000])


def one_shard_is_missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    content = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


# What is wrong, and what the message must name.
SMALL_FILES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json", "cannot be read"]),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json", "JSON"]),
    "unknown key": (lambda f: edit(f / "config.json", moe_router_noise=1), ["config.json", "moe_router_noise"]),
    "missing key": (lambda f: edit(f / "config.json", kv_lora_rank=None), ["config.json", "kv_lora_rank"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json", "cannot be read"]),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text('{"model": 1}'), ["tokenizer.json"]),
    "broken tokenizer config": (lambda f: (f / "tokenizer_config.json").write_text("["), ["tokenizer_config.json"]),
    "broken generation config": (lambda f: (f / "generation_config.json").write_text("1"), ["generation_config.json"]),
    "tokenizer larger than the model": (
        lambda f: edit(f / "config.json", vocab_size=4095),
        ["tokenizer.json", "4096", "vocab_size", "4095"],
    ),
}
TENSORS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no tensors": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors"]),
    "missing shard": (one_shard_is_missing, ["model-00001-of-00002.safetensors", "missing"]),
    "truncated": (truncate, ["model.safetensors", "copy it again"]),
    "wrong shape": (
        lambda f: edit(f / "config.json", moe_intermediate_size=97),
        ["model.safetensors", "[96, 192]", "[97, 192]"],
    ),
    "missing tensor": (
        lambda f: edit(f / "config.json", first_k_dense_replace=2),
        ["model.layers.1.mlp.gate_proj.weight"],
    ),
    "foreign tensor": (
        lambda f: edit(f / "config.json", num_nextn_predict_layers=0),
        ["model.layers.4", "not part of"],
    ),
}


@pytest.mark.parametrize("case", SMALL_FILES)
async def test_a_small_file_that_is_wrong_is_named_before_a_process_is_started(demo: Path, case: str) -> None:
    harm, words = SMALL_FILES[case]
    harm(demo)
    before = workers()
    with pytest.raises(LoadError) as e:
        await Engine.start(EngineConfig(model=str(demo)))
    assert all(word in str(e.value) for word in words), str(e.value)
    assert "\n" not in str(e.value)
    assert workers() == before


@pytest.mark.parametrize("name", ["nowhere", "", "x" * 5000, "a\0b"], ids=["missing", "empty", "too long", "nul"])
async def test_a_folder_that_cannot_be_is_an_error_and_not_a_crash(tmp_path: Path, name: str) -> None:
    with pytest.raises(LoadError, match=r"config\.json"):
        await Engine.start(EngineConfig(model=str(tmp_path / name)))


@pytest.mark.parametrize("case", TENSORS)
def test_a_tensor_file_that_is_wrong_is_named(demo: Path, case: str) -> None:
    harm, words = TENSORS[case]
    harm(demo)
    with pytest.raises(ValueError) as e:
        Worker.load(EngineConfig(model=str(demo)), MACHINE, lambda *_: None)
    assert all(word in str(e.value) for word in words), str(e.value)
    assert "\n" not in str(e.value)


async def test_what_the_worker_finds_wrong_comes_back_as_one_line_and_soon(demo: Path) -> None:
    truncate(demo)
    before, began = workers(), time.monotonic()
    outcomes = await asyncio.gather(
        Engine.start(EngineConfig(model=str(demo))), Engine.start(EngineConfig(kv_bytes=1)), return_exceptions=True
    )
    assert [type(o) for o in outcomes] == [LoadError, LoadError]
    assert "model.safetensors" in str(outcomes[0])
    assert "--kv-memory" in str(outcomes[1])
    assert time.monotonic() - began < 20
    assert workers() == before


async def start_and_close(config: EngineConfig) -> None:
    engine = await Engine.start(config)
    await engine.close()


@pytest.mark.timeout(60)
async def test_a_cache_larger_than_any_memory_is_named() -> None:
    with pytest.raises(LoadError, match=r"(?i)kv"):
        await start_and_close(EngineConfig(kv_bytes=1 << 50))


@pytest.mark.timeout(60)
async def test_a_model_that_computes_no_finite_numbers_is_not_served(demo: Path) -> None:
    """The first step, run before anything is promised, is there to find out."""
    content = load_file(DEMO_MODEL / "model.safetensors")
    content["model.norm.weight"][:] = torch.nan
    (demo / "model.safetensors").unlink()
    save_file(content, demo / "model.safetensors")
    with pytest.raises(LoadError, match="finite"):
        await start_and_close(EngineConfig(model=str(demo)))


async def test_progress_is_told_and_notes_say_what_auto_became(demo: Path) -> None:
    heard: list[Loading] = []
    engine = await Engine.start(
        EngineConfig(model=str(demo), max_context=100, dtype="float32", threads=2), progress=heard.append
    )
    try:
        assert [m.done for m in heard] == sorted(m.done for m in heard)
        assert heard[0].done == 0
        assert heard[-1].done == heard[-1].total > 10_000_000
        assert engine.ready.max_context == 100
        assert any("float32" in note for note in engine.ready.notes)
        assert engine.generation["temperature"] == 0.6
        assert len(await ask(engine, "Once upon a time")) > 10
    finally:
        await engine.close()
