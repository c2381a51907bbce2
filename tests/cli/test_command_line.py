"""The `brigade` command: help, versions, and errors in one line with an exit code."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from brigade.cli import app
from tests.engine.hosting import secret_file


def invoke(*args: str, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    result = CliRunner(env={"BRIGADE_API_KEY": None, **(env or {})}).invoke(app, list(args))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.stdout, result.stderr


def test_version_names_brigade_python_and_torch() -> None:
    code, out, _ = invoke("--version")
    assert code == 0
    assert out.startswith("brigade ")
    assert f"torch {version('torch')})" in out
    assert out.count("\n") == 1


def test_python_dash_m_brigade_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "brigade", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == invoke("--version")[1]


def test_help_lists_the_commands() -> None:
    code, out, _ = invoke("--help")
    assert code == 0
    assert all(
        command in out
        for command in (
            "serve",
            "up",
            "join",
            "explain",
            "manifest",
            "plan",
            "verify",
            "chat",
            "bench",
            "experts",
            "doctor",
            "drain",
            "role",
        )
    )


def test_showing_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "httpx", "starlette", "uvicorn", "psutil", "rich", "yaml", "ray", "PIL")
    code = f"import sys, brigade.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "command", ["serve", "up", "join", "explain", "manifest", "plan", "verify", "chat", "bench", "experts", "doctor"]
)
def test_every_command_has_help_and_refuses_unknown_options(command: str) -> None:
    assert invoke(command, "--help")[0] == 0
    assert invoke(command, "--no-such-option")[0] == 2


@pytest.mark.parametrize("command", ["serve", "chat", "bench", "experts"])
def test_help_says_that_command_lines_are_no_place_for_a_key(command: str) -> None:
    out = " ".join(invoke(command, "--help")[1].replace("│", " ").split())
    assert "other users can see command lines" in out
    assert "BRIGADE_API_KEY" in out


def test_help_names_the_extra_that_ray_needs() -> None:
    """In square brackets it would be taken for a style, and vanish."""
    assert "Needs the extra `ray`." in " ".join(invoke("up", "--help")[1].replace("│", " ").split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--dtype", "int3"), "dtype must be auto, bfloat16, float16 or float32, not 'int3'"),
        (("--kv-disk", "/mnt"), "'/mnt' must be a folder, from / on, and a size, like /mnt/nvme:200GiB"),
        (("--kv-disk", "here:1GiB"), "'here:1GiB' must be a folder, from / on, and a size"),
        (("--kv-disk", "/:0"), "'/:0' leaves no room for anything"),
        (("--kv-disk", "/no/such:1GiB"), "--kv-disk: /no/such is not a folder; make it, or mount what belongs there"),
        (("--kv-memory", "lots"), "'lots' is not a size; write it like 512MiB or 2GiB"),
        (("--kv-memory", "2G"), "ambiguous"),
        (("--kv-memory", "0"), "--kv-memory 0 leaves no room for any request"),
        (("--max-running", "0"), "max_running must be between 1 and 4096, not 0"),
        (("--max-step-tokens", "8"), "max_step_tokens must be at least max_running"),
        (("--depth", "9"), "depth must be between 1 and 4"),
        (("--drafts", "2"), "drafts must be between 0 and 1"),
        (("--drafts", "1", "--depth", "2"), "leave depth at 1, or drafts at 0"),
        (("--redundant-experts", "2"), "redundant_experts are copies on other ranks, but ranks is 1"),
        (("--rebalance", "nan"), "rebalance must be between"),
        (("--step-deadline", "nan"), "step_deadline must be between"),
        (("--port", "70000"), "port must be between 0 and 65535, not 70000"),
        (("--drain-seconds", "-1"), "drain_seconds must be between"),
        (("--host", "0.0.0.0"), "refusing to listen on 0.0.0.0 without an API key"),
        (("--api-key", "short"), "the API key has 5 characters"),
        (("--name", ""), "served model name is empty"),
        (("--hosts", "10.0.0.1=1"), "--hosts needs --secret-file"),
        (("--secret-file", "x"), "--secret-file and --join-port are for several hosts; name them with --hosts"),
        (("--join-port", "7001"), "--secret-file and --join-port are for several hosts; name them with --hosts"),
        (("--hosts", "10.0.0.1", "--secret-file", "x"), "--hosts: '10.0.0.1' must be like 10.0.0.1=4,10.0.0.2=4"),
        (("--hosts", "a=1,b=1", "--secret-file", "/gone"), "/gone: the secret cannot be read (No such file"),
        (("--log-level", "loud"), "--log-level must be one of debug, info, warning, error, not loud"),
    ],
)
def test_a_setting_that_cannot_work_is_one_line_and_exit_2(args: tuple[str, ...], message: str) -> None:
    code, out, err = invoke("serve", *args)
    assert (code, out) == (2, "")
    assert err.startswith("brigade: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_model_that_is_not_there_is_one_line_and_exit_2(tmp_path: Path) -> None:
    code, out, err = invoke("serve", str(tmp_path / "gone"), "--port", "0")
    assert (code, out) == (2, "")
    assert "config.json" in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("brigade: ")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--ranks", "5", "--hosts", "127.0.0.1=1,127.0.0.2=1"), "--ranks is 5, but --hosts names 2 in all; leave"),
        (("--port", "7000", "--hosts", "127.0.0.1=1,127.0.0.2=1"), "--join-port 7000 is that of --port; give another"),
        (("--hosts", "127.0.0.1=1,10.0.0.2=1"), "--hosts: 127.0.0.1 is this machine only, and 10.0.0.2 cannot reach"),
        (("--hosts", "10.0.0.2=1,localhost=1"), "--hosts: localhost is this machine only, and 10.0.0.2 cannot reach"),
    ],
)
def test_hosts_that_cannot_work_are_refused_before_anything_is_loaded(
    args: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    code, out, err = invoke("serve", *args, "--secret-file", str(secret_file(tmp_path)))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"brigade: {message}")


@pytest.mark.parametrize(
    ("model", "message"),
    [((), "ranks is 40, but the model has only 32 routed experts"), (("/none",), "/none/config.json: cannot be read")],
)
def test_hosts_are_not_waited_for_with_a_model_that_cannot_run(
    model: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    hosts = "127.0.0.1=20,127.0.0.2=20"
    code, _, err = invoke("serve", *model, "--port", "0", "--hosts", hosts, "--secret-file", str(secret_file(tmp_path)))
    assert code == 2
    assert message in err.splitlines()[-1]
