"""`brigade plan`: which deployment should these servers run? Reads the question, shows the answer; decides nothing."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from brigade.cli import plan_simulate
from brigade.cli.fault import Fault, one_line

if TYPE_CHECKING:
    from brigade.plan.case import Case
    from brigade.plan.question import Answer
    from brigade.plan.rates import Calibration

app = typer.Typer(
    help="Say which deployment your servers should run: boxes, an expert-parallel cluster, or a smaller model.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command()(plan_simulate.simulate)

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
    price: Annotated[str | None, typer.Option(help="Dollars per card and hour.")] = None,
    api_price: Annotated[str | None, typer.Option(help="Dollars per million output tokens elsewhere.")] = None,
    loads: Annotated[Path | None, typer.Option(help="Counted expert loads (JSON: layers of lists).")] = None,
    balanced: Annotated[bool, typer.Option("--balance/--no-balance", help="Experts placed by their loads.")] = True,
    draft: Annotated[bool, typer.Option("--draft/--no-draft", help="Multi-token prediction, where trained.")] = True,
    night: Annotated[str | None, typer.Option(help="Share of the users at night, like 0.4.")] = None,
    night_hours: Annotated[str, typer.Option(help="Hours of a night.")] = "8",
    calibrate: CalibrateOption = None,
    explain: Annotated[bool, typer.Option("--explain", help="Every term with its formula, value and source.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a report with plots.")] = None,
    lang: Annotated[str, typer.Option(help="Of the report: en or zh.")] = "en",
    out: Annotated[Path | None, typer.Option(help="Write the best layout that Brigade runs as a file.")] = None,
) -> None:
    """Say which deployment your servers should run: boxes, an expert-parallel cluster, or a smaller model."""
    if ctx.invoked_subcommand is not None:
        return
    from brigade.cli.plan_question import Asked, calibration, question
    from brigade.plan.ask import answer
    from brigade.plan.case import BadPoints
    from brigade.plan.models import BadModel
    from brigade.plan.quantity import BadQuantity
    from brigade.plan.question import Impossible
    from brigade.plan.say import LANGUAGES
    from brigade.spec.config import BadConfig
    from brigade.spec.device import BadDevice

    asked = Asked(model, servers, users, n_in, n_out, hit_rate, tpot, ttft, precision, kv, engine, device, price,
                  api_price, loads, balanced, draft, night, night_hours)  # fmt: skip
    try:
        if lang not in LANGUAGES:
            raise BadQuantity(f"--lang {one_line(lang)}: must be en or zh")
        c = calibration(calibrate)
        a = answer(question(asked, c), c)
    except (BadQuantity, BadDevice, BadModel, BadConfig, BadPoints, Impossible) as e:
        raise Fault(one_line(str(e)), 2) from e
    if out is not None:
        write_deployment(out, a, c)
    if html is not None:
        from brigade.plan.html import report

        write(html, report(a, c, lang))
    if as_json:
        from brigade.plan.plain import as_data

        typer.echo(json.dumps(as_data(a, c), indent=1))
        return
    from brigade.cli.plan_shown import show

    show(a, c, explain)


def write_deployment(path: Path, a: "Answer", c: "Calibration") -> None:
    """The file of the first option, or of the best layout that Brigade runs; on stderr which that is."""
    from brigade.plan.deployment import cannot_run, deployment_yaml, runnable, what_brigade_lacks

    q = a.question
    first = next(o for o in a.options if o.model == q.model.name)
    lacks = what_brigade_lacks(first, q)
    if lacks is None:
        write(path, deployment_yaml(first, q))
        return
    o = runnable(q, c)
    if o is None:
        rest = "" if cannot_run(q) else ", and nothing that it runs on these servers keeps the promise"
        raise Fault(f"{path}: not written, because this needs {lacks}, which Brigade does not have{rest}", 2)
    write(path, deployment_yaml(o, q))
    typer.echo(
        f"{path}: {o.name}, for {'' if o.fits else 'only '}{min(o.most_users, q.users):,.0f} users, because option 1 "
        f"needs {lacks}, which Brigade does not have",
        err=True,
    )


def write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise Fault(f"{path}: cannot be written ({e.strerror})", 2) from e


@app.command()
def reproduce(
    points: Annotated[Path | None, typer.Option(help="Other measurements: JSON points, or InferenceX's CSV.")] = None,
    rows: Annotated[bool, typer.Option("--rows", help="Also the rows of InferenceX.")] = False,
    calibrate: CalibrateOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Print published measurements beside the predictions, with errors."""
    from brigade.cli.plan_question import calibration
    from brigade.plan.case import BadPoints
    from brigade.plan.points import kept_aside, not_predicted, read_points, shipped_points, shipped_rows
    from brigade.plan.reproduce import compare, fleet, ratios

    try:
        c = calibration(calibrate)
        cases: list[Case] = read_points(points) if points else shipped_points() + (shipped_rows() if rows else [])
        parts = {"points": compare(cases, c)}
        if not points:
            parts["kept aside: fitted by no version"] = compare(kept_aside(), c)
    except BadPoints as e:
        raise Fault(str(e), 2) from e
    if not points:
        parts |= {"ratios": ratios(c), "fleet": fleet(c)}
    if as_json:
        typer.echo(json.dumps({k: [asdict(x) | {"error": x.error} for x in v] for k, v in parts.items()}, indent=1))
        return
    from rich.console import Console

    from brigade.cli.plan_shown import compared_table

    console = Console(highlight=False, emoji=False)
    for name, lines in parts.items():
        console.print(compared_table(name, lines))
    errors = [abs(x.error) for x in parts["points"]]
    inside = sum(x.inside for x in parts["points"])
    console.print(
        f"{len(errors)} values, mean absolute error {100 * sum(errors) / len(errors):.1f} %, median "
        f"{100 * sorted(errors)[len(errors) // 2]:.1f} %, {inside} inside their 80 % interval. "
        + ("" if points else "These points were fitted; held-out errors stand in docs/planning.md.")
    )
    if not points:
        console.print(
            f"Not predicted, because they say too little or of what is not modelled: {', '.join(not_predicted())}."
        )
