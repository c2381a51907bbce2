"""`brigade trace`: records what a server's processes do for a while, or for one request, as a trace for Perfetto."""

import json
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brigade.cli.chrome import chrome_trace, of_rank, of_request, shares
from brigade.cli.fault import Fault, one_line
from brigade.cli.protocol import (
    DEFAULT_URL,
    BadStream,
    EventDecoder,
    ServerError,
    base_url,
    error_text,
    headers,
    is_loopback,
    message_of,
    model_ids,
    parse_event,
)

if TYPE_CHECKING:
    import httpx

    from brigade.serve.tracer import Recording

PATIENCE = 30.0
"""Seconds for an answer beyond those that are recorded: ranks tell between two steps."""


def trace(
    url: Annotated[str, typer.Option(help="Address of the server.")] = DEFAULT_URL,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="BRIGADE_API_KEY", help="The server's key. Prefer the variable: other users can see command lines."
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="How long to record; with --request, at most.", min=0.01, max=60.0)
    ] = 3.0,
    request: Annotated[
        str | None, typer.Option(metavar="PROMPT", help="Send this prompt and record what is done for it alone.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="With --request: tokens of the answer.", min=1)] = 32,
    rank: Annotated[
        str | None, typer.Option(metavar="UNIT[:RANK]", help="Keep only what this rank did, or all of the unit.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write.")] = Path("trace.json"),
) -> None:
    """Record what the gateway and all ranks do, step by step and layer by layer, for ui.perfetto.dev.

    Recording costs a server little, and nothing while it is off. The file holds no text of prompts or answers.
    """
    import httpx

    address = base_url(url)
    timeout = httpx.Timeout(10.0, read=seconds + PATIENCE)
    with httpx.Client(headers=headers(api_key), trust_env=not is_loopback(address), timeout=timeout) as client:
        name = None if request is None else f"trace-{secrets.token_hex(4)}"
        try:
            body = _record(client, address, seconds, name, request or "", max_tokens)
        except httpx.HTTPError as e:
            raise Fault(
                f"no answer from {address}: {one_line(str(e)) or type(e).__name__}; is the server running?"
            ) from e
    recording = parse(body)
    if name is not None:
        recording = of_request(recording, name)
    if rank is not None:
        recording = _of_rank(recording, rank)
    made = chrome_trace(recording)
    try:
        out.write_text(json.dumps(made, separators=(",", ":")))
    except OSError as e:
        raise Fault(f"cannot write {out}: {e.strerror}") from e
    for note in made["otherData"]["notes"]:
        typer.echo(f"brigade: {note}", err=True)
    _show(recording)
    typer.echo(f"{out}: {len(made['traceEvents'])} events; open it at https://ui.perfetto.dev")


def _record(client: "httpx.Client", url: str, seconds: float, name: str | None, prompt: str, max_tokens: int) -> bytes:
    """The body of /debug/trace. Raises Fault, and HTTPError."""
    asked = {"seconds": seconds, "request": name}
    with client.stream("POST", f"{url}/debug/trace", json=asked) as answer:
        if answer.status_code == 404:
            raise Fault(f"{url} has no /debug/trace: it is another kind of server, or an older version of Brigade")
        if answer.status_code == 401:
            raise Fault(f"{url} needs its key: set BRIGADE_API_KEY, or give --api-key")
        if answer.status_code != 200:
            raise Fault(f"{url}/debug/trace: {error_text(answer.status_code, answer.read())}")
        if name is not None:
            _ask(client, url, name, prompt, max_tokens)
        return answer.read()


def _ask(client: "httpx.Client", url: str, name: str, prompt: str, max_tokens: int) -> None:
    """Send the prompt and show the answer. Raises Fault."""
    models = client.get(f"{url}/v1/models")
    try:
        if models.status_code != 200 or not (ids := model_ids(models.content)):
            raise Fault(f"{url}/v1/models: {error_text(models.status_code, models.content)}")
        body = {"model": ids[0], "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        with client.stream("POST", f"{url}/v1/completions", json=body, headers={"X-Request-Id": name}) as answer:
            if answer.status_code != 200:
                raise Fault(f"{url}/v1/completions: {error_text(answer.status_code, answer.read())}")
            decoder = EventDecoder()
            for chunk in answer.iter_bytes():
                for data in decoder.feed(chunk):
                    sys.stdout.write(parse_event(data).text)
                    sys.stdout.flush()
    except (BadStream, ServerError) as e:
        raise Fault(f"{url}: {e}") from e
    sys.stdout.write("\n")


def parse(body: bytes) -> "Recording":
    """What /debug/trace said. Raises Fault for something else."""
    import msgspec

    from brigade.serve.tracer import Recording

    try:
        told: Any = msgspec.json.decode(body)
        if message := message_of(told):
            raise Fault(f"/debug/trace: {one_line(message)}")
        return msgspec.convert(told, Recording)
    except msgspec.MsgspecError as e:
        raise Fault(f"/debug/trace did not answer as this version of Brigade does: {e}") from e


def _of_rank(recording: "Recording", rank: str) -> "Recording":
    """`rank`: as the option has it. Raises Fault."""
    unit, colon, number = rank.partition(":")
    if colon and not number.isdecimal():
        raise Fault(f"--rank {rank}: say it as decode-0:3, or decode-0 for all ranks of the unit", 2)
    try:
        return of_rank(recording, unit, int(number) if colon else None)
    except ValueError as e:
        raise Fault(f"--rank {rank}: {one_line(str(e))}", 2) from e


def _show(recording: "Recording") -> None:
    """What the steps were made of."""
    from rich.console import Console
    from rich.table import Table

    ranks = [rank for unit in recording.units for rank in unit.ranks]
    steps = [step for rank in ranks for step in rank.steps]
    if not steps:
        typer.echo("no rank has run a step meanwhile")
        return
    whole = sum(step.end - step.begin for step in steps) / 1e9
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("part of steps")
    for name in ("times", "ms", "us each", "share"):
        table.add_column(name, justify="right")
    for name, n, seconds in shares(recording):
        table.add_row(
            name, str(n), f"{1e3 * seconds:.1f}", f"{1e6 * seconds / n:.1f}", f"{100 * seconds / whole:.1f} %"
        )
    console = Console()
    console.print(f"{len(steps)} steps of {len(ranks)} rank{'' if len(ranks) == 1 else 's'}, {1e3 * whole:.1f} ms")
    console.print(table)
