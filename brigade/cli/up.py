"""`brigade up`: runs a deployment file. Everything but the way from the file to the settings is `brigade serve`'s."""

from typing import Annotated

import typer

from brigade.cli.explain import File
from brigade.cli.serve import LOG_LEVELS, check_log_level, start


def up(
    file: File,
    log_level: Annotated[str, typer.Option(help=f"One of {', '.join(LOG_LEVELS)}.")] = "info",
    until_eof: Annotated[bool, typer.Option("--until-eof", hidden=True)] = False,
) -> None:
    """Run a deployment file; this machine is its first host, the others run `brigade join`. Ctrl-C ends it."""
    check_log_level(log_level)
    from brigade.cli.launch import read_launch

    launch = read_launch(file)
    start(launch.engine, launch.deployed.serve_config(), log_level, launch.hosts, until_eof)
