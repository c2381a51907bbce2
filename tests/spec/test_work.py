"""The worked numbers of expert parallelism for DeepSeek-V3: every figure that can be checked by hand."""

import pytest

from brigade.plan.models import find_model
from brigade.spec.device import DEVICES, BadDevice, device_from, find_device
from brigade.spec.params import active, count
from brigade.spec.work import (
    BF16,
    FP4,
    FP8,
    OPS,
    Grid,
    decode_ops,
    nodes_reached,
    prefill_ops,
    remote_nodes,
    share_touched,
    weights_touched,
    wire_row,
)

MODEL = find_model("deepseek-v3")
F = MODEL.facts(FP8)
PREFILL = Grid(32, 8, 1, 32, 32)
DECODE = Grid(144, 8, 1, 144, 32)


def by_name(ops, name):  # type: ignore[no-untyped-def]
    return [op for op in ops if op.name == name]


def test_parameters_in_all_and_active() -> None:
    assert count(MODEL.spec) == pytest.approx(671.0e9, rel=1e-3)
    assert active(MODEL.spec) == pytest.approx(36.6e9, rel=1e-3)


@pytest.mark.parametrize(
    ("value", "millions"),
    [
        ((F.cut + F.whole - 3 * 396.4e6) / 61, 187.1),
        (F.expert, 44.04),
        (F.shared, 44.04),
        (F.gate / 58, 1.84),
        (F.head, 926.7),
    ],
)
def test_parameters_of_each_block(value: float, millions: float) -> None:
    assert value / 1e6 == pytest.approx(millions, rel=3e-3)


def test_flops_of_a_token_are_twice_the_active_parameters() -> None:
    ops = decode_ops(F, DECODE, 1, 0)
    products = sum(op.flops for op in ops if op.name != "core attention")
    assert products == pytest.approx(73.2e9, rel=3e-3)
    assert products - by_name(ops, "head")[0].flops == pytest.approx(71.4e9, rel=3e-3)


def test_cache_bytes_of_a_token() -> None:
    assert F.kv_bytes == 70_272
    assert MODEL.facts(FP8.__class__(kv="fp8")).kv_bytes == 35_136
    core = by_name(decode_ops(F, DECODE, 1, 4989), "core attention")[0]
    assert core.n_bytes == pytest.approx(350.6e6, rel=1e-4)


def test_decode_attention_in_its_absorbed_form() -> None:
    core = by_name(decode_ops(F, DECODE, 1, 4989), "core attention")[0]
    assert F.decode_flops == pytest.approx(17.0e6, rel=1e-3)
    assert core.flops == pytest.approx(84.8e9, rel=1e-3)
    assert core.flops / core.n_bytes == pytest.approx(242, rel=3e-3)


def test_prefill_attention_not_absorbed_and_causal() -> None:
    tokens = 16384
    core = by_name(prefill_ops(F, PREFILL, tokens, 4096), "core attention")[0]
    assert core.flops / tokens == pytest.approx(10.2e9, rel=5e-3)


@pytest.mark.parametrize(("experts", "gigabytes"), [(2, 22.3), (4, 27.4), (9, 40.2), (16, 58.1), (32, 99.0)])
def test_weights_that_a_decode_step_reads(experts: int, gigabytes: float) -> None:
    assert weights_touched(F, experts) / 1e9 == pytest.approx(gigabytes, abs=0.06)


def test_node_limited_dispatch() -> None:
    assert nodes_reached(F, 4) == pytest.approx(3.143, abs=1e-3)
    assert remote_nodes(F, 4) == pytest.approx(2.357, abs=1e-3)
    assert remote_nodes(F, 4) * wire_row(F) == pytest.approx(51.2e3, rel=1e-3)
    over = [op for op in prefill_ops(F, PREFILL, 1, 4096) if op.link == "scale-out"]
    wire = sum(op.wire for op in over)
    assert wire == pytest.approx(2.97e6, rel=1e-3)
    assert wire / 50e9 == pytest.approx(59e-6, rel=0.01)


def test_direct_dispatch_sends_every_copy() -> None:
    assert F.dispatch_row == 7392
    assert F.combine_row == 14_336
    assert 8 * wire_row(F) == pytest.approx(173.8e3, rel=1e-3)
    assert 58 * 8 * wire_row(F) == pytest.approx(10.1e6, rel=3e-3)
    assert 58 * 8 * wire_row(F) / 50e9 == pytest.approx(202e-6, rel=0.01)
    links = {op.link: op.wire for op in decode_ops(F, DECODE, 1, 1) if op.name == "combine"}
    assert links["scale-out"] / sum(links.values()) > 0.94  # 18 nodes: 17 of 18 copies leave


def test_tokens_per_expert() -> None:
    ops = decode_ops(F, DECODE, 88, 4989)
    assert by_name(ops, "experts")[0].rows == pytest.approx(352)
    alone = decode_ops(F, Grid(8, 8, 1, 8), 57, 4989)
    assert by_name(alone, "experts")[0].rows == pytest.approx(14, abs=0.3)


def test_flop_and_link_roofs_of_prefill_on_h800() -> None:
    h800 = find_device("H800")
    ops = prefill_ops(F, PREFILL, 16384, 4096)
    core = by_name(ops, "core attention")[0].flops / h800.bf16 / 16384
    products = sum(op.flops for op in ops if op.name not in ("core attention", "head")) / h800.fp8 / 16384
    assert products == pytest.approx(36.1e-6, rel=0.01)
    assert core == pytest.approx(10.3e-6, rel=0.01)
    assert 8 / (products + core) == pytest.approx(172e3, rel=0.01)
    out = sum(op.wire for op in ops if op.link == "scale-out") / h800.nic / 16384
    assert 1 / out == pytest.approx(16.8e3, rel=0.01)


@pytest.mark.parametrize(
    ("grid", "batch", "context", "attention", "weights", "comm"),
    [(DECODE, 88, 4989, 9.2, 6.67, 17.6), (Grid(128, 8, 1, 128), 128, 4096, 11.0, 6.67, 25.6)],
)
def test_ideal_decode_terms_on_h800(
    grid: Grid, batch: float, context: float, attention: float, weights: float, comm: float
) -> None:
    h800 = find_device("H800")
    ops = decode_ops(F, grid, batch, context)
    core = by_name(ops, "core attention")[0]
    assert max(core.n_bytes / h800.hbm_rate, core.flops / h800.bf16) * 1e3 == pytest.approx(attention, rel=0.01)
    reads = sum(op.n_bytes for op in ops if op.name not in ("core attention", "small kernels"))
    assert reads / h800.hbm_rate * 1e3 == pytest.approx(weights, rel=0.01)  # 13.3 with two micro-batches
    far = 58 * 8 * wire_row(F) * batch / h800.nic  # the table's figure counts every copy as remote
    assert far * 1e3 == pytest.approx(comm, rel=0.02)


def test_few_tokens_touch_few_experts() -> None:
    assert share_touched(F, 1) == pytest.approx(8 / 256)
    assert share_touched(F, 1e4) == pytest.approx(1)


def test_all_ops_are_named_in_the_list() -> None:
    names = {op.name for grid in (DECODE, Grid(8, 8, 8, 1)) for op in decode_ops(F, grid, 8, 1024)}
    assert names == set(OPS)


@pytest.mark.parametrize(
    ("name", "billions", "active_billions"),
    [
        *(("deepseek-v2", 236, 21), ("kimi-k2", 1026, 32), ("qwen3-235b-a22b", 235, 22), ("glm-4.5", 355, 32)),
        *(("gpt-oss-120b", 117, 5.1), ("r1-distill-qwen-32b", 32.8, 32), ("r1-distill-llama-70b", 70.6, 70)),
    ],
)
def test_models_known_by_name_have_their_published_sizes(name: str, billions: float, active_billions: float) -> None:
    total, used = find_model(name).billions
    assert total == pytest.approx(billions, rel=0.01)
    assert used == pytest.approx(active_billions, rel=0.04)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("deepseek-v3", 61 * (512 + 64)), ("deepseek-v2", 60 * (512 + 64)), ("kimi-k2", 61 * (512 + 64)),
        ("qwen3-235b-a22b", 94 * 2 * 4 * 128), ("glm-4.5", 92 * 2 * 8 * 128), ("gpt-oss-120b", 36 * 2 * 8 * 64),
        ("r1-distill-qwen-1.5b", 28 * 2 * 2 * 128), ("r1-distill-qwen-7b", 28 * 2 * 4 * 128),
        ("r1-distill-qwen-14b", 48 * 2 * 8 * 128), ("r1-distill-qwen-32b", 64 * 2 * 8 * 128),
        ("r1-distill-llama-8b", 32 * 2 * 8 * 128), ("r1-distill-llama-70b", 80 * 2 * 8 * 128),
    ],
)  # fmt: skip
def test_cached_numbers_of_a_token_by_layers_heads_and_widths(name: str, numbers: int) -> None:
    assert find_model(name).facts(BF16).kv_bytes == 2 * numbers


def test_four_bit_experts_are_smaller_than_eight_and_sixteen_bit_ones() -> None:
    sizes = [MODEL.facts(p).expert_bytes for p in (FP4, FP8, BF16)]
    assert sizes == sorted(sizes)
    assert sizes[1] / sizes[0] == pytest.approx(16 / 9)


@pytest.mark.parametrize(
    "name",
    [
        *("H800", "H100", "H200", "H20", "A100", "A800", "B200", "B300", "GB200", "GB300", "MI300X", "Ascend-910B"),
        *("Ascend-910C", "L20", "L40S", "RTX-4090", "RTX-PRO-6000", "Xeon-6454S", "Xeon-6980P", "EPYC-9654"),
    ],
)
def test_every_device_of_the_list_is_there_with_a_source(name: str) -> None:
    assert DEVICES[name].sources
    assert find_device(name.lower().replace("-", "")) is DEVICES[name]


def test_an_unknown_device_names_the_nearest() -> None:
    with pytest.raises(BadDevice, match=r"device 'H801' is not known; the nearest is H800"):
        find_device("H801")


def test_a_device_of_ones_own_may_start_from_a_known_one() -> None:
    mine = device_from({"name": "H100-NVL", "like": "H100", "hbm_gb": 94, "hbm_tbs": 3.9}, "my.yaml")
    assert (mine.hbm, mine.hbm_rate, mine.fp8) == (94e9, 3.9e12, DEVICES["H100"].fp8)


def test_what_a_device_of_ones_own_leaves_open_is_said_to_be_weak() -> None:
    given = {"bf16_tflops": 100, "hbm_gb": 100, "hbm_tbs": 2, "scale_up_gbs": 100, "nic_gbs": 25, "domain": 16.0}
    mine = device_from({"name": "X", **given}, "my.yaml")
    assert mine.weak == {"fp8", "watts"}
    assert mine.is_weak
    assert mine.domain == 16
    assert isinstance(mine.domain, int)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "X"}, "bf16_tflops, hbm_gb, hbm_tbs, nic_gbs, scale_up_gbs missing"),
        ({"name": "X", "like": "H100", "hbm_gb": -1}, "'hbm_gb' must be a positive number"),
        ({"name": "X", "like": "H100", "hmb_gb": 1}, "the nearest is 'hbm_gb'"),
        ({"hbm_gb": 1}, "'name' is missing"),
        ({"name": "X", "like": "H100", "domain": 0.5}, "'domain' must be a whole number"),
        ({"name": "X", "like": "H100", "hbm_tbs": 1e-320}, "'hbm_tbs' must be a positive number from 0.001 to"),
        ({"name": "X", "like": "H100", "watts": 1e11}, "to 1,000,000"),
        ({"name": "X", "like": "H100", "nic_gbs": float("nan")}, "'nic_gbs' must be a positive number"),
        ({"name": "X + Y", "like": "H100"}, "'name' must be letters"),
        ({"name": "X\n- role: mixed", "like": "H100"}, "'name' must be letters"),
        ({"name": "---", "like": "H100"}, "'name' must be letters"),
        ({"name": "X", "like": "H900"}, "my.yaml: key 'like': device 'H900'"),
    ],
)
def test_a_bad_description_is_named(given: dict[str, object], message: str) -> None:
    with pytest.raises(BadDevice, match=message):
        device_from(given, "my.yaml")


@pytest.mark.parametrize(("tp", "ep"), [(3, 8), (1, 5), (0, 8)])
def test_a_grid_that_does_not_divide_is_refused(tp: int, ep: int) -> None:
    with pytest.raises(ValueError, match=r"divide|at least one"):
        Grid(8, 8, tp, ep)
