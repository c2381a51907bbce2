"""`brigade up`: runs a deployment file. Everything but the way from the file to the settings is `brigade serve`'s."""

from contextlib import nullcontext
from typing import Annotated

import typer

from brigade.cli.explain import File
from brigade.cli.serve import LOG_LEVELS, check_log_level, start


def up(
    file: File,
    ray: Annotated[
        str, typer.Option(help="HOST:PORT of a Ray cluster, which then starts the other hosts. Needs the extra `ray`.")
    ] = "",
    log_level: Annotated[str, typer.Option(help=f"One of {', '.join(LOG_LEVELS)}.")] = "info",
    until_eof: Annotated[bool, typer.Option("--until-eof", hidden=True)] = False,
) -> None:
    """Run a deployment file; this machine is its gateway, the others run `brigade join`. Ctrl-C ends it."""
    check_log_level(log_level)
    from brigade.cli.launch import read_launch
    from brigade.cli.ray_hosts import placed

    launch = read_launch(file)
    web = launch.deployed.serve_config()
    with placed(launch, ray) if ray else nullcontext():
        start(launch.fleet, web, log_level, launch.hosts, until_eof)
