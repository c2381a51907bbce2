"""Measures Brigade and every installed peer in one session, in turn, on the same work. Must not be imported by Brigade.

    python -m bench.make_checkpoint /tmp/mid
    python -m bench.peers /tmp/mid --venvs /tmp/peers --http 32 --json peers.json --markdown peers.md

A peer is a folder of --venvs whose name is an adapter's (transformers, vllm, llama.cpp), or starts with one and a
dash: `vllm` and `vllm-zentorch` are two installations that one adapter drives. bench/README.md says how to install
them.

The session:
  1. For each round, precision and engine in turn (A B A B): measure the machine's limits, start the engine, let it do
     every workload, end it. Loading anew each turn costs time, but an idle engine then takes no core and no memory.
  2. With --http, the same turn goes on with the engine's server, asked by `brigade bench`.
  3. Medians over the rounds, each line beside its limit and beside Brigade's result of the same session.

A machine that does something else meanwhile spoils the numbers, above all those of programs that spin at barriers.
Every line says how many cores others kept busy, and --quiet waits for a moment of peace before each turn.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.report import Sample, as_markdown, as_table, session_notes
from bench.session import Plan, Session, installed
from bench.workloads import Lengths, Workload
from brigade.spec.config import BadConfig, read_spec

TABLE_WIDTH = 130
"""The table is of no use when it is cut: a narrower terminal wraps its lines."""


def main(args: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 1 if nothing could be measured, 2 for options that cannot work."""
    options = parser().parse_args(args)
    try:
        plan = make_plan(options)
    except (BadConfig, ValueError, OSError) as e:
        print(e, file=sys.stderr)
        return 2
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.width = max(console.width, TABLE_WIDTH)
    session = Session(plan, lambda s: console.print(progress(s)), lambda p: console.print(p, style="red"))
    try:
        session.run()
    except KeyboardInterrupt:
        console.print("stopped; this is what was measured until then")
    if not session.samples:
        return 1
    record = session.record()
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(as_markdown(session.lines(), record))
    console.print(as_table(session.lines()))
    for note in session_notes(record):
        console.print(note)
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    p = argparse.ArgumentParser(prog="bench.peers", description=(__doc__ or "").splitlines()[0])
    p.add_argument("checkpoint", type=Path)
    p.add_argument("--venvs", type=Path, help="folder with a folder for each peer; default: only Brigade")
    p.add_argument("--engines", type=_words, help="only these, by name and in this order; default: all that are found")
    p.add_argument("--precisions", type=_words, default=["bf16"], help="some of bf16,int8,int4; default: bf16")
    p.add_argument("--concurrency", type=_numbers, default=[1, 8, 32, 128], help="of the decode workloads; '' for none")
    p.add_argument("--prefill", type=_numbers, default=[512, 4096], help="prompt tokens; '' for none")
    p.add_argument("--http", type=_numbers, default=[], help="requests in flight of the HTTP workloads; default: none")
    p.add_argument("--input-len", type=int, default=Lengths().n_in, help="of decode and HTTP; default: %(default)s")
    p.add_argument("--output-len", type=int, default=Lengths().n_out, help="of decode and HTTP; default: %(default)s")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all (%(default)s)")
    p.add_argument("--set", action="append", default=[], metavar="ENGINE:JSON", help="settings of one engine's own")
    p.add_argument("--quiet", type=float, default=0.0, help="seconds to wait for a quiet machine before each turn")
    p.add_argument("--timeout", type=float, default=900.0, help="seconds that one load or one job may take")
    p.add_argument("--logs", type=Path, default=Path("/tmp/brigade-peers"), help="folder for what the engines print")
    p.add_argument("--json", type=Path, help="file for every number")
    p.add_argument("--markdown", type=Path, help="file for the table of the docs")
    return p


def make_plan(options: argparse.Namespace) -> Plan:
    """Check the options against what is there. Raises BadConfig, ValueError and OSError."""
    found = {engine.name: engine for engine in installed(options.venvs)}
    names = options.engines or list(found)
    if unknown := [name for name in names if name not in found]:
        raise ValueError(f"--engines: {', '.join(unknown)} not found; there are {', '.join(found)}")
    spec = read_spec(options.checkpoint)
    sizes = {"decode": options.concurrency, "prefill": options.prefill, "http": options.http}
    longest = max([options.input_len + options.output_len, *(n + 1 for n in options.prefill)])
    if longest > spec.context:
        raise ValueError(f"a workload needs {longest} positions, but the model has {spec.context}")
    options.logs.mkdir(parents=True, exist_ok=True)
    return Plan(
        checkpoint=options.checkpoint.absolute(),
        spec=spec,
        engines=[found[name] for name in names],
        precisions=options.precisions,
        workloads=[Workload(kind, n) for kind, all_n in sizes.items() for n in all_n],  # type: ignore[arg-type]
        lengths=Lengths(options.input_len, options.output_len),
        rounds=options.rounds,
        threads=options.threads,
        logs=options.logs.absolute(),
        settings=dict(_setting(text) for text in options.set),
        timeout=options.timeout,
        quiet=options.quiet,
    )


def progress(s: Sample) -> str:
    """One sample in one line."""
    return (
        f"round {s.round + 1}  {s.engine} {s.precision}  {s.workload.name}: {s.tokens_per_second:.1f} tok/s, "
        f"TTFT {s.ttft:.3f} s, {s.usage.own_cores:.2f} cores, others {s.usage.other_cores:.2f}, "
        f"load {s.usage.load_average:.2f}"
    )


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _numbers(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


def _setting(text: str) -> tuple[str, dict[str, Any]]:
    name, colon, values = text.partition(":")
    if not colon or not isinstance(parsed := json.loads(values), dict):
        raise ValueError(f"--set {text}: must be an engine's name, a colon and a JSON object")
    return name, parsed


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended from outside: end what was started, show the rest
    sys.exit(main())
