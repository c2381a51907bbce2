"""`brigade up`: runs a deployment file. Everything but the way from the file to the settings is `brigade serve`'s."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from brigade.cli.explain import File
from brigade.cli.fault import Fault
from brigade.cli.serve import LOG_LEVELS, check_log_level, start

if TYPE_CHECKING:
    from brigade.cli.deployed import Deployed
    from brigade.engine.config import EngineConfig
    from brigade.spec.model import ModelSpec


def up(
    file: File,
    log_level: Annotated[str, typer.Option(help=f"One of {', '.join(LOG_LEVELS)}.")] = "info",
    until_eof: Annotated[bool, typer.Option("--until-eof", hidden=True)] = False,
) -> None:
    """Run a deployment file on this machine, its first host. Ctrl-C lets running requests finish, then ends."""
    check_log_level(log_level)
    run(file, log_level, until_eof)


def run(file: Path, log_level: str, until_eof: bool = False) -> None:
    """Start what the file describes and serve until a signal ends it. Raises Fault."""
    from brigade.cli.deployed import Deployed
    from brigade.cli.deployment_file import read_deployment
    from brigade.cli.explained import cannot_run
    from brigade.spec.config import BadConfig, read_spec

    deployed = Deployed(file, read_deployment(file))
    try:
        spec = read_spec(deployed.model)
    except BadConfig as e:
        raise Fault(str(e), 2) from e
    if problems := cannot_run(deployed, spec):
        raise Fault(f"{file}: {problems[0]}", 2)
    start(engine_config(deployed, spec), deployed.serve_config(), log_level, until_eof)


def engine_config(deployed: "Deployed", spec: "ModelSpec") -> "EngineConfig":
    """Settings of the one unit, as `brigade explain` shows them: with rank_memory, the cache is what it leaves."""
    from brigade.cli.explained import memory_of
    from brigade.engine.auto import this_machine

    units = deployed.what.units[0]
    layout = units.layouts()[0]
    engine = deployed.engine_config(units, layout.n_ranks)
    if deployed.what.rank_memory is None or engine.kv_bytes:
        return engine
    memory = memory_of(deployed, spec, this_machine(), units, layout)
    if not memory.kv_cache:
        raise Fault(f"{deployed.file}: rank_memory: {memory.verdict}", 2)
    return replace(engine, kv_bytes=memory.kv_cache)
