"""Mistakes at the start: one clear line, exit code 2, and no port was opened."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from brigade.engine.config import DEMO_MODEL
from tests.end_to_end.running import command


def start(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command("serve", "--log-level", "error", "--port", "0", *arguments),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model to spoil."""
    return Path(shutil.copytree(DEMO_MODEL, tmp_path / "model"))


def cut_short(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def change_config(**changes: object) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (cut_short, "model.safetensors"),
        (lambda m: (m / "model.safetensors").unlink(), "model.safetensors"),
        (lambda m: (m / "tokenizer.json").write_text("{"), "tokenizer.json"),
        (lambda m: (m / "config.json").unlink(), "config.json"),
        (change_config(unheard_of=1), "unheard_of"),
        (change_config(hidden_size=200), "model.embed_tokens.weight"),
        (change_config(vocab_size=100), "vocab_size"),
        (lambda m: (m / "chat_template.jinja").write_text("{% if %}"), "chat_template.jinja"),
        (lambda m: (m / "generation_config.json").write_text('{"temperature": "hot"}'), "generation_config.json"),
    ],
)
def test_a_spoiled_checkpoint_is_named_in_one_line(model: Path, spoil: Callable[[Path], None], named: str) -> None:
    spoil(model)
    run = start(str(model))
    assert run.returncode == 2
    assert run.stdout == ""
    lines = [line for line in run.stderr.splitlines() if not line.startswith("brigade: loading")]
    assert len(lines) == 1, run.stderr
    assert named in lines[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("/no/such/model",), "/no/such/model"),
        (("--host", "0.0.0.0"), "key"),
        (("--max-context", "-1"), "max_context"),
        (("--kv-memory", "lots"), "lots"),
        (("--kv-memory", "1"), "--kv-memory"),
        (("--dtype", "int3"), "dtype"),
        (("--api-key", ""), "key"),
    ],
)
def test_a_setting_that_cannot_work_is_named_in_one_line(arguments: tuple[str, ...], named: str) -> None:
    run = start(*arguments)
    assert run.returncode == 2
    assert run.stdout == ""
    assert named in run.stderr.splitlines()[-1]


def test_a_port_in_use_is_named_before_the_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        run = start("--port", port)
    assert run.returncode == 1
    assert port in run.stderr
    assert "loading" not in run.stderr


def test_modules_beside_the_user_are_not_run(model: Path) -> None:
    """A checkpoint's folder may hold anything; standing in it must not make it code."""
    for name in ("uuid", "msgspec", "psutil", "random"):
        (model / f"{name}.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    console = Path(sys.executable).parent / "brigade"
    run = subprocess.run(
        [str(console), "chat", ".", "--max-tokens", "3"],
        input="Once\n",
        cwd=model,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert not (model / "ran").exists()


def test_a_config_that_is_no_file_is_refused_at_once(model: Path) -> None:
    (model / "generation_config.json").unlink()
    os.mkfifo(model / "generation_config.json")
    run = start(str(model))
    assert run.returncode == 2
    assert "generation_config.json" in run.stderr
