"""The library of the C++ kernels: built once, never loaded damaged, and every obstacle is a value that says why."""

import ctypes
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from brigade.kernels.cpu import build
from brigade.kernels.cpu.build import KERNELS, Buildable, Built, Recipe, find_library, key_of, look_up, prebuild, unsafe
from brigade.kernels.cpu.compiler import Compiler, Unavailable, find_compiler, run_all

REAL = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(REAL is None, reason="no C++ compiler on this machine")
ROOT = Path(__file__).parents[2]
ALL = frozenset(KERNELS.needs)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """One small source beside one header."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "value.h").write_text("#define VALUE 42\n")
    (folder / "answer.cpp").write_text('#include "value.h"\nextern "C" int answer() { return VALUE; }\n')
    return Recipe(folder, ("-O0", "-fPIC"), ("fast",))


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "spare").mkdir()
    return {"PATH": os.environ["PATH"], "BRIGADE_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "spare")}


FAST = frozenset({"fast", "other"})


def find(recipe: Recipe, env: dict[str, str], **deadlines: float) -> Built | Unavailable:
    return find_library(FAST, recipe, env, **deadlines)


def built(recipe: Recipe, env: dict[str, str]) -> Built:
    result = find(recipe, env)
    assert isinstance(result, Built), result
    return result


def why_not(result: object) -> str:
    assert isinstance(result, Unavailable), result
    assert "\n" not in str(result)
    return str(result)


def answer(path: Path) -> int:
    return int(ctypes.CDLL(str(path)).answer())


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def compiler_that(path: Path, before: str) -> str:
    """The real compiler, but `before` runs before everything except --version."""
    return script(path, f'[ "$1" = --version ] && exec {REAL} --version\n{before}\nexec {REAL} "$@"\n')


def python(recipe: Recipe, env: dict[str, str]) -> subprocess.Popen[str]:
    """Another process that asks for the same library and prints what it got."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom brigade.kernels.cpu.build import Recipe, find_library\n"
        "found = find_library(frozenset({'fast'}), Recipe(Path(sys.argv[1]), ('-O0', '-fPIC'), ('fast',)))\n"
        "print(getattr(found, 'origin', found))"
    )
    command = [sys.executable, "-c", code, str(recipe.folder)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)


def wait_for(path: Path) -> str:
    end = time.monotonic() + 20
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, f"{path} was not written"
        time.sleep(0.01)
    return path.read_text()


def gone(pid: int) -> bool:
    """Whether a process has ended; one that waits for its parent to notice has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


# Finding and building -------------------------------------------------------------------------------------------------


@needs_compiler
def test_the_library_is_compiled_at_first_use_and_found_afterwards(recipe: Recipe, env: dict[str, str]) -> None:
    first = built(recipe, env)
    assert (first.origin, answer(first.path)) == ("compiled", 42)
    assert first.path.parent == Path(env["BRIGADE_CACHE"])
    assert first.path.parent.stat().st_mode & 0o777 == 0o700
    again = built(recipe, env)
    assert (again.origin, again.path) == ("cache", first.path)


@needs_compiler
def test_several_sources_become_one_library(recipe: Recipe, env: dict[str, str]) -> None:
    for i in range(5):
        (recipe.folder / f"more{i}.cpp").write_text(f'extern "C" int more{i}() {{ return {i}; }}\n')
    library = ctypes.CDLL(str(built(recipe, env).path))
    assert [getattr(library, f"more{i}")() for i in range(5)] + [library.answer()] == [0, 1, 2, 3, 4, 42]


@needs_compiler
def test_looking_changes_nothing(recipe: Recipe, env: dict[str, str]) -> None:
    seen = look_up(FAST, recipe, env)
    assert isinstance(seen, Buildable)
    assert seen.folder == Path(env["BRIGADE_CACHE"])
    assert not seen.folder.exists()
    path = built(recipe, env).path
    assert look_up(FAST, recipe, env) == Built(path, "cache")


@needs_compiler
def test_only_the_library_and_its_lock_stay_behind(recipe: Recipe, env: dict[str, str]) -> None:
    path = built(recipe, env).path
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".lock", ".so"]
    assert list(Path(env["TMPDIR"]).iterdir()) == []


@needs_compiler
def test_a_changed_header_gives_another_library(recipe: Recipe, env: dict[str, str]) -> None:
    first = built(recipe, env)
    (recipe.folder / "value.h").write_text("#define VALUE 43\n")
    second = built(recipe, env)
    assert (second.origin, answer(second.path), answer(first.path)) == ("compiled", 43, 42)


def test_the_key_changes_with_whatever_the_machine_code_depends_on(recipe: Recipe) -> None:
    compiler = Compiler(("/usr/bin/c++",), "/usr/bin/g++-12", "g++ 12.2")
    sources = {"a.cpp": b"1", "b.h": b"2"}
    keys = [
        key_of(sources, recipe, compiler),
        key_of({"a.cpp": b"1", "b.h": b"3"}, recipe, compiler),
        key_of({"a.cpp": b"1", "c.h": b"2"}, recipe, compiler),
        key_of({"a.cpp": b"12", "b.h": b""}, recipe, compiler),
        key_of(sources, replace(recipe, flags=("-O3", "-fPIC")), compiler),
        key_of(sources, replace(recipe, link_flags=("-lm",)), compiler),
        key_of(sources, replace(recipe, needs=("fast", "other")), compiler),
        key_of(sources, recipe, replace(compiler, path="/usr/bin/g++-13")),
        key_of(sources, recipe, replace(compiler, version="g++ 12.3")),
        key_of(sources, recipe, replace(compiler, command=("/usr/bin/c++", "-m32"))),
        key_of(sources, recipe),
    ]
    assert len(set(keys)) == len(keys)
    elsewhere = replace(recipe, folder=Path("/another/place"))
    assert key_of(dict(reversed(sources.items())), elsewhere, compiler) == keys[0]


@needs_compiler
def test_the_real_flags_are_understood_by_this_compiler(recipe: Recipe, env: dict[str, str]) -> None:
    compiler = find_compiler(env)
    assert isinstance(compiler, Compiler)
    if os.uname().machine != "x86_64":
        pytest.skip("the flags are for x86-64")
    (recipe.folder / "answer.cpp").write_text(
        "#include <immintrin.h>\n__m512 f(__m512 a, __m512bh b) { return _mm512_dpbf16_ps(a, b, b); }\n"
        "__m512i g(__m512i a) { return _mm512_dpbusd_epi32(a, a, _mm512_permutexvar_epi8(a, a)); }\n"
    )
    run_all([(*compiler.command, *KERNELS.flags, "-Werror", "-c", "answer.cpp")], recipe.folder, env, 60.0)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"BRIGADE_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/brigade"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/c"}, "/c/.cache/brigade"),
        ({"BRIGADE_CACHE": "", "HOME": "/c"}, "/c/.cache/brigade"),
    ],
)
def test_the_cache_is_where_the_environment_says(env: dict[str, str], expected: str) -> None:
    assert build.cache_folders(env)[0] == Path(expected)


# Many processes -------------------------------------------------------------------------------------------------------


@needs_compiler
def test_processes_that_ask_at_once_compile_once(recipe: Recipe, env: dict[str, str], tmp_path: Path) -> None:
    env["CXX"] = compiler_that(tmp_path / "cxx", f"echo $* >> {tmp_path / 'calls'}; sleep 0.3")
    asking = [python(recipe, env) for _ in range(3)]
    origins = sorted(process.communicate(timeout=60)[0].strip() for process in asking)
    assert origins == ["cache", "cache", "compiled"]
    assert len((tmp_path / "calls").read_text().splitlines()) == 2, "one compiles, one links"


@needs_compiler
def test_whoever_waited_for_a_build_that_failed_takes_its_reason(
    recipe: Recipe, env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env["CXX"] = compiler_that(tmp_path / "cxx", f"echo call >> {tmp_path / 'calls'}; echo 'error: no'; exit 1")
    plan = look_up(FAST, recipe, env)
    assert isinstance(plan, Buildable)
    reason = why_not(find(recipe, env))
    assert "error: no" in reason
    waiting, answers = threading.Event(), []
    real = fcntl.flock

    def flock(file: int, how: int) -> None:
        try:
            real(file, how)
        except BlockingIOError:
            waiting.set()
            raise

    monkeypatch.setattr("brigade.kernels.cpu.build.fcntl.flock", flock)
    with build._locked(plan.folder / f"{build.PREFIX}{plan.key}.lock", 1.0):  # as the process that failed holds it
        waiter = threading.Thread(target=lambda: answers.append(find(recipe, env)))
        waiter.start()
        assert waiting.wait(20)
    waiter.join()
    assert [why_not(answer) for answer in answers] == [reason]
    assert (tmp_path / "calls").read_text() == "call\n", (
        "a compiler that hangs costs its deadline once, not once a rank"
    )
    assert why_not(find(recipe, env)) == reason
    assert (tmp_path / "calls").read_text() == "call\ncall\n", "a later start tries again"


@needs_compiler
def test_a_build_that_was_killed_half_way_leaves_no_trap(recipe: Recipe, env: dict[str, str], tmp_path: Path) -> None:
    slow, compiling = tmp_path / "slow", tmp_path / "compiling"
    slow.touch()
    env["CXX"] = compiler_that(tmp_path / "cxx", f"[ -e {slow} ] && echo $$ > {compiling} && exec sleep 60")
    killed = python(recipe, env)
    orphan = int(wait_for(compiling))
    try:
        killed.kill()
        killed.communicate()
        slow.unlink()
        result = built(recipe, env)
    finally:
        os.kill(orphan, signal.SIGKILL)
    assert (result.origin, answer(result.path)) == ("compiled", 42)
    assert sorted(p.suffix for p in result.path.parent.iterdir()) == [".lock", ".so"], "its leftovers are swept away"


@needs_compiler
def test_a_lock_that_is_never_released_sends_the_build_to_the_spare_folder(recipe: Recipe, env: dict[str, str]) -> None:
    plan = look_up(FAST, recipe, env)
    assert isinstance(plan, Buildable)
    plan.folder.mkdir(mode=0o700)
    with build._locked(plan.folder / f"{build.PREFIX}{plan.key}.lock", 1.0):
        result = find(recipe, env, lock_deadline=0.1)
    assert isinstance(result, Built)
    assert result.path.is_relative_to(env["TMPDIR"])
    assert "another process has been building for 0.1 s" in result.notes[0]


# Damaged entries ------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_entry_is_built_again(recipe: Recipe, env: dict[str, str], damage: str) -> None:
    path = built(recipe, env).path
    data = path.read_bytes()
    path.unlink()  # and not overwritten: this process has it loaded
    path.write_bytes({"cut": data[: len(data) // 2], "changed": data[:-1] + b"?", "empty": b""}[damage])
    result = built(recipe, env)
    assert (result.origin, answer(result.path)) == ("compiled", 42)
    assert len(list(path.parent.glob("*.so"))) == 1


@needs_compiler
def test_an_entry_that_is_whole_and_yet_does_not_load_is_not_used(recipe: Recipe, env: dict[str, str]) -> None:
    plan = look_up(FAST, recipe, env)
    assert isinstance(plan, Buildable)
    plan.folder.mkdir(mode=0o700)
    entry = plan.folder / "new"
    entry.write_text("not a library")
    entry.rename(plan.folder / f"{build.PREFIX}{plan.key}-{build._digest(entry)}.so")
    result = built(recipe, env)
    assert result.path.is_relative_to(env["TMPDIR"])
    assert str(plan.folder) in result.notes[0]


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ordinary_user() -> Iterator[Path]:
    """A folder of a user whom permissions bind: the tests' own, or nobody where the tests run as root."""
    folder = Path(tempfile.mkdtemp(prefix="brigade-test-"))
    me, nobody = os.geteuid(), 65534
    if me == 0:
        os.chown(folder, nobody, -1)
        os.seteuid(nobody)
    try:
        yield folder
    finally:
        os.seteuid(me)
        shutil.rmtree(folder)


@needs_compiler
def test_a_cache_that_cannot_be_written_gives_way_to_the_spare_folder(ordinary_user: Path) -> None:
    source, cache, spare = (ordinary_user / name for name in ("source", "cache", "spare"))
    for folder in (source, cache, spare):
        folder.mkdir()
    (source / "answer.cpp").write_text('extern "C" int answer() { return 42; }\n')
    recipe = Recipe(source, ("-O0", "-fPIC"))
    env = {"PATH": os.environ["PATH"], "BRIGADE_CACHE": str(cache), "TMPDIR": str(spare)}
    cache.chmod(0o500)
    first = built(recipe, env)
    assert first.path.parent == spare / f"brigade-{os.geteuid()}"
    assert str(cache) in first.notes[0]
    assert built(recipe, env).path == first.path, "found there the next time"
    spare.chmod(0o500)
    shutil.rmtree(first.path.parent, ignore_errors=True)
    for path in first.path.parent.glob("*"):
        path.unlink()
    first.path.parent.chmod(0o500)
    assert "set BRIGADE_CACHE" in why_not(find(recipe, env))


@needs_compiler
def test_a_library_in_a_read_only_cache_is_used(ordinary_user: Path) -> None:
    source, cache = ordinary_user / "source", ordinary_user / "cache"
    source.mkdir()
    (source / "answer.cpp").write_text('extern "C" int answer() { return 42; }\n')
    recipe = Recipe(source, ("-O0", "-fPIC"))
    env = {"PATH": os.environ["PATH"], "BRIGADE_CACHE": str(cache), "TMPDIR": str(ordinary_user)}
    path = built(recipe, env).path
    cache.chmod(0o500)
    assert built(recipe, env) == Built(path, "cache")


@needs_compiler
def test_a_read_only_file_system_gives_way_too(
    recipe: Recipe, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def read_only(path: str, flags: int, mode: int = 0o777, **more: int) -> int:
        if str(path).startswith(env["BRIGADE_CACHE"]):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return real(path, flags, mode, **more)

    monkeypatch.setattr("brigade.kernels.cpu.build.os.open", read_only)
    result = built(recipe, env)
    assert result.path.is_relative_to(env["TMPDIR"])
    assert "Read-only file system" in result.notes[0]


@needs_compiler
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_cache_that_others_can_write_is_refused(recipe: Recipe, env: dict[str, str], mode: int) -> None:
    path = built(recipe, env).path
    path.parent.chmod(mode)
    assert "can be written by other users; chmod go-w" in why_not(find(recipe, env))
    path.parent.chmod(0o755)
    assert built(recipe, env).path == path


def test_a_cache_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir(mode=0o700)
    owner = (tmp_path / "cache").stat().st_uid
    if owner == 0:
        os.chown(tmp_path / "cache", 4321, -1)
    monkeypatch.setattr("brigade.kernels.cpu.build.os.geteuid", lambda: 1234)
    assert "belongs to another user" in why_not(unsafe(tmp_path / "cache"))


@needs_compiler
def test_a_file_in_the_place_of_the_cache_is_refused(recipe: Recipe, env: dict[str, str]) -> None:
    Path(env["BRIGADE_CACHE"]).write_text("")
    assert "is not a folder" in why_not(find(recipe, env))


# Compilers ------------------------------------------------------------------------------------------------------------


def test_without_a_compiler_the_reason_says_what_to_install(recipe: Recipe, env: dict[str, str]) -> None:
    env["PATH"] = env["BRIGADE_CACHE"]
    assert why_not(find(recipe, env)).startswith("there is no C++ compiler; install g++")


@needs_compiler
def test_a_compiler_that_fails_is_quoted_by_its_first_error(recipe: Recipe, env: dict[str, str]) -> None:
    (recipe.folder / "answer.cpp").write_text("#warning first\nint answer() { return missing_name; }\n")
    reason = why_not(find(recipe, env))
    assert "answer.cpp:2" in reason
    assert "missing_name" in reason
    assert not list(Path(env["BRIGADE_CACHE"]).glob("*.so"))


@needs_compiler
def test_a_library_with_undefined_names_is_an_answer_too(recipe: Recipe, env: dict[str, str]) -> None:
    strict = replace(recipe, link_flags=KERNELS.link_flags)
    (recipe.folder / "answer.cpp").write_text("int missing_name();\nint answer() { return missing_name(); }\n")
    assert "missing_name" in why_not(find(strict, env))


@needs_compiler
def test_a_compiler_that_hangs_is_ended_with_all_that_it_started(
    recipe: Recipe, env: dict[str, str], tmp_path: Path
) -> None:
    env["CXX"] = compiler_that(tmp_path / "cxx", f"sleep 60 & echo $! > {tmp_path / 'child'}; wait")
    start = time.monotonic()
    assert "did not finish within 0.3 s" in why_not(find(recipe, env, compile_deadline=0.3))
    assert time.monotonic() - start < 20
    child = int(wait_for(tmp_path / "child"))
    while not gone(child):
        assert time.monotonic() - start < 20, "what the compiler started outlived it"
        time.sleep(0.01)
    assert [p.suffix for p in Path(env["BRIGADE_CACHE"]).iterdir()] == [".lock"]


# CPUs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", KERNELS.needs)
def test_a_missing_cpu_feature_is_named(feature: str) -> None:
    assert f"this CPU has no {feature}:" in why_not(find_library(ALL - {feature}))


def test_a_cpu_that_lists_nothing_gets_no_library_and_no_advice() -> None:
    result = look_up(frozenset())
    assert isinstance(result, Unavailable)
    assert all(feature in result.reason for feature in KERNELS.needs)
    assert result.advice == "", "nobody can add instructions to a CPU"


def test_a_package_without_sources_is_an_answer(recipe: Recipe, env: dict[str, str]) -> None:
    (recipe.folder / "answer.cpp").unlink()
    assert "no kernel sources" in why_not(find(recipe, env))
    shutil.rmtree(recipe.folder)
    assert "cannot be read" in why_not(find(recipe, env))


# Prebuilt libraries ---------------------------------------------------------------------------------------------------


@needs_compiler
def test_a_prebuilt_library_needs_neither_compiler_nor_cache(recipe: Recipe, env: dict[str, str]) -> None:
    made = prebuild(recipe.prebuilt, recipe, env)
    assert isinstance(made, Built)
    env["PATH"] = ""
    found = built(recipe, env)
    assert (found.origin, found.path, answer(found.path)) == ("prebuilt", made.path, 42)
    assert not Path(env["BRIGADE_CACHE"]).exists()


@needs_compiler
@pytest.mark.parametrize("change", ["sources", "flags", "damage"])
def test_a_prebuilt_library_of_other_sources_or_flags_or_a_damaged_one_is_refused(
    recipe: Recipe, env: dict[str, str], change: str
) -> None:
    made = prebuild(recipe.prebuilt, recipe, env)
    assert isinstance(made, Built)
    if change == "sources":
        (recipe.folder / "value.h").write_text("#define VALUE 7\n")
    if change == "flags":
        recipe = replace(recipe, flags=("-O1", "-fPIC"))
    if change == "damage":
        data = made.path.read_bytes()
        made.path.unlink()
        made.path.write_bytes(data[:-1])
    result = built(recipe, env)
    assert (result.origin, answer(result.path)) == ("compiled", 7 if change == "sources" else 42)


@needs_compiler
def test_a_prebuilt_library_that_does_not_load_here_is_replaced_by_a_compiled_one(
    recipe: Recipe, env: dict[str, str]
) -> None:
    recipe.prebuilt.mkdir()
    new = recipe.prebuilt / "new"
    new.write_text("for another C library")
    new.rename(
        recipe.prebuilt / f"{build.PREFIX}{key_of(build.read_sources(recipe.folder), recipe)}-{build._digest(new)}.so"
    )
    result = built(recipe, env)
    assert result.origin == "compiled"
    assert str(recipe.prebuilt) in result.notes[0]


@needs_compiler
def test_a_prebuilt_library_is_refused_where_the_cpu_lacks_a_feature(recipe: Recipe, env: dict[str, str]) -> None:
    prebuild(recipe.prebuilt, recipe, env)
    assert "has no fast" in why_not(find_library(frozenset({"other"}), recipe, env))


def test_the_command_line_says_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_the_command_line_says_why_nothing_was_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert build.main([str(tmp_path)]) == 1
    assert "CXX" in capsys.readouterr().err
