"""`brigade verify`: a plan beside a running fleet. Reads both, shows the comparison."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from brigade.cli.fault import Fault


def verify(
    plan: Annotated[Path, typer.Option(help="What `brigade plan --json` printed.")],
    metrics: Annotated[str, typer.Option(help="URL of a server's metrics, like http://127.0.0.1:8000/metrics.")],
) -> None:
    """Compare a plan with a running fleet. Exit code 1 if a measurement is outside its interval."""
    import httpx

    from brigade.plan.verify import BadMetrics
    from brigade.plan.verify import verify as compare

    data = read_plan(plan)
    try:
        text = httpx.get(metrics, timeout=10).raise_for_status().text
        lines = compare(data, text)
    except BadMetrics as e:
        raise Fault(f"{plan}, {metrics}: {e}", 2) from e
    except httpx.InvalidURL as e:
        raise Fault(f"{metrics}: {e}; give the URL of a running server's metrics", 2) from e
    except httpx.HTTPStatusError as e:
        raise Fault(
            f"{metrics}: answered {e.response.status_code}; give the URL of a running server's metrics", 2
        ) from e
    except httpx.HTTPError as e:
        raise Fault(f"{metrics}: {e}; give the URL of a running server's metrics", 2) from e
    for x in lines:
        mark = "ok     " if x.inside else "OUTSIDE"
        typer.echo(
            f"{mark} {x.what}: predicted {x.predicted:.3g} ({x.low:.3g} to {x.high:.3g}), measured {x.measured:.3g}"
        )
    if not all(x.inside for x in lines):
        raise typer.Exit(1)


def read_plan(path: Path) -> Any:
    """What `brigade plan --json` wrote. Raises Fault."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise Fault(f"{path}: cannot be read ({e.strerror})", 2) from e
    except (ValueError, RecursionError) as e:
        raise Fault(f"{path}: not JSON ({e}); write it with brigade plan --json", 2) from e
