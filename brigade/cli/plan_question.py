"""What people typed after `brigade plan`, read into a question. Every wrong word is one line that names its option."""

import json
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from brigade.cli.fault import one_line

if TYPE_CHECKING:
    from brigade.plan.models import Model
    from brigade.plan.question import Question
    from brigade.plan.rates import Calibration
    from brigade.spec.device import Device


MOST_COUNT_BYTES = 64
"""Of one count in a file of expert loads, with what separates it from the next."""


@dataclass(frozen=True)
class Asked:
    """The options as they were typed; see `brigade plan --help`."""

    model: str
    servers: str
    users: str
    n_in: str
    n_out: str
    hit_rate: str
    tpot: str
    ttft: str
    precision: str
    kv: str
    engine: str
    device: Path | None
    price: str | None
    api_price: str | None
    loads: Path | None
    balanced: bool
    draft: bool
    night: str | None
    night_hours: str


def question(asked: Asked, c: "Calibration") -> "Question":
    """The question in plain values. Raises BadQuantity, BadDevice, BadModel or BadConfig."""
    from brigade.plan import quantity as read
    from brigade.plan.balance import LoadStatistics
    from brigade.plan.models import find_model, precision_of
    from brigade.plan.question import Question
    from brigade.plan.say import say
    from brigade.plan.step import Setup
    from brigade.plan.units import Slo

    if not asked.servers:
        raise read.BadQuantity("--servers is missing; write it like --servers '22 x 8 x H800'")
    if not asked.users:
        raise read.BadQuantity("--users is missing; write it like --users 2000")
    if asked.kv not in ("bf16", "fp8"):
        raise read.BadQuantity(f"--kv {one_line(asked.kv)}: must be bf16 or fp8")
    own = read_device(asked.device)
    fleets = read.servers(asked.servers, own)
    if own and not any(s.device in own for s in fleets):
        name = own[0].name
        raise read.BadQuantity(
            f"--device {asked.device}: '{name}' is not among --servers; write it there, like '4 x 8 x {name}'"
        )
    if asked.price is not None:
        price = read.dollars("--price", asked.price)
        fleets = tuple(replace(s, device=replace(s.device, price=price)) for s in fleets)
    priced = {s.device.price is not None for s in fleets}
    if len(priced) > 1:
        fleets = tuple(replace(s, device=replace(s.device, price=None)) for s in fleets)
    found = find_model(asked.model)
    name = asked.precision or found.stored
    assumed = [] if asked.precision else [say("precision {name}: as the model's authors publish it", name=name)]
    if found.folder and not found.runs:
        assumed.append(
            say(
                "config.json is read for its sizes alone, since Brigade does not serve this architecture; a context "
                "that it does not give counts as 131,072"
            )
        )
    if len(priced) > 1:
        assumed.append(say("prices are not known for all kinds of servers: cards are counted instead"))
    if "k" in (asked.n_in + asked.n_out).lower().replace("ki", ""):
        assumed.append(say("1k tokens = 1000"))
    hit = read.share("--hit-rate", asked.hit_rate)
    if not hit:
        assumed.append(say("no prefix cache hits (--hit-rate)"))
    q = Question(
        model=found,
        fleets=fleets,
        users=read.count("--users", asked.users),
        n_in=read.count("--input", asked.n_in, found.spec.context),
        n_out=read.count("--output", asked.n_out, found.spec.context),
        hit=hit,
        slo=Slo(read.seconds("--tpot", asked.tpot), read.seconds("--ttft", asked.ttft)),
        precision=precision_of(name, asked.kv),
        precision_name=name,
        engine=engine_of(asked.engine, c),
        api_price=None if asked.api_price is None else read.dollars("--api-price", asked.api_price),
        loads=Setup(balanced=asked.balanced, loads=LoadStatistics(counts=read_loads(asked.loads, found))),
        draft=asked.draft,
        night=None if asked.night is None else read.share("--night", asked.night),
        night_hours=read.hours("--night-hours", asked.night_hours),
        assumed=tuple(assumed),
    )
    if q.n_in + q.n_out > found.spec.context:
        raise read.BadQuantity(
            f"--input {asked.n_in} and --output {asked.n_out}: together {q.n_in + q.n_out:,} tokens, and "
            f"{found.name} has a context of {found.spec.context:,}; the nearest is --output "
            f"{max(1, found.spec.context - q.n_in)}"
        )
    return q


def engine_of(text: str, c: "Calibration") -> str:
    """An engine that was measured, or "" for an average one."""
    from brigade.plan.quantity import BadQuantity
    from brigade.plan.rates import shipped

    name = text.lower()
    pages = {k for k in shipped().factors if " " in k}  # points that name no engine go by their page's title
    known = sorted(k for k in c.factors if "/" not in k and k not in pages)
    if name and name not in known:
        near, shown = get_close_matches(name, known, 1, 0.0)[0], one_line(text[:60])
        raise BadQuantity(
            f"--engine {shown}: nobody measured it; the nearest is {near} (measured: {', '.join(known)}); "
            "leave it out for an average engine, or give your own measurements with --calibrate"
        )
    return name


def read_device(path: Path | None) -> "tuple[Device, ...]":
    """A device of the user's, from YAML."""
    if path is None:
        return ()
    import yaml

    from brigade.spec.device import BadDevice, device_from

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise BadDevice(f"--device {path}: cannot be read ({e.strerror})") from e
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise BadDevice(f"--device {path}: not valid YAML ({one_line(str(e))})") from e
    if not isinstance(data, dict):
        raise BadDevice(f"--device {path}: must be keys with values, like 'name: mine' and 'like: H100'")
    return (device_from({str(k): v for k, v in data.items()}, str(path)),)


def read_loads(path: Path | None, model: "Model") -> tuple[tuple[float, ...], ...]:
    """Counts by layer and expert."""
    if path is None:
        return ()
    from brigade.plan.quantity import BadQuantity

    n_experts, most = model.n_experts, model.spec.n_layers + model.spec.n_mtp
    try:
        if path.stat().st_size > most * n_experts * MOST_COUNT_BYTES + 4096:
            raise BadQuantity(f"--loads {path}: is longer than {most} layers of {n_experts} counts can be")
        data = json.loads(path.read_text(encoding="utf-8"))
        counts = tuple(tuple(float(x) for x in layer) for layer in data)
    except OSError as e:
        raise BadQuantity(f"--loads {path}: cannot be read ({e.strerror})") from e
    except BadQuantity:
        raise
    except (ValueError, TypeError, RecursionError, OverflowError) as e:
        raise BadQuantity(
            f"--loads {path}: must be a list of layers, each a list of counts ({one_line(str(e))})"
        ) from e
    if len(counts) > most:
        raise BadQuantity(f"--loads {path}: has {len(counts)} layers, and {model.name} has {most}")
    if not counts or not all(len(x) == n_experts and 0 < sum(x) < float("inf") and min(x) >= 0 for x in counts):
        raise BadQuantity(
            f"--loads {path}: every layer needs {n_experts} counts, one for each expert, none negative, not all 0"
        )
    return counts


def calibration(path: Path | None) -> "Calibration":
    """The shipped calibration, with a user's measurements if there are any."""
    from brigade.plan.calibrate import folded
    from brigade.plan.points import read_points
    from brigade.plan.rates import shipped

    return shipped() if path is None else folded(shipped(), read_points(path))
