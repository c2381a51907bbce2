"""Numbers with units, and what is said of wrong ones."""

import pytest

from brigade.plan.quantity import BadQuantity, count, seconds, servers, share
from brigade.spec.device import BadDevice


@pytest.mark.parametrize(("text", "value"), [("50ms", 0.05), ("2s", 2.0), ("1.5 s", 1.5), ("800us", 8e-4)])
def test_times(text: str, value: float) -> None:
    assert seconds("--tpot", text) == pytest.approx(value)


@pytest.mark.parametrize(("text", "value"), [("4k", 4000), ("4Ki", 4096), ("1.5k", 1500), ("2000", 2000)])
def test_counts(text: str, value: int) -> None:
    assert count("--input", text) == value


@pytest.mark.parametrize(("text", "value"), [("0.56", 0.56), (".56", 0.56), ("56%", 0.56), ("0", 0.0)])
def test_shares(text: str, value: float) -> None:
    assert share("--hit-rate", text) == pytest.approx(value)


def test_servers_of_one_kind_and_of_several() -> None:
    one = servers("22 x 8 x H800")[0]
    assert (one.n, one.per_node, one.device.name, one.n_gpus) == (22, 8, "H800", 176)
    assert [s.device.name for s in servers("2x8xH200 + 1 x 8 x rtx 4090")] == ["H200", "RTX-4090"]


def test_servers_of_the_same_kind_are_one_kind() -> None:
    """Two orders of the same boxes may join in one cluster."""
    both = servers("4 x 8 x H200 + 2 x 8 x H20 + 3 x 8 x h200")
    assert [(s.n, s.device.name) for s in both] == [(7, "H200"), (2, "H20")]


def test_many_kinds_and_long_names_get_one_short_line() -> None:
    kinds = ("A100", "A800", "H800", "H100", "H200", "H20", "B200")
    with pytest.raises(BadQuantity, match="at most 6 kinds"):
        servers(" + ".join(f"1 x 8 x {k}" for k in kinds))
    with pytest.raises(BadQuantity, match="a part is empty"):
        servers("4 x 8 x H200 +")
    with pytest.raises(BadDevice) as found:
        servers("1 x 8 x " + "A" * 100_000)
    assert len(str(found.value)) < 600


@pytest.mark.parametrize(
    ("read", "text", "says"),
    [
        (seconds, "50", "unit is missing; write 50ms or 50s"),
        (seconds, "-5ms", "not a time"),
        (seconds, "0ms", "more than 0"),
        (count, "-3", "write it like"),
        (count, "0", "whole number from 1"),
        (count, "1e99", "write it like"),
        (count, "99999m", "from 1 to"),
        (share, "1.5", "below 1"),
        (share, "nan", "below 1"),
    ],
)
def test_wrong_numbers_are_named(read, text: str, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BadQuantity, match=f"--x {text}.*{says}"):
        read("--x", text)


@pytest.mark.parametrize(
    "text", ["", "22 x H800", "0 x 8 x H800", "many x 8 x H800", "99999 x 8 x H800", "2 x 9999 x H100"]
)
def test_wrong_servers_are_named(text: str) -> None:
    with pytest.raises(BadQuantity, match="--servers"):
        servers(text)
