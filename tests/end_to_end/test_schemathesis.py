"""Generated requests of every kind against a live server: no 5xx, and every answer as documented."""

import subprocess
import sys

import httpx

from tests.end_to_end.running import Server

# The schema cannot say that a token exists or that a template accepts a message, so valid-looking data may be refused.
EXCLUDED = "positive_data_acceptance"
# It takes as long as it is asked to; tests/serve/test_trace.py has its answers.
SLOW_PATH = "/debug/trace"


def test_no_generated_request_breaks_the_server(server: Server) -> None:
    run = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"),
            *("--exclude-path", SLOW_PATH),
            *("--exclude-checks", EXCLUDED, "--max-examples", "30", "--seed", "1"),
            *("--request-timeout", "30", "--workers", "1", "--generation-database", "none"),
            *("--phases", "examples,coverage,fuzzing", "--no-color"),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert httpx.get(f"{server.url}/ready").status_code == 200
