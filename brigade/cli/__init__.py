"""The command line: `brigade serve`, `up`, `chat` and the tools. Reads options and shows results; decides nothing else.

Modules here import only typer and the standard library at the top, so that --help and --version answer at once.
"""

import sys
from importlib import metadata
from platform import python_version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from brigade.cli import (
    bench,
    chat,
    doctor,
    drain,
    experts,
    explain,
    join,
    manifest,
    plan,
    role,
    serve,
    status,
    trace,
    up,
    verify,
)
from brigade.cli.fault import Fault, one_line


class _Commands(TyperGroup):
    """Turns expected errors into one line on stderr and an exit code; anything else is a bug, with its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Fault as e:
            typer.echo(f"brigade: {one_line(str(e))}", err=True)
            raise typer.Exit(e.code) from None


app = typer.Typer(
    cls=_Commands,
    help="Serves sparse mixture-of-experts language models, from one laptop CPU to a fleet.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve.serve)
app.command()(join.join)
app.command()(chat.chat)
app.command()(bench.bench)
app.command()(status.status)
app.command()(trace.trace)
app.command()(experts.experts)
app.command()(doctor.doctor)
app.command()(up.up)
app.command()(drain.drain)
app.command()(role.role)
app.command()(explain.explain)
app.command()(manifest.manifest)
app.add_typer(plan.app, name="plan")
app.command()(verify.verify)


def version_line() -> str:
    """Versions of Brigade and of what it runs on, from package metadata: torch is not imported."""
    return f"brigade {_version('brigade')} (python {python_version()}, torch {_version('torch')})"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version_line())
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show versions and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the `brigade` command. Exit codes: 0 done, 1 failed, 2 bad input, 130 ended by Ctrl-C."""
    try:
        app(prog_name="brigade")
    except KeyboardInterrupt:
        sys.exit(130)
