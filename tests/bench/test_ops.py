"""Every op beside its limit, on a tiny checkpoint's shapes."""

import sys
from pathlib import Path

import pytest
import torch

from bench import make_checkpoint, ops
from bench.limits import Limits


def test_every_op_is_measured_once_for_each_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint.make_checkpoint(tmp_path / "tiny", "tiny", seed=1, shard_bytes=10**9)
    monkeypatch.setattr(ops, "CACHE_LEFT", 1)
    monkeypatch.setattr(ops, "TOKENS", (1, 8))
    monkeypatch.setattr(ops, "CONTEXTS", ((1, 1, 20), (2, 16, 16)))
    measure = ops.median
    monkeypatch.setattr(ops, "median", lambda call: measure(call, budget=0.0))
    limits = Limits(threads=1, read_gbs=10.0, bf16_gflops=100.0, int8_gops=100.0, sources={})
    monkeypatch.setattr(ops, "measure_apart", lambda threads: limits)
    monkeypatch.setattr(sys, "argv", ["bench.ops", str(tmp_path / "tiny")])
    before = torch.get_num_threads()
    status = ops.main()
    torch.set_num_threads(before)
    if status == 1:
        pytest.skip(f"no C++ kernels: {capsys.readouterr().err}")
    rows = [[cell.strip() for cell in line.split("│")[1:3]] for line in capsys.readouterr().out.splitlines()]
    assert [row for row in rows if row] == [
        ["experts", "T=1"],
        ["experts", "T=8"],
        ["core attention", "1 x 1 @ 20"],
        ["attention", "1 x 1 @ 20"],
        ["core attention", "2 x 16 @ 16"],
        ["attention", "2 x 16 @ 16"],
        ["head", "T=1"],
        ["head", "T=32"],
    ]
