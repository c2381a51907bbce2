"""What "auto" becomes on machines of every size."""

from dataclasses import replace
from pathlib import Path

import pytest

from brigade.engine import auto
from brigade.engine.auto import GIB, Machine
from brigade.engine.config import DEMO_MODEL, EngineConfig
from brigade.spec.config import read_spec
from brigade.spec.model import ModelSpec
from brigade.spec.params import count

LIBRARY = Path("kernels.so")
SPEC = read_spec(Path(DEMO_MODEL))
PAGE_BYTES = SPEC.n_layers * 16 * SPEC.kv_width * 4


def resolve(config: EngineConfig, machine: Machine, dtype: str = "float32") -> auto.Resolved:
    return auto.resolve(config, SPEC, machine, dtype)


def on_torch(config: EngineConfig, machine: Machine) -> auto.Computing:
    return auto.computing(config, SPEC, machine, None, "there is no compiler")


def test_the_kernels_are_used_where_they_are_and_torch_says_why_not_elsewhere() -> None:
    got = auto.computing(EngineConfig(), SPEC, Machine(2, GIB), LIBRARY, "")
    assert (got.dtype, got.kind, got.library) == ("bfloat16", "bf16", LIBRARY)
    assert auto.computing(EngineConfig(weights="int8"), SPEC, Machine(2, GIB), LIBRARY, "").kind == "int8"
    int4 = auto.computing(EngineConfig(weights="int4"), SPEC, Machine(2, GIB), LIBRARY, "")
    assert int4.kind == "int4"
    assert "int4 experts" in int4.note
    assert "int8 attention" in int4.note
    assert auto.computing(EngineConfig(dtype="float32"), SPEC, Machine(2, GIB), LIBRARY, "").library is None
    assert "no compiler" in on_torch(EngineConfig(), Machine(2, GIB)).note


def test_weights_that_only_the_kernels_have_are_an_error_without_them() -> None:
    with pytest.raises(ValueError, match=r"int8.*no compiler"):
        on_torch(EngineConfig(weights="int8"), Machine(2, GIB))
    with pytest.raises(ValueError, match="weights int8"):
        EngineConfig(weights="int8", dtype="float32")


def test_on_torch_float32_is_chosen_where_it_takes_at_most_half_of_the_free_memory() -> None:
    need = 8 * count(SPEC)
    assert on_torch(EngineConfig(), Machine(2, need)).dtype == "float32"
    got = on_torch(EngineConfig(), Machine(2, need - 2))
    assert got.dtype == "bfloat16"
    assert "half" in got.note


@pytest.mark.parametrize("asked", ["float16", "bfloat16", "float32"])
def test_a_type_that_was_asked_for_is_taken(asked: str) -> None:
    config = EngineConfig(dtype=asked)  # type: ignore[arg-type]
    assert on_torch(config, Machine(2, 1)).dtype == asked


def test_on_torch_a_small_model_gets_one_thread_elsewhere_all_cores_work() -> None:
    def threads(config: EngineConfig, spec: ModelSpec, library: Path | None) -> int:
        machine = Machine(8, GIB)
        return auto.threads(config, spec, machine, auto.computing(config, spec, machine, library, ""))[0]

    assert threads(EngineConfig(), SPEC, None) == 1
    assert threads(EngineConfig(), SPEC, LIBRARY) == 8
    assert threads(EngineConfig(threads=3), SPEC, LIBRARY) == 3
    assert threads(EngineConfig(), replace(SPEC, vocab=1_000_000), None) == 8


def test_the_cache_is_no_larger_than_all_running_requests_can_fill() -> None:
    got = resolve(EngineConfig(max_running=4), Machine(2, 64 * GIB))
    assert (got.n_pages, got.max_context) == (4 * 1024 // 16, 1024)


def test_on_a_small_machine_the_cache_is_a_quarter_of_what_is_free() -> None:
    got = resolve(EngineConfig(), Machine(2, 4 * 100 * PAGE_BYTES))
    assert (got.n_pages, got.max_context) == (100, 1024)


def test_a_cache_that_was_asked_for_is_taken_if_that_much_is_free() -> None:
    config = EngineConfig(kv_bytes=100 * PAGE_BYTES)
    assert resolve(config, Machine(2, 100 * PAGE_BYTES)).n_pages == 100
    assert resolve(config, Machine(2, 100 * PAGE_BYTES), "bfloat16").n_pages == 200
    with pytest.raises(ValueError, match="kv_bytes"):
        resolve(config, Machine(2, 100 * PAGE_BYTES - 1))


def test_a_cache_smaller_than_the_context_shortens_the_context_and_says_so() -> None:
    got = resolve(EngineConfig(kv_bytes=10 * PAGE_BYTES + 5), Machine(2, GIB))
    assert (got.n_pages, got.max_context) == (10, 160)
    assert any("context 160 instead of 1024" in note for note in got.notes)


def test_a_shorter_context_that_was_asked_for_is_not_called_a_shortage() -> None:
    got = resolve(EngineConfig(max_context=200), Machine(2, GIB))
    assert got.max_context == 200
    assert not any("instead of" in note for note in got.notes)


def test_a_longer_context_than_the_model_has_is_not_cut_in_silence() -> None:
    got = resolve(EngineConfig(max_context=5000), Machine(2, GIB))
    assert got.max_context == 1024
    assert any("5000" in note for note in got.notes)


@pytest.mark.parametrize("config", [EngineConfig(kv_bytes=1), EngineConfig(kv_bytes=PAGE_BYTES), EngineConfig()])
def test_a_cache_that_holds_nothing_is_an_error_that_names_the_setting(config: EngineConfig) -> None:
    with pytest.raises(ValueError, match="--kv-memory"):
        resolve(config, Machine(2, PAGE_BYTES))


def test_every_choice_has_a_line_that_explains_it() -> None:
    machine = Machine(2, GIB)
    computing = on_torch(EngineConfig(), machine)
    _, threads = auto.threads(EngineConfig(), SPEC, machine, computing)
    notes = [computing.note, threads, *resolve(EngineConfig(), machine).notes]
    assert all(word in note for word, note in zip(("dtype", "threads", "KV cache"), notes, strict=True))


def test_this_machine_has_cores_and_memory() -> None:
    machine = auto.this_machine()
    assert machine.cores >= 1
    assert 0 < machine.free_bytes < 1 << 50


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("page", 0),
        ("page", 1025),
        ("max_running", 0),
        ("max_waiting", -1),
        ("max_step_tokens", 0),
        ("depth", 0),
        ("depth", 5),
        ("drafts", -1),
        ("drafts", 2),
        ("drafts", True),
        ("threads", -1),
        ("kv_bytes", -1),
        ("max_context", -1),
        ("step_deadline", float("nan")),
        ("step_deadline", 0),
        ("dtype", "int8"),
        ("page", 16.5),
        ("page", "16"),
        ("max_running", True),
        ("step_deadline", "60"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        EngineConfig(**{field: value})  # type: ignore[arg-type]


def test_fewer_step_tokens_than_running_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="max_step_tokens"):
        EngineConfig(max_running=65, max_step_tokens=64)
    with pytest.raises(ValueError, match="at least max_running times 2, with drafts 1"):
        EngineConfig(max_running=33, max_step_tokens=64, drafts=1)
