"""Step times: what must hold whatever the calibration, and that overlap has a crossover."""

from dataclasses import replace

import pytest

from brigade.plan.balance import LoadStatistics, counted, imbalance
from brigade.plan.models import find_model
from brigade.plan.rates import Rates, shipped
from brigade.plan.step import PLAIN, Setup, decode_step, prefill_step, tokens_per_step
from brigade.spec.device import DEVICES, Device, find_device
from brigade.spec.work import BF16, FP8, Grid

F = find_model("deepseek-v3").facts(FP8)
H800, GB200 = find_device("H800"), find_device("GB200")
R = Rates()


def seconds(grid: Grid, batch: float, setup: Setup = PLAIN, context: float = 4096) -> float:
    return decode_step(F, grid, H800, R, batch, context, setup).seconds


def test_a_larger_batch_takes_longer_but_less_for_each() -> None:
    grid = Grid(144, 8, 1, 144, 32)
    times = [seconds(grid, b) for b in (1, 8, 64, 128)]
    assert times == sorted(times)
    per_token = [t / b for t, b in zip(times, (1, 8, 64, 128), strict=True)]
    assert per_token == sorted(per_token, reverse=True)


def test_more_ranks_read_fewer_weights() -> None:
    def reads(ep: int) -> float:
        step = decode_step(F, Grid(ep, 8, 1, ep), H800, R, 32, 4096, Setup(perfect=True))
        return next(t.seconds for t in step.terms if t.name == "experts")

    assert reads(128) < reads(32) < reads(16)


@pytest.mark.parametrize("nodes", [3, 5, 7, 11, 18, 22])
def test_any_number_of_nodes(nodes: int) -> None:
    n = nodes * 8
    assert 0.005 < seconds(Grid(n, 8, 1, n, -256 % n), 64) < 0.2


def test_overlap_helps_large_batches_and_is_not_used_for_small_ones() -> None:
    grid = Grid(72, 8, 1, 72, 32)
    with_overlap = decode_step(F, grid, H800, R, 256, 2000, Setup(overlap=True))
    assert with_overlap.overlapped
    assert with_overlap.seconds < seconds(grid, 256, context=2000)
    assert not decode_step(F, grid, H800, R, 2, 2000, Setup(overlap=True)).overlapped


def test_prefix_hits_save_products_but_not_attention_over_the_whole_context() -> None:
    grid = Grid(32, 8, 1, 32, 32)

    def term(name: str, before: float) -> float:
        step = prefill_step(F, grid, H800, R, 2048, 2048, before, Setup())
        return next(t.seconds for t in step.terms if t.name == name)

    assert term("projections", 2048) == term("projections", 0)
    assert term("core attention", 2048) == pytest.approx(3 * term("core attention", 0), rel=1e-3)


def test_a_large_scale_up_domain_sends_nothing_over_nics() -> None:
    step = decode_step(F, Grid(64, 64, 1, 64), GB200, R, 64, 2000)
    assert {t.op.link for t in step.terms} == {"", "scale-up"}


def test_drafting_costs_a_step_time_and_pays_in_tokens() -> None:
    grid = Grid(72, 8, 1, 72, 32)
    plain, drafted = seconds(grid, 8), seconds(grid, 8, Setup(draft=1))
    assert plain < drafted < 1.7 * plain
    assert tokens_per_step(3, 0.7) == pytest.approx(1 + 0.7 + 0.49 + 0.343)
    assert tokens_per_step(0, 0.7) == 1


def test_faster_links_and_memory_never_slow_a_step() -> None:
    grid = Grid(32, 8, 1, 32)
    base = decode_step(F, grid, H800, R, 64, 4096).seconds
    for name in "hbm_rate", "nic", "scale_up", "bf16":
        faster = replace(H800, **{name: 2 * getattr(H800, name)})
        assert decode_step(F, grid, faster, R, 64, 4096).seconds <= base


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda d: d.name)
def test_no_product_and_no_read_is_faster_than_the_device(device: Device) -> None:
    """With the fitted rates, whose shares grow as devices shrink. The share of the NIC was fitted at 1.004."""
    grid = Grid(16, 8, 1, 16)
    links = {"scale-up": device.scale_up, "scale-out": 1.005 * device.nic}
    for step in (
        decode_step(F, grid, device, shipped().rates, 64, 4096),
        prefill_step(F, grid, device, shipped().rates, 4096, 4096),
    ):
        for term in step.terms:
            if term.name in ("host", "small kernels"):
                continue
            least = (
                term.op.wire / links[term.op.link] if term.op.link else term.op.flops / device.rate(term.op.precision)
            )
            assert term.seconds >= max(least, term.op.n_bytes / device.hbm_rate), term.name


def test_a_dense_model_has_no_experts_and_sends_only_for_tp() -> None:
    f = find_model("r1-distill-llama-70b").facts(BF16)
    names = {t.name for t in decode_step(f, Grid(8, 8, 8, 1), H800, R, 8, 4096).terms}
    assert "experts" not in names
    assert "dispatch" not in names


def test_imbalance_grows_with_ranks_and_shrinks_with_rows_and_balancing() -> None:
    loads = LoadStatistics()
    assert imbalance(1, 8, 10, loads, 0.3, True) == 1.0
    assert imbalance(64, 4, 1e9, loads, 0.3, True) > imbalance(8, 4, 1e9, loads, 0.3, True)
    assert imbalance(64, 4, 64, loads, 0.3, True) > imbalance(64, 4, 4096, loads, 0.3, True)
    assert imbalance(64, 4, 4096, loads, 0.3, False) > imbalance(64, 4, 4096, loads, 0.3, True)


def test_without_balancing_ep72_is_about_as_uneven_as_was_measured() -> None:
    assert imbalance(72, 256 / 72, 2000, LoadStatistics(), 0.3, balanced=False) == pytest.approx(2.5, rel=0.1)


def test_sampling_noise_alone_is_the_formula_of_the_cost_model() -> None:
    phi = imbalance(128, 2, 8 * 128, LoadStatistics(drift=0.0), 0.3, True)
    assert phi == pytest.approx(1.10, abs=0.01)


def test_counted_loads_are_placed_as_the_server_would() -> None:
    counts = [[100.0, 1, 1, 1, 1, 1, 1, 1]]
    alone = counted(tuple(map(tuple, counts)), n_ranks=4, n_nodes=1, n_slots=8, balanced=False)
    placed = counted(tuple(map(tuple, counts)), n_ranks=4, n_nodes=1, n_slots=12, balanced=True)
    assert alone > 3.7
    assert placed < 1.6
