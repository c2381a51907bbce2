"""The kernels touch no memory that is not theirs and do nothing undefined: they run under the compiler's sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from brigade.engine.machine import read_cpu
from brigade.kernels.cpu.build import KERNELS
from brigade.kernels.cpu.compiler import Unavailable, find_compiler

HERE = Path(__file__).parent
SANITIZERS = "-fsanitize=address,undefined"
EMPTY = "int main() { return 0; }\n"


def test_every_kernel_runs_clean_under_the_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    missing = [f for f in KERNELS.needs if f not in read_cpu().features]
    if missing:
        pytest.skip(f"this CPU has no {', '.join(missing)}")
    compiler = find_compiler()
    if isinstance(compiler, Unavailable):
        pytest.skip(compiler.reason)
    flags = [f for f in KERNELS.flags if not f.startswith("-O")] + ["-O1", SANITIZERS, "-fno-sanitize-recover=all"]
    (tmp_path / "empty.cpp").write_text(EMPTY)
    if _run([*compiler.command, *flags, "empty.cpp", "-o", "empty"], tmp_path).returncode:
        pytest.skip(f"{compiler.name} has no sanitizers here")
    shutil.copy(HERE / "sanitized.cpp", tmp_path)
    command = [*compiler.command, *flags, "-I", str(KERNELS.folder), "sanitized.cpp", "-o", "sanitized"]
    made = _run(command, tmp_path)
    assert made.returncode == 0, made.stdout
    ran = _run([str(tmp_path / "sanitized")], tmp_path)
    assert (ran.returncode, ran.stdout) == (0, "clean\n"), ran.stdout[-4000:]


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "LC_ALL": "C"}
    env.pop("LD_PRELOAD", None)  # the address sanitizer must come first
    return subprocess.run(
        command,
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
