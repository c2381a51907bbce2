"""The library of C++ kernels, built from the present sources. Where it cannot be built, its tests are skipped."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from brigade.engine.machine import read_cpu
from brigade.kernels.cpu.build import Built, find_library
from brigade.kernels.cpu.layers import Kernels


@pytest.fixture(scope="session")
def library_path() -> Path:
    library = find_library(read_cpu().features)
    if not isinstance(library, Built):
        pytest.skip(f"no C++ kernels: {library}")
    return library.path


@pytest.fixture(scope="module")
def on_threads(library_path: Path) -> Iterator[dict[int, Kernels]]:
    """Kernels on one thread and on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's own threads would spin beside the kernels'
    both = {n: Kernels(library_path, n) for n in (1, 2)}
    yield both
    for kernels in both.values():
        kernels.library.pool_free(kernels.pool)
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def kernels(request: pytest.FixtureRequest, on_threads: dict[int, Kernels]) -> Kernels:
    return on_threads[request.param]
