"""One engine on the bundled demo model for all tests that do not break it: a start takes more than a second."""

from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from brigade.engine.client import Engine
from brigade.engine.config import DEMO_MODEL, EngineConfig


def workers() -> set[int]:
    """Process ids of all worker processes that this process has started and that have not ended."""
    found = set()
    for child in psutil.Process().children():
        try:
            if child.name() == "brigade-rank" and child.status() != psutil.STATUS_ZOMBIE:
                found.add(child.pid)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engine() -> AsyncIterator[Engine]:
    """Small limits, plans one step ahead. Tests leave it idle."""
    config = EngineConfig(max_running=24, max_waiting=8, max_step_tokens=64, depth=2)
    engine = await Engine.start(config)
    yield engine
    await engine.close()


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A folder like the demo model's, whose files may be replaced one by one (remove the link first)."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO_MODEL / name).read_bytes())
    (folder / "model.safetensors").symlink_to(DEMO_MODEL / "model.safetensors")
    return folder
