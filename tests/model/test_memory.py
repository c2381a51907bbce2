"""What spec says that a rank's weights take is what the loaded model takes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from brigade.engine import auto
from brigade.engine.config import DEMO_MODEL, EngineConfig
from brigade.engine.machine import read_cpu
from brigade.engine.worker import Worker
from brigade.kernels.cpu.build import Built, find_library
from brigade.model.deepseek import DeepSeek
from brigade.model.weights import Checkpoint
from brigade.spec.config import read_spec
from brigade.spec.memory import WeightKind, weight_bytes
from brigade.spec.model import ModelSpec

SPEC, DRAFTING = read_spec(DEMO_MODEL), read_spec(DEMO_MODEL, drafts=1)
NOT_WEIGHTS = ("cache", "cos", "sin", "spec", "_rest")
"""The last one is memory that no weight has taken yet."""


def held(value: Any, depth: int = 0) -> dict[int, int]:
    """Bytes of all tensors that a model holds, by where they are, so that none counts twice."""
    if isinstance(value, torch.Tensor):
        return {value.data_ptr(): value.numel() * value.element_size()} if value.numel() else {}
    inner: list[Any] = []
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, (list, tuple)):
        inner = list(value)
    elif hasattr(value, "__dict__") and type(value).__module__.startswith("brigade"):
        inner = [v for name, v in vars(value).items() if name not in NOT_WEIGHTS]
    out: dict[int, int] = {}
    for v in inner if depth < 8 else []:
        out |= held(v, depth + 1)
    return out


@pytest.mark.parametrize("spec", [SPEC, DRAFTING], ids=["", "drafts"])
@pytest.mark.parametrize("experts", [range(32), range(8, 24)])
def test_on_torch_to_the_byte(experts: range, spec: ModelSpec) -> None:
    layers = [experts] * spec.n_moe
    model = DeepSeek(spec, Checkpoint(Path(DEMO_MODEL), spec, layers).load(torch.float32))
    n_slots = len(experts)
    assert sum(held(model).values()) == sum(weight_bytes(spec, "float32", n_slots).values())


@pytest.mark.parametrize("drafts", [0, 1])
@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_on_the_kernels_but_for_their_padding(kind: WeightKind, drafts: int) -> None:
    if not isinstance(library := find_library(read_cpu().features), Built):
        pytest.skip(f"no C++ kernels here: {library}")
    worker, _ = Worker.load(
        EngineConfig(weights=kind, kv_bytes=1 << 20, drafts=drafts),  # type: ignore[arg-type]
        auto.this_machine(),
        lambda done, total: None,
    )
    said, real = sum(weight_bytes(worker.spec, kind, 32).values()), sum(held(worker.model).values())
    assert 0.97 * real < said <= real
