"""Experts are read again as the loader read them; a file that changed is an error that names it, never a crash."""

import os
from pathlib import Path

import pytest
import torch

from brigade.model.reread import ExpertFiles
from brigade.model.weights import BadCheckpoint, Checkpoint
from brigade.spec.config import spec_from
from brigade.spec.model import ModelSpec
from tests.model.test_weights import FP8, MOE, fp8, sharded, single, tensors

PARTS = ("gate", "up", "down")


def opened(folder: Path, spec: ModelSpec, dtype: torch.dtype = torch.float32) -> ExpertFiles:
    return ExpertFiles(Checkpoint(folder, spec), dtype)


def written(folder: Path) -> tuple[Path, ModelSpec]:
    spec = spec_from(MOE)
    return single(folder, tensors(spec)), spec


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_is_what_the_loader_gives(tmp_path: Path, stored: str, dtype: torch.dtype) -> None:
    spec = spec_from(MOE | {"quantization_config": FP8} if stored == "fp8" else MOE)
    content = tensors(spec, torch.float32 if stored == "fp8" else getattr(torch, stored))
    folder = sharded(tmp_path, fp8(content, spec) if stored == "fp8" else content)
    loaded = Checkpoint(folder, spec).load(dtype)
    files = opened(folder, spec, dtype)
    for expert in (0, 3):
        for part, got in zip(PARTS, files.read(1, expert), strict=True):
            assert torch.equal(got, loaded[f"model.layers.1.mlp.experts.*.{part}_proj.weight"][expert])


def test_a_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    folder, spec = written(tmp_path)
    files = opened(folder, spec)
    os.truncate(folder / "model.safetensors", 3000)
    with pytest.raises(BadCheckpoint, match=r"model\.safetensors: is not the file the model was loaded from"):
        files.read(1, 0)


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    folder, spec = written(tmp_path)
    files = opened(folder, spec)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match=r"model\.safetensors: cannot be opened again \(No such file"):
        files.read(1, 0)


def test_another_file_in_its_place_is_refused(tmp_path: Path) -> None:
    folder, spec = written(tmp_path)
    files = opened(folder, spec)
    single(folder, {name: 2 * t for name, t in tensors(spec).items()})
    with pytest.raises(BadCheckpoint, match="restart to use the new one"):
        files.read(1, 0)


def test_no_file_stays_open(tmp_path: Path) -> None:
    folder, spec = written(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    files = opened(folder, spec)
    files.read(1, 2)
    assert len(os.listdir("/proc/self/fd")) <= before
