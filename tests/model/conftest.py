"""Checkpoints are made once for the whole run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.model import checkpoints

Made = tuple[Path, PreTrainedModel]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """checkpoint(kind) -> folder and the transformers model."""
    torch.set_num_threads(2)
    made: dict[str, Made] = {}

    def get(kind: str) -> Made:
        if kind not in made:
            folder = tmp_path_factory.mktemp("checkpoint")
            made[kind] = folder, checkpoints.make(kind, folder)
        return made[kind]

    return get
