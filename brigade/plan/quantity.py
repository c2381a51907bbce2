"""Numbers with units as people write them: `50ms`, `4k`, `22 x 8 x H800`. Pure; wrong ones are named."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from brigade.spec.device import Device, find_device

_NUMBER = r"((?:[0-9]{1,12})(?:\.[0-9]{1,12})?|\.[0-9]{1,12})"
_SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_MULTIPLE = {"": 1, "k": 1000, "ki": 1024, "m": 1_000_000}
MOST_SERVERS, MOST_CARDS = 4096, 1024
MOST_KINDS = 6
"""Kinds of servers in one question: each pair of them is tried for clusters over both."""


class BadQuantity(ValueError):
    """A number that cannot be read. The message names the option, the text and how to write it."""


@dataclass(frozen=True)
class Servers:
    """Equal servers."""

    n: int
    per_node: int
    device: Device

    @property
    def n_gpus(self) -> int:
        return self.n * self.per_node


def seconds(option: str, text: str) -> float:
    """ "50ms" -> 0.05. A number without a unit is refused: 50 could be seconds or milliseconds."""
    match = re.fullmatch(_NUMBER + r"\s*(us|µs|ms|s|min)", text.strip().lower())
    if match is None:
        if re.fullmatch(_NUMBER, text.strip()):
            raise BadQuantity(
                f"{option} {_short(text)}: the unit is missing; write {text.strip()}ms or {text.strip()}s"
            )
        raise BadQuantity(f"{option} {_short(text)}: not a time; write it like 50ms or 2s")
    value = float(match[1]) * _SECONDS[match[2]]
    if not 0 < value <= 86400:
        raise BadQuantity(f"{option} {_short(text)}: must be more than 0 and at most a day")
    return value


def count(option: str, text: str, most: float = 1e7) -> int:
    """ "4k" -> 4000, "4Ki" -> 4096, "1.5k" -> 1500; at least 1."""
    match = re.fullmatch(_NUMBER + r"\s*(k|ki|m)?", text.strip().lower())
    if match is None:
        raise BadQuantity(
            f"{option} {_short(text)}: not a number of 1 or more; write it like 4096 or 4k (= 4000) or 4Ki (= 4096)"
        )
    value = float(match[1]) * _MULTIPLE[match[2] or ""]
    if value < 1 or value > most or value != int(value):
        raise BadQuantity(f"{option} {_short(text)}: must be a whole number from 1 to {most:,.0f}")
    return int(value)


def share(option: str, text: str) -> float:
    """ "0.56" or "56%" -> 0.56."""
    match = re.fullmatch(_NUMBER + r"\s*(%)?", text.strip())
    value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= value < 1:
        raise BadQuantity(f"{option} {_short(text)}: must be from 0 to below 1 (or 0% to below 100%)")
    return value


def dollars(option: str, text: str) -> float:
    """ "2.5" or "$2.5"; more than 0."""
    match = re.fullmatch(r"\$?\s*" + _NUMBER, text.strip())
    value = float(match[1]) if match else 0.0
    if not 0 < value < 1e6:
        raise BadQuantity(f"{option} {_short(text)}: must be a positive number of dollars below a million, like 2.5")
    return value


def hours(option: str, text: str) -> float:
    """ "8" or "8h"; at most a day."""
    match = re.fullmatch(_NUMBER + r"\s*h?", text.strip().lower())
    value = float(match[1]) if match else 0.0
    if not 0 < value <= 24:
        raise BadQuantity(f"{option} {_short(text)}: must be a number of hours, more than 0 and at most 24")
    return value


def _short(text: str) -> str:
    """What people typed, for one line."""
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def servers(text: str, extra: Iterable[Device] = ()) -> tuple[Servers, ...]:
    """ "22 x 8 x H800" or several joined by "+"; equal ones are added up. Raises BadQuantity and BadDevice."""
    extra = tuple(extra)
    out: dict[tuple[int, Device], int] = {}
    for part in re.split(r"\s*\+\s*", text.strip()):
        match = re.fullmatch(r"([0-9]{1,9})\s*[x×*]\s*([0-9]{1,9})\s*[x×*]\s*(\S.*)", part.strip(), re.IGNORECASE)
        if match is None:
            where = f"'{_short(part)}'" if part.strip() else f"'{_short(text)}': a part is empty"
            raise BadQuantity(
                f"--servers {where}: write servers x cards x device, like '22 x 8 x H800', kinds joined by +"
            )
        n, per_node = int(match[1]), int(match[2])
        if not 1 <= per_node <= MOST_CARDS:
            raise BadQuantity(f"--servers '{_short(part)}': must be 1 to {MOST_CARDS} cards in a server")
        kind = per_node, find_device(match[3], extra)
        out[kind] = out.get(kind, 0) + n
        if not 1 <= n <= out[kind] <= MOST_SERVERS:
            raise BadQuantity(f"--servers '{_short(part)}': must be 1 to {MOST_SERVERS} servers")
        if len(out) > MOST_KINDS:
            raise BadQuantity(
                f"--servers '{_short(text)}': must be at most {MOST_KINDS} kinds of servers; ask for some"
            )
    return tuple(Servers(n, per_node, device) for (per_node, device), n in out.items())
