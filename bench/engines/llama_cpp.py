"""llama.cpp as an engine to measure: its own llama-batched-bench for both decode and prefill.

That program makes its prompts and the tokens it feeds back by itself, at random (routing is as even as for ours), and
does not sample, which is to its advantage. It loads the model for every job, from memory after the first.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.engines.wire import Decoded, Options, Prompts, answer

QUANTISED = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_K_M"}
"""Precision to llama.cpp's name of its nearest file type."""
PRECISIONS = tuple(QUANTISED)
BATCH, PHYSICAL_BATCH = 2048, 512
WARM_BELOW = 1024
"""Prompt tokens of a job above which it is not done twice: it is long enough to lose nothing by a cold start."""


class LlamaCpp:
    """The programs in `venv`/bin and one GGUF file."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._model = gguf(options)
        if not self._model.exists():
            raise FileNotFoundError(f"{self._model}: not found; bench.convert_gguf makes it")

    def facts(self) -> dict[str, Any]:
        version = Path(self._options.venv) / "VERSION"  # the programs do not know their release
        return {"version": version.read_text().strip() if version.exists() else "", "notes": [self._model.name]}

    def warm(self, prompts: Prompts) -> None:
        """Nothing to do: the program warms up by itself, and short work is repeated for its last figures."""

    def decode(self, prompts: Prompts, n_out: int) -> Decoded:
        n, length = len(prompts), len(prompts[0])
        row = self._run(n, length, n_out, repeat=2 if n * length < WARM_BELOW else 1)[-1]
        return Decoded(row["speed_tg"], row["t_pp"])

    def prefill(self, prompts: Prompts) -> list[float]:
        return [row["t_pp"] for row in self._run(1, len(prompts[0]), 1, repeat=len(prompts) + 1)[1:]]

    def _run(self, concurrency: int, n_prompt: int, n_out: int, repeat: int = 2) -> list[dict[str, Any]]:
        o = self._options
        arguments = {
            "-m": self._model,
            "-t": o.threads,
            "-c": concurrency * (n_prompt + n_out) + 64,
            "-b": BATCH,
            "-ub": PHYSICAL_BATCH,
            "-npp": n_prompt,
            "-ntg": n_out,
            "-npl": ",".join([str(concurrency)] * repeat),
            "--output-format": "jsonl",
        } | o.settings
        command = [program(o, "llama-batched-bench"), *(str(w) for pair in arguments.items() for w in pair)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or len(rows) != repeat:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
        return rows


def gguf(options: Options) -> Path:
    """Where the converted checkpoint is."""
    return Path(options.checkpoint) / "gguf" / f"{QUANTISED[options.precision]}.gguf"


def program(options: Options, name: str) -> str:
    return f"{options.venv}/bin/{name}"


def environment(options: Options) -> dict[str, str]:
    return {"LD_LIBRARY_PATH": f"{options.venv}/bin"}


def python(options: Options) -> str:
    return sys.executable


def server(options: Options, port: int) -> list[str]:
    """The command that serves this over HTTP."""
    arguments = {
        "-m": gguf(options),
        "-t": options.threads,
        "-c": options.max_concurrency * options.max_context,
        "-np": options.max_concurrency,
        "-b": BATCH,
        "-ub": PHYSICAL_BATCH,
        "--host": "127.0.0.1",
        "--port": port,
    }
    return [program(options, "llama-server"), *(str(w) for pair in arguments.items() for w in pair)]


if __name__ == "__main__":
    answer(LlamaCpp)
