"""Imports point one way. The table is the design's picture of the folders; the tests read the source to hold it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    "spec": set(),
    "core": {"spec"},
    "comm": {"spec"},
    "kernels": {"spec"},
    "model": {"spec", "core", "comm", "kernels"},
    "engine": {"spec", "core", "comm", "kernels", "model"},
    "serve": {"spec", "core", "engine"},
    "plan": {"spec", "core"},
    "cli": {"spec", "core", "engine", "serve", "comm", "kernels", "model", "plan"},
}
TOP = {"__init__", "__main__"}
"""Modules beside the folders: the door to the package, which may name anything but must load no torch."""

PURE = {"spec", "core"}
NOT_PURE = {
    *("torch", "numpy", "time", "datetime", "random", "secrets", "uuid"),
    *("socket", "ssl", "select", "selectors", "asyncio", "threading", "multiprocessing", "concurrent", "subprocess"),
    *("signal", "zmq", "msgspec", "pydantic", "logging", "os", "ctypes", "tempfile"),
}
RUNS_CODE = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "codeop"}
TEST_ONLY = {"transformers", "pytest", "hypothesis", "openai", "schemathesis", "gguf"}

WITHOUT_TORCH = {
    *("brigade", "brigade.__main__"),
    *(f"brigade.engine.{m}" for m in ("client", "tokenizer", "output", "config", "messages")),
    *("brigade.comm.group", "brigade.comm.segment", "brigade.comm.link"),
    *("brigade.engine.supervisor", "brigade.engine.rendezvous"),
}
WITHOUT_TORCH_FOLDERS = {"spec", "core", "serve", "cli", "plan"}


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    at_start: bool
    """True: runs when the importing module is loaded; False: inside a function."""
    typing_only: bool


@dataclass(frozen=True)
class Source:
    name: str
    folder: str
    tree: ast.Module
    imports: tuple[Import, ...]

    @property
    def at_start(self) -> set[str]:
        return {i.module for i in self.imports if i.at_start and not i.typing_only}


def read_sources(root: Path) -> dict[str, Source]:
    paths = sorted((root / "brigade").rglob("*.py"))
    names = {_name(path.relative_to(root)) for path in paths}
    return {s.name: s for s in (_read(path, root, names) for path in paths)}


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _read(path: Path, root: Path, names: set[str]) -> Source:
    name = _name(path.relative_to(root))
    parts = path.relative_to(root / "brigade").with_suffix("").parts
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return Source(name, parts[0], tree, tuple(_imports(tree, package, names)))


def _imports(tree: ast.Module, package: str, names: set[str]) -> Iterator[Import]:
    todo: list[tuple[ast.AST, bool, bool]] = [(tree, True, False)]
    while todo:
        node, at_start, typing_only = todo.pop()
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_start, typing_only)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, base] if base else up)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(inner if inner in names else base, node.lineno, at_start, typing_only)
                if base in ("torch", "importlib"):
                    yield Import(inner, node.lineno, at_start, typing_only)
        inside = at_start and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        typed = typing_only or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        todo += [(child, inside, typed) for child in ast.iter_child_nodes(node)]


SOURCES = read_sources(ROOT)


def is_or_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def against_the_arrows(sources: dict[str, Source]) -> list[str]:
    out = []
    for source in sources.values():
        if source.folder in TOP:
            continue
        for i in source.imports:
            if not is_or_in(i.module, "brigade"):
                continue
            other = i.module.removeprefix("brigade").removeprefix(".").partition(".")[0]
            if other != source.folder and other not in MAY_IMPORT[source.folder]:
                out.append(f"{source.name}:{i.line}: {source.folder} must not import {i.module}")
    return out


def outside_allowed(sources: dict[str, Source], package: str, folders: set[str]) -> list[str]:
    return [
        f"{source.name}:{i.line}: imports {i.module}"
        for source in sources.values()
        for i in source.imports
        if is_or_in(i.module, package) and source.folder not in folders
    ]


def runs_code(sources: dict[str, Source]) -> list[str]:
    out = []
    for source in sources.values():
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.Call):
                continue
            f = node.func
            called = f.id if isinstance(f, ast.Name) else ""
            if called in ("eval", "exec", "compile", "__import__"):
                out.append(f"{source.name}:{node.lineno}: calls {called}")
            if isinstance(f, ast.Attribute) and f.attr == "load" and ast.unparse(f.value) == "torch":
                out.append(f"{source.name}:{node.lineno}: calls torch.load")
            if any(k.arg in ("allow_pickle", "trust_remote_code") for k in node.keywords):
                out.append(f"{source.name}:{node.lineno}: asks for pickle or for code of a checkpoint")
    return out


def loads(sources: dict[str, Source], start: str) -> dict[str, str]:
    """Every module that importing `start` loads, with the chain of modules that leads there."""
    chain = {start: start}
    todo = [start]
    while todo:
        name = todo.pop()
        parents = {name.rpartition(".")[0]} - {""} if name in sources else set()
        for module in (sources[name].at_start if name in sources else set()) | parents:
            if module not in chain:
                chain[module] = f"{chain[name]} -> {module}"
                todo.append(module)
    return chain


def torch_chains(sources: dict[str, Source]) -> list[str]:
    out = []
    for name, source in sources.items():
        if name in WITHOUT_TORCH or source.folder in WITHOUT_TORCH_FOLDERS:
            chains = loads(sources, name)
            out += [chain for module, chain in chains.items() if is_or_in(module, "torch")]
            out += [chain for module, chain in chains.items() if module in ("safetensors.torch", "transformers")]
    return out


def cycles(sources: dict[str, Source]) -> list[str]:
    graph = {
        s.name: {i.module for i in s.imports if i.module in sources and not i.typing_only and i.module != s.name}
        for s in sources.values()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        return [" -> ".join(e.args[1])]
    return []


def test_every_folder_is_in_the_table() -> None:
    folders = {s.folder for s in SOURCES.values()} - TOP
    assert folders <= set(MAY_IMPORT), "say in MAY_IMPORT what the new folder may import"


def test_the_table_itself_points_one_way() -> None:
    TopologicalSorter(MAY_IMPORT).prepare()


def test_imports_follow_the_arrows() -> None:
    assert against_the_arrows(SOURCES) == []


def test_core_and_spec_know_no_tensors_no_clock_no_chance_and_no_sockets() -> None:
    wrong = [
        f"{s.name}:{i.line}: imports {i.module}"
        for s in SOURCES.values()
        if s.folder in PURE
        for i in s.imports
        if i.module.split(".")[0] in NOT_PURE
    ]
    assert wrong == []


def test_core_and_spec_need_nothing_but_the_standard_library() -> None:
    wrong = [
        f"{s.name}:{i.line}: imports {i.module}"
        for s in SOURCES.values()
        if s.folder in PURE
        for i in s.imports
        if i.module.split(".")[0] not in {*sys.stdlib_module_names, "brigade"}
    ]
    assert wrong == []


@pytest.mark.parametrize("package", ["torch.distributed", "nixl", "zmq"])
def test_only_comm_moves_bytes_between_ranks(package: str) -> None:
    assert outside_allowed(SOURCES, package, {"comm"}) == []


def test_nobody_reaches_torch_distributed_without_importing_it() -> None:
    wrong = [
        f"{s.name}:{node.lineno}"
        for s in SOURCES.values()
        if s.folder != "comm"
        for node in ast.walk(s.tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed")
    ]
    assert wrong == []


@pytest.mark.parametrize("package", sorted(RUNS_CODE))
def test_nothing_reads_a_format_that_can_run_code(package: str) -> None:
    assert outside_allowed(SOURCES, package, set()) == []


def test_nothing_evaluates_text_or_loads_pickled_tensors() -> None:
    assert runs_code(SOURCES) == []


@pytest.mark.parametrize("package", sorted(TEST_ONLY))
def test_what_only_tests_need_is_not_imported(package: str) -> None:
    assert outside_allowed(SOURCES, package, set()) == []


def test_one_file_knows_ray() -> None:
    know = {s.name for s in SOURCES.values() for i in s.imports if is_or_in(i.module, "ray")}
    assert know == {"brigade.cli.ray_hosts"}


def test_serve_never_imports_torch_and_cli_only_inside_functions() -> None:
    serve = [i for s in SOURCES.values() if s.folder == "serve" for i in s.imports]
    cli = [i for s in SOURCES.values() if s.folder == "cli" for i in s.imports if i.at_start]
    assert [i for i in serve + cli if is_or_in(i.module, "torch")] == []


def test_what_stands_before_the_worker_loads_no_torch() -> None:
    assert torch_chains(SOURCES) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert cycles(SOURCES) == []


PROCESSES = ["brigade, brigade.core.scheduler, brigade.spec.config, brigade.spec.params", "brigade.engine.client"]


@pytest.mark.parametrize("modules", PROCESSES)
def test_a_fresh_process_that_imports_them_has_not_loaded_torch(modules: str) -> None:
    names = [m.strip() for m in modules.split(",")]
    assert set(names) <= set(SOURCES)
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=60).returncode == 0


# These tests can fail -------------------------------------------------------------------------------------------------


def written(root: Path, **files: str) -> dict[str, Source]:
    for name, text in files.items():
        path = root / "brigade" / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read_sources(root)


def test_an_arrow_against_the_table_is_seen(tmp_path: Path) -> None:
    sources = written(tmp_path, core__a="from brigade.engine import b\n", engine__b="from ..core import a\n")
    assert against_the_arrows(sources) == ["brigade.core.a:1: core must not import brigade.engine.b"]


def test_an_arrow_hidden_in_a_function_is_seen(tmp_path: Path) -> None:
    sources = written(tmp_path, serve__a="def f():\n    import brigade.model.x\n")
    assert against_the_arrows(sources) == ["brigade.serve.a:2: serve must not import brigade.model.x"]


def test_torch_behind_three_modules_is_seen(tmp_path: Path) -> None:
    sources = written(
        tmp_path,
        serve__a="from brigade.engine import b\n",
        engine__b="from brigade.engine.c import x\n",
        engine__c="import torch.nn\n",
    )
    assert torch_chains(sources) == ["brigade.serve.a -> brigade.engine.b -> brigade.engine.c -> torch.nn"]


def test_torch_inside_a_function_or_for_types_only_is_not_loaded(tmp_path: Path) -> None:
    late = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import torch\n"
    assert torch_chains(written(tmp_path, cli__a=late)) == []


@pytest.mark.parametrize("text", ["eval('1')", "exec('1')", "import torch\ntorch.load('x')", "f(allow_pickle=True)"])
def test_code_that_runs_text_is_seen(tmp_path: Path, text: str) -> None:
    assert len(runs_code(written(tmp_path, model__a=text + "\n"))) == 1


@pytest.mark.parametrize("text", ["import torch.distributed as dist", "from torch import distributed"])
def test_torch_distributed_outside_comm_is_seen(tmp_path: Path, text: str) -> None:
    sources = written(tmp_path, model__a=text + "\n", comm__b=text + "\n")
    assert [w.split(":")[0] for w in outside_allowed(sources, "torch.distributed", {"comm"})] == ["brigade.model.a"]


def test_a_circle_is_seen(tmp_path: Path) -> None:
    sources = written(tmp_path, core__a="import brigade.core.b\n", core__b="from brigade.core import a\n")
    assert len(cycles(sources)) == 1
