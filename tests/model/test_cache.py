"""The KV cache is zero at first and takes memory only where it was written."""

from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from brigade.engine.config import DEMO_MODEL
from brigade.model.cache import KvCache
from brigade.spec.config import read_spec

SPEC = read_spec(Path(DEMO_MODEL))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_new_cache_is_zero_and_has_its_shape(dtype: torch.dtype) -> None:
    layers = KvCache(SPEC, 3, 16, dtype).layers
    assert layers.shape == (SPEC.n_layers, 3, 16, SPEC.kv_width)
    assert layers.dtype == dtype
    assert layers.data_ptr() % 64 == 0
    assert not layers.any()


def test_pages_that_were_never_written_take_no_memory() -> None:
    before = psutil.Process().memory_info().rss
    cache = KvCache(SPEC, 20_000, 16, torch.float32)
    cache.layers[:, :100] = 1
    taken = psutil.Process().memory_info().rss - before
    assert cache.layers.nbytes > 400e6
    assert taken < 100e6


def test_a_cache_that_no_machine_has_room_for_says_which_option_to_turn() -> None:
    with pytest.raises(MemoryError, match="--kv-memory"):
        KvCache(replace(SPEC, n_layers=1 << 20), 1 << 30, 16, torch.float32)
