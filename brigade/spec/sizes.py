"""Sizes in bytes as people write and read them. Pure functions."""

import re

_STEPS = ("", "K", "M", "G", "T", "P")
_UNITS: dict[str, int] = {"": 1, "B": 1}
_UNITS |= {f"{s}B": 1000**i for i, s in enumerate(_STEPS) if s}
_UNITS |= {f"{s}IB": 1024**i for i, s in enumerate(_STEPS) if s}


def parse_size(text: str) -> int:
    """Bytes of "512MiB", "2GiB", "1.5GB" or "1048576". KB to PB are powers of 1000, KiB to PiB of 1024.

    Raises ValueError for anything else; a bare "2G" too, since programs disagree about what it means.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write it like 512MiB or 2GiB")
    number, unit = match.groups()
    if unit.upper() in _STEPS[1:]:
        raise ValueError(
            f"{text!r} is ambiguous; write {number}{unit.upper()}iB (1024) or {number}{unit.upper()}B (1000)"
        )
    factor = _UNITS.get(unit.upper())
    if factor is None:
        raise ValueError(f"{text!r} has an unknown unit; use B, KiB, MiB, GiB, TiB or KB, MB, GB, TB")
    whole, _, fraction = number.partition(".")
    return int(int(whole) * factor + int(fraction or 0) * factor // 10 ** len(fraction))


def parse_disk(text: str) -> tuple[str, int]:
    """Folder and bytes of "/mnt/nvme:200GiB". Raises ValueError."""
    folder, colon, size = text.rpartition(":")
    if not colon or not folder.startswith("/") or "\0" in folder:
        raise ValueError(f"{text!r} must be a folder, from / on, and a size, like /mnt/nvme:200GiB")
    if not (n := parse_size(size)):
        raise ValueError(f"{text!r} leaves no room for anything; give a size, like /mnt/nvme:200GiB")
    return folder, n


def show_size(n_bytes: float) -> str:
    """Bytes in the largest unit that leaves at least 1: 1536 -> "1.5 KiB"."""
    value, unit = float(n_bytes), 0
    while abs(value) >= 1024 and unit < len(_STEPS) - 1:
        value, unit = value / 1024, unit + 1
    if unit == 0:
        return f"{value:.0f} B"
    return f"{value:.1f}".removesuffix(".0") + f" {_STEPS[unit]}iB"
