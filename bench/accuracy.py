"""What lower precision costs: mean loss of a text, in nats a token, for every way a checkpoint can be computed.

    python -m bench.accuracy [CHECKPOINT] [--text FILE]

The text is cut into pieces of at most the model's context; each token but a piece's first is predicted once.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from brigade.core.scheduler import Slice, StepPlan
from brigade.engine import auto
from brigade.engine.config import DEMO_MODEL, EngineConfig
from brigade.engine.tokenizer import Tokenizer
from brigade.engine.worker import Worker
from brigade.model.batch import Batch, build

STORY = Path(__file__).parent / "texts" / "story.txt"
PIECE = 512
WAYS = {
    "float32, torch": EngineConfig(dtype="float32"),
    "bf16, C++ kernels": EngineConfig(weights="bf16"),
    "int8, C++ kernels": EngineConfig(weights="int8"),
    "int4 experts, C++ kernels": EngineConfig(weights="int4"),
    "bf16, bf16 on the wire": EngineConfig(weights="bf16", wire="bf16"),
    "bf16, int8 on the wire": EngineConfig(weights="bf16", wire="int8"),
    "bf16, fp8 on the wire": EngineConfig(weights="bf16", wire="fp8"),
}


def main() -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="bench.accuracy", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=DEMO_MODEL)
    parser.add_argument("--text", type=Path, default=STORY)
    options = parser.parse_args()
    tokens = Tokenizer(options.checkpoint).encode(options.text.read_text(encoding="utf-8"))
    table = Table(title=f"{options.checkpoint.name}, {len(tokens)} tokens of {options.text.name}")
    for column in ("computed in", "nats a token", "perplexity"):
        table.add_column(column)
    for name, config in WAYS.items():
        settings = {field: getattr(config, field) for field in ("dtype", "weights", "wire")}
        try:
            nats = loss(EngineConfig(model=str(options.checkpoint), kv_bytes=1 << 28, **settings), tokens)
        except ValueError as e:
            table.add_row(name, f"not here: {e}", "")
            continue
        table.add_row(name, f"{nats:.4f}", f"{math.exp(nats):.3f}")
    Console(width=120).print(table)
    return 0


@torch.inference_mode()
def loss(config: EngineConfig, tokens: list[int]) -> float:
    """Mean negative log-likelihood of the tokens, in nats. Raises what Worker.load raises."""
    worker, _ = Worker.load(config, auto.this_machine(), lambda done, total: None)
    total, n = 0.0, 0
    for start in range(0, len(tokens) - 1, PIECE):
        piece = tokens[start : start + PIECE + 1]
        pages = tuple(range(-(-len(piece) // worker.page)))
        batch = build(StepPlan((Slice(0, tuple(piece[:-1]), 0, pages, True),)), worker.page, {})
        logits = worker.model.forward(every_row(batch))
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(piece[1:]), reduction="sum"))
        n += len(piece) - 1
    return total / n


def every_row(batch: Batch) -> Batch:
    """The same batch with the logits of every row wanted."""
    return Batch(
        ids_T=batch.ids_T,
        positions_T=batch.positions_T,
        slots_T=batch.slots_T,
        slices=batch.slices,
        sample_R=torch.arange(len(batch.ids_T)),
        rids=batch.rids * len(batch.ids_T),
    )


if __name__ == "__main__":
    sys.exit(main())
