"""`brigade up`: the file's settings reach the engine and the server; what cannot run ends before anything starts."""

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from brigade.cli import up
from brigade.cli.deployed import Deployed, read_key
from brigade.cli.fault import Fault
from brigade.engine.config import DEMO_MODEL
from brigade.spec.config import read_spec
from brigade.spec.deploy import deployment_from
from tests.cli.test_command_line import invoke

KEY = "a-key-of-sixteen-characters"


def written(folder: Path, text: str) -> Path:
    (folder / "d.yaml").write_text(text)
    return folder / "d.yaml"


def test_the_file_is_served(tmp_path: Path) -> None:
    (tmp_path / "clients").write_text(KEY + "\n")
    (tmp_path / "clients").chmod(0o600)
    file = written(
        tmp_path,
        "listen: 127.0.0.1:0\napi_key_file: clients\nlimits: {kv_memory: 16MiB, max_context: 256}\n"
        "units: [{role: mixed, ranks_per_host: 2}]\n",
    )
    command = [sys.executable, "-m", "brigade", "up", str(file), "--log-level", "warning"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().removeprefix("Brigade is ready at ").strip()
        body = json.dumps({"model": "brigade-demo", "prompt": "Once", "max_tokens": 4}).encode()
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/completions", body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 4
    finally:
        server.send_signal(signal.SIGINT)
        code = server.wait(30)
        server.stdout.close()  # type: ignore[union-attr]
    assert code == 0


def test_settings_of_the_file_are_the_engines(tmp_path: Path) -> None:
    limits = {"max_running": 5, "max_waiting": 6, "max_context": 70, "max_step_tokens": 80, "kv_memory": "1MiB"}
    data = {"weights": "int8", "limits": limits, "units": [{"role": "mixed", "ranks_per_host": 3}]}
    engine = up.engine_config(Deployed(tmp_path / "d.yaml", deployment_from(data)), read_spec(DEMO_MODEL))
    assert (engine.model, engine.weights, engine.ranks, engine.kv_bytes) == (str(DEMO_MODEL), "int8", 3, 1 << 20)
    assert (engine.max_running, engine.max_waiting, engine.max_context, engine.max_step_tokens) == (5, 6, 70, 80)


def test_a_ranks_memory_bounds_its_cache(tmp_path: Path) -> None:
    spec = read_spec(DEMO_MODEL)
    engine = up.engine_config(Deployed(tmp_path / "d.yaml", deployment_from({"rank_memory": "64MiB"})), spec)
    assert 0 < engine.kv_bytes < (64 << 20) // 4
    with pytest.raises(Fault, match="weights alone need"):
        up.engine_config(Deployed(tmp_path / "d.yaml", deployment_from({"rank_memory": "2MiB"})), spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("units: [{role: prefill}, {role: decode}]", "this version runs one unit of role mixed"),
        ("units: [{role: mixed, ranks_per_host: 64}]", "64 ranks, but the model has 32 routed experts a layer"),
        ("model: none", "none/config.json"),
        ("limits: {max_running: 600}", "max_step_tokens must be at least max_running"),
        ("api_key_file: none", "none is not a file; write the key into it"),
        ("api_key_file: short", "the API key has 3 characters"),
        ("api_key_file: open", "others than its owner may use"),
        ("api_key_file: two", "must hold one key on one line"),
        ("rank_memory: 2MiB", "weights alone need"),
    ],
)
def test_what_cannot_run_ends_at_once_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    for name, content in ("short", "abc"), ("open", KEY), ("two", f"{KEY}\n{KEY}\n"):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o644 if name == "open" else 0o600)
    code, out, err = invoke("up", str(written(tmp_path, text)))
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith(f"brigade: {tmp_path}")
    assert err.count("\n") == 1
    assert KEY not in err


def test_a_key_file_of_bytes(tmp_path: Path) -> None:
    (tmp_path / "k").write_bytes(b"\xff\xfe" * 16)
    (tmp_path / "k").chmod(0o600)
    with pytest.raises(Fault, match="bytes that are not plain characters"):
        read_key(tmp_path / "k", "d.yaml: api_key_file")
