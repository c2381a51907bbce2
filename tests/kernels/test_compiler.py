"""The machine's C++ compiler: which one is taken, what it is called, and what is said when it cannot be used."""

import subprocess
import time
from pathlib import Path

import pytest

from brigade.kernels.cpu.compiler import Compiler, Unavailable, find_compiler, first_error, run_all


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def why_not(result: object) -> str:
    assert isinstance(result, Unavailable), result
    return str(result)


def test_the_first_compiler_on_the_path_is_taken_and_cxx_goes_before_it(tmp_path: Path) -> None:
    env = {"PATH": str(tmp_path)}
    clang = script(tmp_path / "clang++", "echo 'Some clang version 14.0.6-1'\necho more")
    assert find_compiler(env) == Compiler((clang,), clang, "Some clang version 14.0.6-1")
    gcc = script(tmp_path / "g++-12", 'echo "g++ (GCC) 12.2.0 20230101 (Maker 12.1-3) $1"')
    (tmp_path / "c++").symlink_to(gcc)
    found = find_compiler(env)
    assert found == Compiler((str(tmp_path / "c++"),), gcc, "g++ (GCC) 12.2.0 20230101 (Maker 12.1-3) --version")
    assert found.name == "c++ 12.2.0"
    named = find_compiler({**env, "CXX": "clang++ --target=x"})
    assert isinstance(named, Compiler)
    assert (named.command, named.name) == ((clang, "--target=x"), "clang++ 14.0.6")


@pytest.mark.parametrize("cxx", ["/no/such/compiler", "'unfinished"])
def test_a_cxx_that_names_no_compiler_is_an_answer_and_not_passed_over(cxx: str) -> None:
    assert "CXX" in why_not(find_compiler({"CXX": cxx}))


def test_a_compiler_that_does_not_run_is_named(tmp_path: Path) -> None:
    broken = script(tmp_path / "cxx", "echo 'error: no licence'; exit 3")
    assert f"{broken}: exit status 3 (error: no licence)" in why_not(find_compiler({"CXX": broken}))
    (tmp_path / "cxx").write_text("neither a script nor a program")
    assert broken in why_not(find_compiler({"CXX": broken}))


def test_the_first_error_line_is_found_among_warnings() -> None:
    assert first_error("a.cpp: In function\n a.cpp:3: warning: x\n a.cpp:4: error: y\na.cpp:5: error: z") == (
        "a.cpp:4: error: y"
    )
    assert first_error("\nKilled\n") == "Killed"
    assert first_error("") == "it says nothing"
    assert len(first_error("error " + "x" * 1000)) == 300


def test_commands_run_and_what_each_says_comes_back_in_order() -> None:
    commands = [("sh", "-c", f"echo {i}; echo error {i} >&2") for i in range(5)]
    assert run_all(commands, None, {"PATH": "/usr/bin:/bin"}, 20.0) == [f"{i}\nerror {i}\n" for i in range(5)]


def test_the_first_command_that_fails_ends_the_others() -> None:
    start = time.monotonic()
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run_all([("sh", "-c", "echo no; exit 2"), ("sleep", "60")], None, {"PATH": "/usr/bin:/bin"}, 60.0)
    assert (failed.value.returncode, failed.value.output) == (2, "no\n")
    assert time.monotonic() - start < 20
