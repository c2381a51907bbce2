"""The bench scripts on a tiny checkpoint, and their arithmetic on numbers that can be checked by hand."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from safetensors import safe_open

from bench import drafts, handover, interference, limits, make_checkpoint, peers, ranks, rebalance, session
from bench.child import Child, ChildFailed, JobRefused
from bench.engines.wire import Options, decoded
from bench.limits import Limits
from bench.report import COLUMNS, Sample, cells, lines
from bench.roofline import decode_limit, decode_ops, prefill_limit
from bench.usage import Usage
from bench.workloads import Lengths, Workload, prompts
from brigade.comm.kv.nixl import installed
from brigade.engine.tokenizer import Tokenizer
from brigade.spec.config import read_spec
from brigade.spec.params import active, count

QUIET = Usage(seconds=1.0, own_cores=1.0, other_cores=0.0, load_average=0.0)
SLOW_MEMORY = Limits(threads=1, read_gbs=1.0, bf16_gflops=1e12, int8_gops=1e12, sources={})
SLOW_PRODUCTS = Limits(threads=1, read_gbs=1e12, bf16_gflops=1.0, int8_gops=1.0, sources={})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    make_checkpoint.make_checkpoint(folder, "tiny", seed=1, shard_bytes=300_000)
    return folder


def stored(folder: Path) -> dict[str, bytes]:
    """Every tensor's bytes, found by way of the index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for name, file in index.items():
        with safe_open(folder / file, "pt") as shard:
            found[name] = shard.get_tensor(name).float().numpy().tobytes()
    return found


class TestCheckpoint:
    def test_holds_every_tensor_of_its_own_config_in_shards_that_the_index_names(self, tiny: Path) -> None:
        spec = read_spec(tiny)
        assert len(list(tiny.glob("*.safetensors"))) > 2
        assert sum(len(v) for v in stored(tiny).values()) == 4 * count(spec)
        assert all(file.stat().st_size < 330_000 for file in tiny.glob("*.safetensors"))

    def test_is_the_same_for_the_same_seed_however_it_is_cut(self, tiny: Path, tmp_path: Path) -> None:
        make_checkpoint.make_checkpoint(tmp_path / "again", "tiny", seed=1, shard_bytes=10**9)
        make_checkpoint.make_checkpoint(tmp_path / "other", "tiny", seed=2, shard_bytes=10**9)
        assert stored(tmp_path / "again") == stored(tiny)
        assert stored(tmp_path / "other") != stored(tiny)

    def test_with_a_layer_that_drafts_the_other_tensors_are_the_same(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(make_checkpoint, "write_tokenizer", lambda *_: None)
        make_checkpoint.make_checkpoint(tmp_path, "tiny", seed=1, shard_bytes=10**9, mtp=True)
        without, found = stored(tiny), stored(tmp_path)
        assert {name: found[name] for name in without} == without
        assert {name.rsplit(".", 2)[0][:14] for name in found.keys() - without.keys()} == {"model.layers.3"}
        assert sum(len(v) for v in found.values()) == 4 * count(read_spec(tmp_path, drafts=1))

    def test_has_a_tokenizer_that_fills_the_vocabulary_and_gives_text_back(self, tiny: Path) -> None:
        tokenizer = Tokenizer(tiny)
        text = "def größe(x):\n    return 12345 # 漢字"
        assert tokenizer.vocab == read_spec(tiny).vocab
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(text)[0] == 0

    def test_is_not_written_over_another_one(self, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert make_checkpoint.main([str(tiny), "--preset", "tiny"]) == 1
        assert "already holds a checkpoint" in capsys.readouterr().err

    def test_of_the_tables_has_the_size_that_the_docs_say(self, tmp_path: Path) -> None:
        sizes = make_checkpoint.config(make_checkpoint.PRESETS["mid"])
        (tmp_path / "config.json").write_text(json.dumps(sizes))
        spec = read_spec(tmp_path)
        assert (round(count(spec) / 1e9, 3), round(active(spec) / 1e9, 3)) == (1.259, 0.258)


class TestDrafts:
    def test_a_step_with_drafts_gives_more_tokens_and_takes_longer(self) -> None:
        """150 tokens/s where a step gives 1.5 of them are 100 steps/s, against 120 without."""
        found = {(8, 0): [drafts.Round(120.0, [], 0, 0)] * 3, (8, 1): [drafts.Round(150.0, [], 40, 20)] * 3}
        table = drafts.table([8], found)
        assert [next(iter(column.cells)) for column in table.columns] == [
            *("8", "120", "120-120", "150", "150-150", "1.25", "50.0%", "1.20 x")
        ]


class TestDecodeRate:
    def test_counts_from_the_last_first_token_to_the_first_last_token(self) -> None:
        result = decoded(10.0, [[11.0, 12.0, 13.0, 14.0], [12.0, 13.0, 14.0, 15.0]])
        assert result.tokens_per_second == pytest.approx(4 / 2)
        assert result.ttft == pytest.approx(1.5)

    def test_refuses_outputs_that_never_overlap(self) -> None:
        with pytest.raises(ValueError, match="longer outputs"):
            decoded(0.0, [[1.0, 2.0], [2.0, 3.0]])


class TestLimits:
    def test_keep_the_best_of_the_probes_that_can_run(self) -> None:
        def slow(threads: int) -> float:
            return 2.0 * threads

        def fast(threads: int) -> float:
            return 3.0 * threads

        def absent(threads: int) -> None:
            return None

        found = limits.measure(2, read=(slow, fast, absent), bf16=(fast, slow), int8=(slow,))
        assert (found.read_gbs, found.bf16_gflops, found.int8_gops) == (6.0, 6.0, 4.0)
        assert found.sources == {"read": "fast", "bf16": "fast", "int8": "slow"}
        with pytest.raises(RuntimeError, match="no way to measure int8"):
            limits.measure(1, read=(slow,), bf16=(slow,), int8=(absent,))

    def test_say_how_far_apart_two_cores_are(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a compiler or a second CPU nothing is said; where something is, no line is faster than light."""
        found = limits.cache_line_ns()
        assert found is None or 1 < found < 1e6
        limits._library.cache_clear()
        monkeypatch.setattr(limits.shutil, "which", lambda name: None)
        assert limits.cache_line_ns() is None
        limits._library.cache_clear()

    def test_of_decoding_alone_is_bandwidth_over_active_bytes_and_cache(self, tiny: Path) -> None:
        spec = read_spec(tiny)
        gates = sum(op.n_bytes / 2 for op in decode_ops(spec, "bf16", 1, 0) if op.name.endswith("mlp.gate.weight"))
        cache = 100 * spec.n_layers * (32 + 16) * 2
        expected = 2 * active(spec) + gates + cache
        assert decode_limit(spec, SLOW_MEMORY, "bf16", 1, 100) == pytest.approx(1e9 / expected)

    def test_of_many_requests_reads_every_expert_once(self, tiny: Path) -> None:
        spec = read_spec(tiny)
        experts = {op.name: op for op in decode_ops(spec, "bf16", 1000, 0) if "experts.*" in op.name}
        assert {round(op.n_bytes) for op in experts.values()} == {16 * 64 * 32 * 2}

    def test_of_prefill_counts_two_operations_a_weight_but_the_head_only_once(self, tiny: Path) -> None:
        spec = read_spec(tiny)
        head = spec.vocab * spec.dim
        attention = 2 * (64 * 65 // 2) * spec.n_layers * 4 * (32 + 16)
        expected = 2 * (64 * (active(spec) - head) + head) + attention
        assert prefill_limit(spec, SLOW_PRODUCTS, "bf16", 64) == pytest.approx(64 * 1e9 / expected)

    def test_rises_with_smaller_weights(self, tiny: Path) -> None:
        spec = read_spec(tiny)
        rates = [decode_limit(spec, SLOW_MEMORY, precision, 1, 0) for precision in ("bf16", "int8", "int4")]
        assert rates == sorted(set(rates))


class TestPrompts:
    def test_repeat_for_a_seed_and_differ_from_each_other(self) -> None:
        made = prompts("decode 0", 32, 16, 2048)
        assert made == prompts("decode 0", 32, 16, 2048)
        assert made != prompts("decode 1", 32, 16, 2048)
        assert len({tuple(p) for p in made}) == 32
        assert {len(p) for p in made} == {16}


class TestReport:
    def test_gives_medians_and_how_many_times_faster_brigade_is(self) -> None:
        work = Workload("decode", 8)
        rates = {"brigade": [90.0, 100.0, 130.0], "vllm": [50.0, 40.0, 60.0]}
        samples = [
            Sample(engine, "bf16", work, i, rate, 0.5, 200.0, QUIET)
            for engine, of_one in rates.items()
            for i, rate in enumerate(of_one)
        ]
        ours, theirs = lines(samples)
        assert (ours.tokens_per_second, ours.of_limit, ours.brigade_ratio) == (100.0, 0.5, None)
        assert (theirs.tokens_per_second, theirs.of_limit, theirs.brigade_ratio) == (50.0, 0.25, 2.0)
        shown = dict(zip(COLUMNS, cells(theirs), strict=True))
        assert (shown["tok/s"], shown["limit"], shown["of limit"], shown["Brigade / it"]) == (
            "50.0",
            "200",
            "25%",
            "2.00",
        )


@pytest.fixture
def start(tmp_path: Path) -> Iterator[object]:
    """Starts an adapter whose engine is given as Python source; ends them all afterwards."""
    started = []

    def run(source: str) -> Child:
        code = f"import sys, time\nfrom bench.engines.wire import answer, Decoded\n{source}"
        command = [sys.executable, "-c", code, Options(checkpoint="", venv="").to_json()]
        started.append(Child(command, {}, tmp_path / "log"))
        return started[-1]

    yield run
    for child in started:
        child.end()


ENGINE = """
class Engine:
    def __init__(self, options): print('loading, with noise')
    def facts(self): return {'version': '1'}
    def warm(self, prompts): print('noise')
    def decode(self, prompts, n_out):
        print('{"tokens_per_second": 666}')
        if n_out == 0: raise ValueError('outputs are too short')
        if n_out == 1: sys.exit('out of memory')
        if n_out == 2: time.sleep(60)
        return Decoded(float(n_out), 0.25)
    def prefill(self, prompts): return [0.5 for p in prompts]
answer(Engine)
"""


class TestAdapterProcess:
    def test_answers_jobs_whatever_its_engine_prints(self, start) -> None:
        child = start(ENGINE)
        assert child.ready(30) == {"version": "1"}
        assert child.ask({"job": "warm", "prompts": [[1]]}, 30) == {"done": True}
        assert child.ask({"job": "decode", "prompts": [[1]], "n_out": 9}, 30) == {
            "tokens_per_second": 9.0,
            "ttft": 0.25,
        }
        assert child.ask({"job": "prefill", "prompts": [[1], [2]]}, 30) == {"seconds": [0.5, 0.5]}

    def test_goes_on_after_a_job_that_it_must_refuse(self, start) -> None:
        child = start(ENGINE)
        child.ready(30)
        with pytest.raises(JobRefused, match="too short"):
            child.ask({"job": "decode", "prompts": [[1]], "n_out": 0}, 30)
        assert child.ask({"job": "warm", "prompts": []}, 30) == {"done": True}

    def test_that_ends_is_told_with_its_last_words(self, start) -> None:
        child = start(ENGINE)
        child.ready(30)
        with pytest.raises(ChildFailed, match="out of memory"):
            child.ask({"job": "decode", "prompts": [[1]], "n_out": 1}, 30)

    def test_that_is_too_slow_is_given_up_and_ended(self, start, monkeypatch: pytest.MonkeyPatch) -> None:
        child = start(ENGINE)
        child.ready(30)
        with pytest.raises(ChildFailed, match="no answer"):
            child.ask({"job": "decode", "prompts": [[1]], "n_out": 2}, 0.2)
        child.end(grace=0.1)
        with pytest.raises(ProcessLookupError):
            os.killpg(child.pid, 0)


class TestPeers:
    def test_are_the_folders_that_an_adapter_knows(self, tmp_path: Path) -> None:
        for name in ("vllm", "vllm-zentorch", "llama.cpp", "convert", "brigade"):
            (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / "transformers").mkdir()  # not installed to the end
        names = [engine.name for engine in session.installed(tmp_path)]
        assert names == ["brigade", "llama.cpp", "vllm", "vllm-zentorch"]

    def test_that_are_not_there_cannot_be_asked_for(self, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert peers.main([str(tiny), "--engines", "sglang"]) == 2
        assert "sglang not found" in capsys.readouterr().err

    def test_need_a_model_with_room_for_the_work(self, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert peers.main([str(tiny), "--prefill", "4096"]) == 2
        assert "the model has 1024" in capsys.readouterr().err

    def test_session_with_brigade_alone_gives_a_line_for_each_workload(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(session, "measure_apart", lambda threads: SLOW_MEMORY)
        out, table = tmp_path / "peers.json", tmp_path / "peers.md"
        sizes = ["--concurrency", "1,2", "--prefill", "32", "--input-len", "8", "--output-len", "24"]
        files = ["--logs", str(tmp_path), "--json", str(out), "--markdown", str(table)]
        assert peers.main([str(tiny), "--rounds", "1", "--threads", "1", *sizes, *files]) == 0
        record = json.loads(out.read_text())
        assert [(x["workload"]["kind"], x["workload"]["size"]) for x in record["lines"]] == [
            ("decode", 1),
            ("decode", 2),
            ("prefill", 32),
        ]
        assert all(x["tokens_per_second"] > 0 and x["ttft"] > 0 and x["of_limit"] > 0 for x in record["lines"])
        assert record["problems"] == []
        assert "float32" not in " ".join(record["engines"]["brigade bf16"]["notes"])
        assert "| decode, 2 at once | bf16 | brigade |" in table.read_text()


def test_lengths_say_how_much_stands_behind_a_decoded_token() -> None:
    assert Lengths(n_in=128, n_out=48).context == 152


def test_ranks_of_a_tiny_model_say_the_same_in_every_layout(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--layouts", "1x1,2x1", "--concurrency", "3", "--tokens", "4", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["bench.ranks", str(tiny), *arguments])
    assert ranks.main() == 0
    out = capsys.readouterr().out
    assert "2 x 1" in out
    assert "waking 2 idle ranks" in out


def test_experts_of_a_tiny_model_move_and_say_the_same(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--redundant", "2", "--concurrency", "3", "--tokens", "20", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["bench.rebalance", str(tiny), *arguments])
    assert rebalance.main() == 0
    out = capsys.readouterr().out
    assert "| experts move |" in out
    assert "  1 tokens: counting" in out


def test_kv_rows_are_measured_on_every_link() -> None:
    command = [sys.executable, "-m", "bench.kv_link", "--tokens", "64", "--layers", "2", "--rounds", "1"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")][2:] == [
        *("shared", "shared, no C++", "tcp"),
        *(("nixl",) if installed() else ()),
    ]


def test_what_a_hand_over_adds_is_measured(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--tokens", "40", "--links", "tcp", "--rounds", "1", "--kv-mib", "4"]
    monkeypatch.setattr(sys, "argv", ["bench.handover", str(tiny), *arguments])
    handover.main()
    assert "| tcp |" in capsys.readouterr().out


def test_chats_beside_long_prompts_are_measured_and_drawn_on_both_deployments(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = tmp_path / "drawn.svg"
    arguments = ["--chats", "1", "--prompt", "64", "--every", "0.3", "--seconds", "0.5", "--plot", str(drawn)]
    monkeypatch.setattr(sys, "argv", ["bench.interference", str(tiny), *arguments])
    assert interference.main() == 0
    out = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")][2:] == ["mixed", "apart"]
    assert len(ElementTree.parse(drawn).findall("{http://www.w3.org/2000/svg}polyline")) == 2
