"""`brigade plan simulate`: an option of a plan in simulated time, beside the estimate that the plan was made with."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brigade.cli.fault import Fault, one_line

if TYPE_CHECKING:
    from brigade.cli.plan_question import Asked
    from brigade.plan.compared import Beside
    from brigade.plan.question import Option, Question
    from brigade.plan.rates import Calibration
    from brigade.plan.simulate import Simulated

MOST_OVERLOAD = 4
"""Times what an option can do that is still simulated."""


def simulate(
    plan: Annotated[Path, typer.Argument(help="What `brigade plan --json` printed.", show_default=False)],
    option: Annotated[int, typer.Option(help="Which of its options.", min=1)] = 1,
    trace: Annotated[
        str,
        typer.Option(help="Arrivals from a file (Mooncake, Azure, ServeGen), or 'shipped'; else closed-loop users."),
    ] = "",
    rate: Annotated[float, typer.Option(help="With --trace: requests/s; 0: half of what the option can do.")] = 0.0,
    seconds: Annotated[
        float, typer.Option(help="Simulated time; the first 40 % do not count.", min=1, max=86400)
    ] = 120,
    vary: Annotated[float, typer.Option(help="Lengths of users vary by this share, evenly.", min=0, max=0.99)] = 0.1,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 1,
    device: Annotated[Path | None, typer.Option(help="The device of your own that the plan was made with.")] = None,
    calibrate: Annotated[Path | None, typer.Option(help="The measurements that the plan was made with.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Run an option of a plan in simulated time, with the scheduler and the routing that really run."""
    from brigade.cli.plan_question import calibration, question
    from brigade.plan.arrivals import BadTrace
    from brigade.plan.ask import answer
    from brigade.plan.case import BadPoints
    from brigade.plan.models import BadModel
    from brigade.plan.quantity import BadQuantity
    from brigade.plan.question import Impossible
    from brigade.plan.simulate import Overload
    from brigade.spec.config import BadConfig
    from brigade.spec.device import BadDevice

    try:
        c = calibration(calibrate)
        given, named = asked(plan, device)
        q = replace(question(given, c), smaller=False)
        name = deployment_of(named, option, q.model.name)
        o = next((o for o in answer(q, c).options if str(o.name) == name), None)
        if o is None:
            raise BadQuantity(
                f"--option {option}: '{name}' is not among today's options for this question; make the plan again, and "
                "give --device and --calibrate as then"
            )
        found, workload, rows = run(o, q, c, trace, rate, seconds, vary, seed)
    except (BadQuantity, BadDevice, BadModel, BadConfig, BadPoints, BadTrace, Impossible, Overload) as e:
        raise Fault(one_line(str(e)), 2) from e
    if as_json:
        data = {"deployment": str(o.name), "workload": workload, "requests": len(found.requests), "rate": found.rate,
                "in_flight": found.in_flight, "hit_rate": found.hit, "preempted": found.n_preempted}  # fmt: skip
        lines = {name: [asdict(x) | {"error": x.error} for x in part] for name, part in rows.items()}
        typer.echo(json.dumps(data | lines, indent=1))
        return
    show(o, found, workload, rows)


def asked(path: Path, device: Path | None) -> "tuple[Asked, list[tuple[str, str]]]":
    """The question of a plan's JSON, and the model and deployment of each of its options. Raises BadQuantity."""
    from brigade.cli.plan_question import Asked
    from brigade.plan.quantity import BadQuantity

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        q = data["question"]
        if q.get("loads"):
            raise BadQuantity(f"{path}: was made with --loads, which are not simulated; make it without")
        servers = " + ".join(f"{n} x {each} x {name}" for n, each, name in q["servers"])
        named = [(str(o["model"]), str(o["deployment"])) for o in data["options"]]
        given = Asked(
            model=str(q["model_from"]), servers=servers, users=str(q["users"]), n_in=str(q["input"]),
            n_out=str(q["output"]), hit_rate=str(q["hit_rate"]), tpot=f"{1e3 * q['tpot_s']:.6f}ms",
            ttft=f"{1e3 * q['ttft_s']:.6f}ms", precision=str(q["precision"]), kv=str(q["kv"]),
            engine=str(q["engine"]), device=device, price=None, api_price=None, loads=None,
            balanced=bool(q["balanced"]), draft=bool(q["draft"]), night=None, night_hours="8",
        )  # fmt: skip
        return given, named
    except OSError as e:
        raise BadQuantity(f"{path}: cannot be read ({e.strerror})") from e
    except BadQuantity:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise BadQuantity(f"{path}: not a plan ({e!r}); write it with brigade plan --json") from e


def deployment_of(named: list[tuple[str, str]], option: int, model: str) -> str:
    """What an option of a plan is called. Raises BadQuantity for one that is not there, or of another model."""
    from brigade.plan.quantity import BadQuantity

    if option > len(named):
        raise BadQuantity(f"--option {option}: the plan has {len(named)}")
    found, name = named[option - 1]
    if found != model:
        mine = ", ".join(str(i) for i, (m, _) in enumerate(named, 1) if m == model)
        raise BadQuantity(f"--option {option}: is of {found}; only those of {model} are simulated: {mine}")
    return name


def run(
    o: "Option", q: "Question", c: "Calibration", trace: str, rate: float, seconds: float, vary: float, seed: int
) -> "tuple[Simulated, str, dict[str, list[Beside]]]":
    """What was simulated, of what, and the estimate beside it: as the plan has it, and without engines' own delays."""
    from brigade.plan.arrivals import MOST_REQUESTS, Users, at_rate, means, read_trace
    from brigade.plan.ask import serve
    from brigade.plan.compared import beside, served_at, simulate_trace, simulate_users, without_engines_own_delays
    from brigade.plan.compared import trace_workload as workload_of
    from brigade.plan.quantity import BadQuantity
    from brigade.plan.serving import Workload

    plain = without_engines_own_delays(c)
    if not trace:
        users = Users(int(o.users), q.n_in, q.n_out, q.hit, over=seconds / 4, vary=vary)
        found = simulate_users(o.layout, c, users, seconds, seed)
        w = Workload(float(users.n), q.n_in, q.n_out, q.hit)
        text = f"{users.n:,} users in a closed loop, {q.n_in:,} and {q.n_out:,} tokens +- {100 * vary:.0f} %"
        parts = {"as planned": beside(serve(o.layout, c, w), found),
                 "without engines' own delays": beside(serve(o.layout, plain, w), found)}  # fmt: skip
        return found, text, parts
    if not 0 <= rate < 1e6:
        raise BadQuantity(f"--rate {rate}: must be requests per second, 0 or more")
    given = read_trace(None if trace == "shipped" else Path(trace))
    mean = means(given)
    tokens = mean["n_in"] + mean["n_out"] / 2
    full = o.layout.rate * min(1.0, (q.n_in + q.n_out / 2) / tokens)
    rate = rate or 0.5 * full
    most = min(MOST_OVERLOAD * full, MOST_REQUESTS / seconds)
    if rate > most:
        raise BadQuantity(
            f"--rate {rate:g}: this option does about {full:.3g} requests/s of this trace; what waits for ever, and "
            f"more than {MOST_REQUESTS:,} requests are not simulated, the nearest is --rate {most:.3g}"
        )
    arrivals = at_rate(given, rate, seconds)
    found = simulate_trace(o.layout, c, arrivals, seconds, seed)
    w = workload_of(arrivals, min(0.99, found.hit))
    text = f"{rate:.2f} requests/s of {trace}, {w.n_in:,} and {w.n_out:,} tokens on average"
    parts = {"as planned": beside(served_at(o.layout, c, w, rate), found),
             "without engines' own delays": beside(served_at(o.layout, plain, w, rate), found)}  # fmt: skip
    return found, text, parts


def show(o: "Option", found: "Simulated", workload: str, rows: "dict[str, list[Beside]]") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, emoji=False, markup=False)
    console.print(f"{o.name}\n{workload}")
    console.print(
        f"{len(found.requests):,} requests answered, {found.rate:.2f}/s, {found.in_flight:.0f} in the system on "
        f"average, {100 * found.hit:.0f} % of prompts cached, {found.n_preempted} preempted, {found.n_steps:,} steps"
    )
    table = Table(title="seconds; error of the estimate")
    for name in ("", "simulated", *rows):
        table.add_column(name, justify="right")
    for lines in zip(*rows.values(), strict=True):
        cells: list[Any] = [f"{x.analytic:.3g} ({100 * x.error:+.0f} %)" for x in lines]
        table.add_row(lines[0].what, f"{lines[0].simulated:.3g}", *cells)
    console.print(table)
