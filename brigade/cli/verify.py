"""`brigade verify`: a plan beside a running fleet. Reads both, shows the comparison."""

import json
from pathlib import Path
from typing import Annotated

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

    try:
        data = json.loads(plan.read_text(encoding="utf-8"))
        text = httpx.get(metrics, timeout=10).raise_for_status().text
        lines = compare(data, text)
    except OSError as e:
        raise Fault(f"{plan}: cannot be read ({e.strerror})", 2) from e
    except (ValueError, httpx.InvalidURL) as e:
        raise Fault(str(e) if isinstance(e, BadMetrics) else f"{plan} or {metrics}: {e}", 2) from e
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
