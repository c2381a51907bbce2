"""`brigade plan`: which deployment should these servers run? Reads the question, shows the answer; decides nothing."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brigade.cli.fault import Fault, one_line

if TYPE_CHECKING:
    from rich.table import Table

    from brigade.plan.ask import Answer, Option, Question
    from brigade.plan.points import Case
    from brigade.plan.rates import Calibration
    from brigade.plan.reproduce import Compared
    from brigade.spec.device import Device

app = typer.Typer(
    help="Say which deployment your servers should run: boxes, an expert-parallel cluster, or a smaller model.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

CalibrateOption = Annotated[
    Path | None, typer.Option("--calibrate", help="Your own measurements (JSON), folded into the calibration.")
]


@app.callback()
def plan(
    ctx: typer.Context,
    model: Annotated[str, typer.Option(help="A known model's name, or a folder with its config.json.")] = "deepseek-v3",
    servers: Annotated[str, typer.Option(help="Servers x cards x device, '+' between kinds: '22 x 8 x H800'.")] = "",
    users: Annotated[str, typer.Option(help="Requests in the system at once, like 2000 or 2k.")] = "",
    n_in: Annotated[str, typer.Option("--input", help="Input tokens of a request, like 4k (= 4000).")] = "4k",
    n_out: Annotated[str, typer.Option("--output", help="Output tokens of a request.")] = "1k",
    hit_rate: Annotated[str, typer.Option(help="Share of input tokens found in the prefix cache.")] = "0",
    tpot: Annotated[str, typer.Option(help="Promise at p90: time per output token.")] = "50ms",
    ttft: Annotated[str, typer.Option(help="Promise at p90: time to first token.")] = "2s",
    precision: Annotated[
        str, typer.Option(help="Of the weights: fp8, bf16, int8, fp4, int4; default: as stored.")
    ] = "",
    kv: Annotated[str, typer.Option(help="Of the cache: bf16 or fp8.")] = "bf16",
    engine: Annotated[str, typer.Option(help="Whose calibration: sglang, vllm, trtllm, deepseek; default: none.")] = "",
    device: Annotated[Path | None, typer.Option(help="YAML that describes a device of your own.")] = None,
    price: Annotated[float | None, typer.Option(help="Dollars per card and hour.")] = None,
    api_price: Annotated[float | None, typer.Option(help="Dollars per million output tokens elsewhere.")] = None,
    loads: Annotated[Path | None, typer.Option(help="Counted expert loads (JSON: layers of lists).")] = None,
    balanced: Annotated[bool, typer.Option("--balance/--no-balance", help="Experts placed by their loads.")] = True,
    draft: Annotated[bool, typer.Option("--draft/--no-draft", help="Multi-token prediction, where trained.")] = True,
    night: Annotated[str | None, typer.Option(help="Share of the users at night, like 0.4.")] = None,
    calibrate: CalibrateOption = None,
    explain: Annotated[bool, typer.Option("--explain", help="Every term with its formula, value and source.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a report with plots.")] = None,
    lang: Annotated[str, typer.Option(help="Of the report: en or zh.")] = "en",
    out: Annotated[Path | None, typer.Option(help="Write the deployment file of the first option.")] = None,
) -> None:
    """Say which deployment your servers should run: boxes, an expert-parallel cluster, or a smaller model."""
    if ctx.invoked_subcommand is not None:
        return
    from brigade.plan.ask import Impossible, answer
    from brigade.plan.models import BadModel
    from brigade.plan.points import BadPoints
    from brigade.plan.quantity import BadQuantity
    from brigade.spec.config import BadConfig
    from brigade.spec.device import BadDevice

    try:
        if lang not in ("en", "zh"):
            raise BadQuantity(f"--lang {lang}: must be en or zh")
        own = read_device(device)
        q = question(model, servers, users, n_in, n_out, hit_rate, tpot, ttft, precision, kv, engine, price, api_price,
                     read_loads(loads), balanced, draft, night, own)  # fmt: skip
        c = calibration(calibrate)
        a = answer(q, c)
    except (BadQuantity, BadDevice, BadModel, BadConfig, BadPoints, Impossible) as e:
        raise Fault(str(e), 2) from e
    if out is not None:
        from brigade.plan.deployment import deployment_yaml

        write(out, deployment_yaml(a.options[0], q))
    if html is not None:
        from brigade.plan.html import report

        write(html, report(a, c, lang))
    if as_json:
        typer.echo(json.dumps(as_data(a), indent=1))
        return
    show(a, c, explain)


def question(
    model: str,
    servers: str,
    users: str,
    n_in: str,
    n_out: str,
    hit_rate: str,
    tpot: str,
    ttft: str,
    precision: str,
    kv: str,
    engine: str,
    price: float | None,
    api_price: float | None,
    counts: tuple[tuple[float, ...], ...],
    balanced: bool,
    draft: bool,
    night: str | None,
    own: "tuple[Device, ...]",
) -> "Question":
    """The question in plain values. Raises BadQuantity, BadDevice, BadModel or BadConfig."""
    from brigade.plan import quantity as read
    from brigade.plan.ask import Question
    from brigade.plan.balance import LoadStatistics
    from brigade.plan.models import find_model, precision_of
    from brigade.plan.search import Slo
    from brigade.plan.step import Setup

    if not servers:
        raise read.BadQuantity("--servers is missing; write it like --servers '22 x 8 x H800'")
    if not users:
        raise read.BadQuantity("--users is missing; write it like --users 2000")
    for option, value in ("--price", price), ("--api-price", api_price):
        if value is not None and not 0 < value < 1e6:
            raise read.BadQuantity(f"{option} {value}: must be a positive number of dollars")
    if kv not in ("bf16", "fp8"):
        raise read.BadQuantity(f"--kv {kv}: must be bf16 or fp8")
    found = find_model(model)
    name = precision or found.stored
    assumed = [] if precision else [f"precision {name}: as the model's authors publish it"]
    if "k" in (n_in + n_out).lower():
        assumed.append("1k tokens = 1000")
    if hit_rate == "0":
        assumed.append("no prefix cache hits (--hit-rate)")
    return Question(
        model=found,
        fleets=read.servers(servers, own),
        users=read.count("--users", users),
        n_in=read.count("--input", n_in, found.spec.context),
        n_out=read.count("--output", n_out, found.spec.context),
        hit=read.share("--hit-rate", hit_rate),
        slo=Slo(read.seconds("--tpot", tpot), read.seconds("--ttft", ttft)),
        precision=precision_of(name, kv),
        precision_name=name,
        engine=engine.lower(),
        price=price,
        api_price=api_price,
        loads=Setup(balanced=balanced, loads=LoadStatistics(counts=counts)),
        draft=draft,
        night=None if night is None else read.share("--night", night),
        assumed=tuple(assumed),
    )


def read_device(path: Path | None) -> "tuple[Device, ...]":
    """A device of the user's, from YAML."""
    if path is None:
        return ()
    import yaml

    from brigade.spec.device import BadDevice, device_from

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise BadDevice(f"{path}: cannot be read ({e.strerror})") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise BadDevice(f"{path}: not valid YAML ({one_line(str(e))})") from e
    if not isinstance(data, dict):
        raise BadDevice(f"{path}: must be keys with values, like 'name: mine' and 'like: H100'")
    return (device_from({str(k): v for k, v in data.items()}, str(path)),)


def read_loads(path: Path | None) -> tuple[tuple[float, ...], ...]:
    """Counts by layer and expert."""
    if path is None:
        return ()
    from brigade.plan.quantity import BadQuantity

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        counts = tuple(tuple(float(x) for x in layer) for layer in data)
    except OSError as e:
        raise BadQuantity(f"--loads {path}: cannot be read ({e.strerror})") from e
    except (ValueError, TypeError) as e:
        raise BadQuantity(f"--loads {path}: must be a list of layers, each a list of counts ({e})") from e
    if not counts or any(len(layer) != len(counts[0]) or not sum(layer) > 0 or min(layer) < 0 for layer in counts):
        raise BadQuantity(f"--loads {path}: every layer needs as many counts as the first, none negative, not all 0")
    return counts


def calibration(path: Path | None) -> "Calibration":
    """The shipped calibration, with a user's measurements if there are any."""
    from brigade.plan.calibrate import folded
    from brigade.plan.points import read_points
    from brigade.plan.rates import shipped

    return shipped() if path is None else folded(shipped(), read_points(path))


def write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise Fault(f"{path}: cannot be written ({e.strerror})", 2) from e


def show(a: "Answer", c: "Calibration", explain: bool) -> None:
    """The answer for people."""
    from rich.console import Console

    console = Console(highlight=False, emoji=False)
    console.print(a.sentence, style="bold", markup=False)
    console.print(options_table(a.options))
    for i, o in enumerate(a.options, 1):
        console.print(f"{i}. {o.model}: {o.name}: {o.why}", markup=False)
    console.print(f"\ncrossover: {a.crossover}", markup=False)
    for note in a.notes:
        console.print(note, markup=False)
    console.print("assumed:", markup=False)
    for text in a.assumptions:
        console.print(f"  - {text}", markup=False)
    if explain:
        from brigade.plan.explained import explain as lines_of
        from brigade.plan.serving import Workload

        q = a.question
        w = Workload(a.options[0].users, q.n_in, q.n_out, q.hit)
        console.print(lines_table(lines_of(a.options[0], c, w)))


def options_table(options: "Iterable[Option]") -> "Table":
    from rich.table import Table

    table = Table(title="rates in output tokens/s; ranges are 80 % intervals")
    for name in ("", "users", "nodes", "tok/s/card", "TTFT s", "TPOT ms", "$/M out", "kW"):
        table.add_column(name, justify="right")
    for i, o in enumerate(options, 1):
        low, high = o.most_users_range
        rate = f"{o.tokens_per_gpu:,.0f}", f"{o.tokens_range[0]:,.0f}-{o.tokens_range[1]:,.0f} full"
        table.add_row(
            f"{i}",
            f"{'' if o.fits else 'only '}{o.most_users:,.0f}\n{low:,.0f}-{high:,.0f}",
            f"{o.layout.nodes:g}\n{o.tokens_per_node:,.0f}/node",
            "\n".join(rate),
            "\n".join(f"p{p} {x:.2f}" for p, x in zip((50, 90, 99), o.ttft, strict=True)),
            "\n".join(f"p{p} {1e3 * x:.0f}" for p, x in zip((50, 90, 99), o.tpot, strict=True)),
            "-" if o.cost is None else f"{o.cost:.2f}",
            f"{o.kilowatts:,.0f}",
        )
    return table


def lines_table(lines: "Iterable[Any]") -> "Table":
    from rich.table import Table

    table = Table(title="every term of the first option")
    for name in ("part", "term", "value", "formula", "source"):
        table.add_column(name, overflow="fold")
    last = ""
    for line in lines:
        table.add_row(line.part if line.part != last else "", line.name, line.value, line.formula, line.source)
        last = line.part
    return table


def as_data(a: "Answer") -> dict[str, Any]:
    """The answer as plain values."""
    q = a.question
    return {
        "question": {
            "model": q.model.name, "servers": [[s.n, s.per_node, s.device.name] for s in q.fleets], "users": q.users,
            "input": q.n_in, "output": q.n_out, "hit_rate": q.hit, "tpot_s": q.slo.tpot, "ttft_s": q.slo.ttft,
            "precision": q.precision_name, "kv": q.precision.kv, "engine": q.engine,
        },
        "sentence": a.sentence,
        "crossover": a.crossover,
        "notes": a.notes,
        "assumptions": a.assumptions,
        "options": [option_data(o) for o in a.options],
        "searched": {"layouts": sum(f.n_considered for _, f in a.found), "units": sum(f.n_units for _, f in a.found)},
    }  # fmt: skip


def option_data(o: "Option") -> dict[str, Any]:
    return {
        "deployment": o.name, "model": o.model, "family": o.family, "fits": o.fits, "why": o.why, "limit": o.limit,
        "nodes": o.layout.nodes, "cards": o.n_gpus, "users": o.users, "most_users": o.most_users,
        "most_users_80": o.most_users_range, "output_tok_s_card": o.tokens_per_gpu,
        "output_tok_s_node": o.tokens_per_node,
        "output_tok_s_card_full_80": o.tokens_range, "in_flight": o.served.in_flight,
        "ttft_s": dict(zip(("p50", "p90", "p99"), o.ttft, strict=True)),
        "tpot_s": dict(zip(("p50", "p90", "p99"), o.tpot, strict=True)),
        "usd_per_million_output": o.cost, "kilowatts": o.kilowatts,
        "units": [
            {"role": u.role, "count": k, "nodes": u.nodes, "grid": asdict(u.grid),
             "draft": u.pool.setup.draft, "users": u.users, "requests_s": u.rate, "tpot_s": u.tpot, "limit": u.limit}
            for u, k in o.layout.units
        ],
    }  # fmt: skip


@app.command()
def reproduce(
    points: Annotated[Path | None, typer.Option(help="Other measurements: JSON points, or InferenceX's CSV.")] = None,
    rows: Annotated[bool, typer.Option("--rows", help="Also the rows of InferenceX.")] = False,
    calibrate: CalibrateOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Print published measurements beside the predictions, with errors."""
    from brigade.plan.points import BadPoints, read_points, shipped_points, shipped_rows
    from brigade.plan.reproduce import compare, fleet, ratios

    try:
        c = calibration(calibrate)
        cases: list[Case] = read_points(points) if points else shipped_points() + (shipped_rows() if rows else [])
        parts = {"points": compare(cases, c)}
    except BadPoints as e:
        raise Fault(str(e), 2) from e
    if not points:
        parts |= {"ratios": ratios(c), "fleet": fleet(c)}
    if as_json:
        typer.echo(json.dumps({k: [asdict(x) | {"error": x.error} for x in v] for k, v in parts.items()}, indent=1))
        return
    from rich.console import Console

    console = Console(highlight=False, emoji=False)
    for name, lines in parts.items():
        console.print(compared_table(name, lines))
    errors = [abs(x.error) for x in parts["points"]]
    inside = sum(x.inside for x in parts["points"])
    console.print(
        f"{len(errors)} values, mean absolute error {100 * sum(errors) / len(errors):.1f} %, median "
        f"{100 * sorted(errors)[len(errors) // 2]:.1f} %, {inside} inside their 80 % interval. These points were "
        "fitted; held-out errors stand in docs/planning.md."
    )


def compared_table(title: str, lines: "Iterable[Compared]") -> "Table":
    from rich.table import Table

    table = Table(title=title)
    for name in ("point", "what", "measured", "predicted", "error", "source"):
        table.add_column(
            name, overflow="fold", justify="right" if name in ("measured", "predicted", "error") else "left"
        )
    for x in lines:
        table.add_row(x.name, x.what, f"{x.measured:,.4g}", f"{x.predicted:,.4g}", f"{100 * x.error:+.0f} %", x.source)
    return table


def verify(
    plan: Annotated[Path, typer.Option(help="What `brigade plan --json` printed.")],
    metrics: Annotated[str, typer.Option(help="URL of a server's metrics, like http://127.0.0.1:8000/metrics.")],
) -> None:
    """Compare a plan with a running fleet. Exit code 1 if a measurement is outside its interval."""
    import httpx

    from brigade.plan.verify import BadMetrics
    from brigade.plan.verify import verify as compare

    try:
        data = json.loads(plan.read_text(encoding="utf-8"))
        text = httpx.get(metrics, timeout=10).raise_for_status().text
        lines = compare(data, text)
    except OSError as e:
        raise Fault(f"{plan}: cannot be read ({e.strerror})", 2) from e
    except (ValueError, httpx.InvalidURL) as e:
        raise Fault(str(e) if isinstance(e, BadMetrics) else f"{plan} or {metrics}: {e}", 2) from e
    except httpx.HTTPError as e:
        raise Fault(f"{metrics}: {e}; give the URL of a running server's metrics", 2) from e
    for x in lines:
        mark = "ok     " if x.inside else "OUTSIDE"
        typer.echo(
            f"{mark} {x.what}: predicted {x.predicted:.3g} ({x.low:.3g} to {x.high:.3g}), measured {x.measured:.3g}"
        )
    if not all(x.inside for x in lines):
        raise typer.Exit(1)
