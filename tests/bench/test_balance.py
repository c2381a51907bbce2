"""bench.balance on small files of loads whose ratios can be worked out by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from bench import balance
from bench.balance import BadLoads, Workload
from brigade.core.placement import initial


def written(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n")
    return path


def route(layer: int, *ids: int, even: bool = False) -> dict[str, object]:
    weights = [0.5] * len(ids) if even else [1 / (i + 2) for i in range(len(ids))]
    return {"type": "route", "layer": layer, "topk_ids": ids, "topk_weights": weights}


class TestRead:
    def test_counts_of_workloads_and_layers(self, tmp_path: Path) -> None:
        counts = np.arange(1, 13).reshape(2, 3, 2)
        np.savez(tmp_path / "x.npz", counts=counts, names=np.array(["a", "b"]))
        found = balance.read(tmp_path / "x.npz")
        assert [w.name for w in found] == ["a", "b"]
        assert found[1].load_LE == [[7, 8], [9, 10], [11, 12]]

    def test_counts_of_one_layer(self, tmp_path: Path) -> None:
        assert balance.read(written(tmp_path / "x.json", {"counts": [3, 1]})) == [Workload("x", [[3, 1]])]

    def test_routes_are_counted_by_halves_without_the_warm_up(self, tmp_path: Path) -> None:
        lines = [{"type": "meta", "num_experts": 3}, route(0, 0, 1, even=True), route(0, 2, 1), route(0, 2, 0)]
        assert [w.load_LE for w in balance.read(written(tmp_path / "x.jsonl", *lines))] == [[[0, 1, 1]], [[1, 0, 1]]]

    @pytest.mark.parametrize(
        ("name", "record", "message"),
        [
            ("x.csv", {}, "read from .npz, .json and .jsonl"),
            ("x.json", {"count": [1]}, "counts is missing"),
            ("x.json", {"counts": [0, 0]}, "one that is not zero"),
            ("x.json", {"counts": [2, -1]}, "not negative"),
            ("x.jsonl", {"type": "route"}, "num_experts"),
            ("x.jsonl", {"type": "meta", "num_experts": 2}, "every layer needs counts"),
        ],
    )
    def test_names_the_file_and_what_is_wrong(
        self, tmp_path: Path, name: str, record: object, message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = written(tmp_path / name, record)
        with pytest.raises(BadLoads, match=message):
            balance.read(path)
        assert balance.main([str(path)]) == 2
        assert str(path) in capsys.readouterr().err


class TestMeasure:
    def test_before_and_after_of_one_layer(self) -> None:
        line = balance.measure([Workload("a", [[4.0, 4.0, 1.0, 1.0]])], n_ranks=2, n_redundant=0)
        assert (line.before, line.itself, line.others) == (8 / 5, 1.0, None)

    def test_others_are_what_a_placement_is_made_from(self) -> None:
        one, other = Workload("a", [[4.0, 4.0, 1.0, 1.0]]), Workload("b", [[4.0, 1.0, 4.0, 1.0]])
        line = balance.measure([one, other], n_ranks=2, n_redundant=0)
        assert line.itself == 1.0
        assert line.others == 8 / 5

    def test_layers_count_by_their_loads(self) -> None:
        loads = [[3.0, 1.0], [10.0, 10.0]]
        assert balance.ratio(loads, initial(2, 2, n_slots=2, n_ranks=2)) == (3 + 10) / (2 + 10)

    def test_floor_is_the_heaviest_replica_or_a_perfect_split(self) -> None:
        assert balance.floor([[6.0, 1.0, 1.0]], 3, 2) == 6 / 4
        assert balance.floor([[6.0, 1.0, 1.0]], 4, 2) == 1.0
        assert balance.floor([[6.0, 1.0, 1.0]], 4, 4) == pytest.approx(3 / 2)

    def test_the_table_has_a_row_for_each_size_and_then_the_times(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = written(tmp_path / "x.json", {"counts": [4, 4, 1, 1]})
        assert balance.main([str(path), "--ranks", "2,4", "--redundant", "0,1", "--rounds", "1"]) == 0
        out = capsys.readouterr().out
        assert "| x | 1 | 2 | 0 | 1.60 | 1.00 | 1.00 | - | 100 % |" in out
        assert out.count("| x |") == 4
        assert "58 layers x 256 experts (+ 32) on 144 ranks" in out
