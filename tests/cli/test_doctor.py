"""`brigade doctor`: what each reading means, from made-up readings."""

import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from brigade.cli import app
from brigade.cli.doctor import Check, examine, release, satisfies
from brigade.cli.readings import (
    PackageReading,
    Readings,
    TorchReading,
    demo_problem,
    parse_requirement,
    read_packages,
    take_readings,
)
from brigade.engine.config import DEMO_MODEL
from brigade.engine.machine import Cpu, Limits
from brigade.kernels.cpu.build import Buildable, Built
from brigade.kernels.cpu.compiler import Compiler, Unavailable

GIB = 1 << 30
COMPILER = Compiler(("/usr/bin/c++",), "/usr/bin/g++-12", "c++ (Debian 12.2.0-14) 12.2.0")
GOOD = Readings(
    python=(3, 11, 7),
    machine="x86_64",
    cpu=Cpu("Fast CPU", frozenset({"avx2", "avx512f"})),
    cores=8,
    limits=Limits(),
    memory_total=16 * GIB,
    memory_available=8 * GIB,
    shm_size=8 * GIB,
    open_files=4096,
    compiler=COMPILER,
    kernels=Built(Path("/cache/kernels.so"), "cache"),
    torch=TorchReading(version="2.13.0", threads=8, capability="AVX512", mkldnn=True, fast_bf16=True),
    packages=[PackageReading("torch", "==", "2.13.0", "2.13.0+cpu"), PackageReading("rich", ">=", "13.9", "15.0.0")],
    port=8000,
    port_problem=None,
    demo_folder="/demo",
    demo_problem=None,
)


def verdict(name: str, **changes: object) -> Check:
    """The named check of otherwise good readings."""
    return next(c for c in examine(replace(GOOD, **changes)) if c.name == name)  # type: ignore[arg-type]


def test_a_good_machine_passes_every_check() -> None:
    assert {c.verdict for c in examine(GOOD)} == {"ok"}
    assert len({c.name for c in examine(GOOD)}) == 14


@pytest.mark.parametrize(
    ("name", "expected", "changes"),
    [
        ("Python", "fail", {"python": (3, 10, 14)}),
        ("CPU features", "warn", {"cpu": Cpu("Old", frozenset({"sse2"}))}),
        ("CPU features", "ok", {"cpu": Cpu("Apple", frozenset())}),
        ("CPU features", "ok", {"machine": "aarch64", "cpu": Cpu("Arm", frozenset({"bf16"}))}),
        ("cores", "warn", {"limits": Limits(cores=1.5)}),
        ("cores", "ok", {"limits": Limits(cores=8.0)}),
        ("memory", "warn", {"memory_available": GIB - 1}),
        ("memory", "fail", {"memory_available": GIB // 4}),
        ("memory", "fail", {"limits": Limits(memory=2 * GIB, memory_used=2 * GIB - 5)}),
        ("/dev/shm", "warn", {"shm_size": 64 << 20}),
        ("/dev/shm", "ok", {"shm_size": None}),
        ("open files", "warn", {"open_files": 256}),
        ("open files", "ok", {"open_files": None}),
        ("C++ compiler", "warn", {"compiler": Unavailable("there is none", "install one")}),
        ("CPU kernels", "ok", {"kernels": Buildable(COMPILER, Path("/cache"), "key", {})}),
        ("CPU kernels", "ok", {"kernels": Unavailable("this CPU has no avx512f")}),
        ("CPU kernels", "warn", {"kernels": Unavailable("there is no C++ compiler", "install one")}),
        ("torch", "fail", {"torch": TorchReading(problem="cannot be imported")}),
        ("torch", "warn", {"torch": TorchReading(version="2.13.0")}),
        ("packages", "warn", {"packages": None}),
        ("packages", "fail", {"packages": [PackageReading("rich", ">=", "13.9", None)]}),
        ("packages", "fail", {"packages": [PackageReading("rich", ">=", "13.9", "13.8.1")]}),
        ("port", "warn", {"port_problem": "Address already in use"}),
        ("demo model", "fail", {"demo_problem": "gone"}),
    ],
)
def test_each_reading_gets_its_verdict_and_whatever_is_not_ok_says_what_to_do(
    name: str, expected: str, changes: dict[str, object]
) -> None:
    check = verdict(name, **changes)
    assert check.verdict == expected
    assert check.advice or expected == "ok"


def test_the_core_quota_turns_into_a_number_of_threads() -> None:
    assert "--threads 2" in verdict("cores", limits=Limits(cores=2.7)).advice
    assert "--threads 1" in verdict("cores", limits=Limits(cores=0.5)).advice


def test_a_control_group_limit_is_shown_as_the_memory() -> None:
    check = verdict("memory", limits=Limits(memory=4 * GIB, memory_used=GIB))
    assert check.value == "3 GiB free of 4 GiB (control group limit)"


def test_gpus_are_named() -> None:
    assert verdict("GPU", torch=replace(GOOD.torch, gpus=("H100", "H100"))).value == "H100, H100"


@pytest.mark.parametrize(
    ("installed", "operator", "wanted", "met"),
    [
        ("2.13.0+cpu", "==", "2.13.0", True),
        ("2.13", "==", "2.13.0", True),
        ("2.12.1", "==", "2.13.0", False),
        ("0.10", ">=", "0.9", True),
        ("13.8.9", ">=", "13.9", False),
        ("15.0.0rc1", ">=", "13.9", True),
        ("anything", "", "", True),
    ],
)
def test_versions_are_compared_by_their_numbers(installed: str, operator: str, wanted: str, met: bool) -> None:
    assert satisfies(installed, operator, wanted) is met


def test_an_operator_that_is_not_understood_is_an_error() -> None:
    with pytest.raises(ValueError, match="operator"):
        satisfies("1", "~=", "1")


def test_a_version_ends_where_its_numbers_end() -> None:
    assert [release(v) for v in ("2.13.0+cpu", "1.2rc3.4", "15")] == [(2, 13, 0), (1, 2), (15,)]


def test_requirements_are_read_as_metadata_writes_them() -> None:
    assert parse_requirement("typer>=0.15") == PackageReading("typer", ">=", "0.15", read_version("typer"))
    assert parse_requirement("no-such-package-here").installed is None
    read = read_packages(["rich>=13.9", "pytest>=8.3; extra == 'test'"])
    assert [p.name for p in read or []] == ["rich"]


def read_version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


def test_the_kernels_line_says_where_the_library_is_or_what_will_build_it() -> None:
    assert verdict("CPU kernels").value == "built, /cache/kernels.so"
    assert verdict("CPU kernels", kernels=Built(Path("/p.so"), "prebuilt")).value == "prebuilt, /p.so"
    read_only = Buildable(COMPILER, Path("/tmp/brigade"), "key", {}, ("/cache: cannot be written",))
    assert verdict("CPU kernels", kernels=read_only).value == (
        "will be built at first use with c++ 12.2.0, into /tmp/brigade (/cache: cannot be written)"
    )


def test_the_bundled_model_is_whole() -> None:
    assert demo_problem(DEMO_MODEL) is None


def test_a_damaged_bundled_model_is_noticed(tmp_path: Path) -> None:
    assert "config.json is missing" in str(demo_problem(tmp_path))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    assert "cannot be read" in str(demo_problem(tmp_path))
    weights = tmp_path / "model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in str(demo_problem(tmp_path))
    weights.write_bytes((DEMO_MODEL / "model.safetensors").read_bytes()[:-1])
    assert "bytes instead of" in str(demo_problem(tmp_path))


def test_the_report_is_a_table_and_exit_0_when_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brigade.cli.doctor.take_readings", lambda port: replace(GOOD, port=port, open_files=10))
    result = CliRunner().invoke(app, ["doctor", "--port", "1234"])
    assert result.exit_code == 0
    assert "1234 is free" in result.stdout
    assert "Brigade can run here; warnings: 1." in result.stdout


def test_the_report_is_json_and_exit_1_when_something_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brigade.cli.doctor.take_readings", lambda port: replace(GOOD, demo_problem="gone"))
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    failed = [c for c in json.loads(result.stdout) if c["verdict"] == "fail"]
    assert failed == [{"name": "demo model", "value": "gone", "verdict": "fail", "advice": failed[0]["advice"]}]


def test_this_machine_can_be_read() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        readings = take_readings(taken.getsockname()[1])
    assert readings.port_problem
    assert readings.memory_total >= readings.memory_available > 0
    assert readings.torch.version.startswith("2.")
    assert len(examine(readings)) == 14
