"""What `brigade bench --json` wrote, as the workload and the values of a measured point. Pure but for one file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brigade.plan.case import BadPoints

MOST_CACHED = 0.05
"""Share of prompts found in the cache that is still none: measured values are predicted without any."""


def is_bench(data: object) -> bool:
    """Whether a file is what `brigade bench --json` wrote, by the keys that nothing else has."""
    return isinstance(data, Mapping) and {"settings", "results", "client_machine"} <= set(data)


def with_bench(point: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """A point whose key 'bench' names such a file, relative to the points' own, with the workload and the values in it.

    Raises BadPoints.
    """
    path = where.parent / str(point["bench"])
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise BadPoints(f"{where}: bench {path}: cannot be read ({e.strerror})") from e
    except (ValueError, RecursionError) as e:
        raise BadPoints(f"{where}: bench {path}: not JSON ({e})") from e
    if not is_bench(data):
        raise BadPoints(f"{where}: bench {path}: not what brigade bench --json writes")
    try:
        settings, results = data["settings"], data["results"]
        if settings["loop"] != "closed" or settings["prompts"] is not None or results["failed"]:
            raise BadPoints(f"{where}: bench {path}: must be of --concurrency and --input-len, and without failures")
        if results["cached_input_tokens"] > MOST_CACHED * results["input_tokens"]:
            raise BadPoints(f"{where}: bench {path}: prompts were found in the cache; measure with others")
        work = {"isl": settings["input_len"], "osl": settings["output_len"], "concurrency": settings["concurrency"]}
        measured = {"tpot_ms": 1e3 * results["tpot"]["mean"], "ttft_ms": 1e3 * results["ttft"]["p50"]}
    except (KeyError, TypeError) as e:
        raise BadPoints(f"{where}: bench {path}: lacks {e}") from e
    return {**point, "workload": work | point.get("workload", {}), "measured": measured | point.get("measured", {})}
