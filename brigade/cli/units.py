"""Sizes and times as people write and read them. Pure functions."""

from brigade.spec.sizes import parse_disk, parse_size, show_size

__all__ = ("parse_disk", "parse_size", "show_seconds", "show_size")


def show_seconds(seconds: float) -> str:
    """Seconds in s, ms or µs with three significant digits: 0.01234 -> "12.3 ms"."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 0.9995:
            return f"{_three_digits(seconds * factor)} {unit}"
    return "0 s" if seconds == 0 else f"{_three_digits(seconds * 1e6)} µs"


def _three_digits(value: float) -> str:
    for digits, limit in ((2, 9.995), (1, 99.95)):
        if value < limit:
            return f"{value:.{digits}f}"
    return f"{value:.0f}"
