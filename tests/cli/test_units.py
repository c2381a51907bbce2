"""Sizes and times as people write and read them."""

import pytest

from brigade.cli.fault import one_line, printable
from brigade.cli.units import parse_size, show_seconds, show_size


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("0", 0),
        ("1048576", 1 << 20),
        ("512MiB", 512 << 20),
        ("2GiB", 2 << 30),
        ("2 gib", 2 << 30),
        ("1.5GB", 1_500_000_000),
        ("0.1KiB", 102),
        ("7B", 7),
    ],
)
def test_a_size_is_read_with_its_unit(text: str, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "2 XiB", "nan", "1..5GB", "0x10"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a size|unknown unit"):
        parse_size(text)


def test_a_size_that_programs_read_differently_is_refused_with_both_meanings() -> None:
    with pytest.raises(ValueError, match=r"write 2GiB \(1024\) or 2GB \(1000\)"):
        parse_size("2g")


def test_sizes_are_shown_in_the_largest_unit_that_leaves_one_or_more() -> None:
    assert [show_size(n) for n in (0, 1023, 1024, 1536, 1 << 30)] == ["0 B", "1023 B", "1 KiB", "1.5 KiB", "1 GiB"]


def test_times_are_shown_with_three_digits() -> None:
    shown = [show_seconds(s) for s in (0, 0.0000021, 0.01234, 0.9999, 1.5, 12.34, 123.4)]
    assert shown == ["0 s", "2.10 µs", "12.3 ms", "1.00 s", "1.50 s", "12.3 s", "123 s"]


def test_printable_text_cannot_steer_a_terminal() -> None:
    evil = "a\x1b[2J\x07b\x08\r\x00\x7f\x9b31mc\ttab\nline é 漢 \ud800"
    assert printable(evil) == "a[2Jb31mc\ttab\nline é 漢 �"


def test_one_line_is_one_line() -> None:
    assert one_line(" a\n\n b\tc\x1b ") == "a b c"
