"""One session: every engine in turn on the same work, and what came of it. Must not parse options or write files."""

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.child import Child, ChildFailed, JobRefused
from bench.engines import brigade, llama_cpp, transformers, vllm
from bench.engines.wire import Options
from bench.limits import Limits, measure_apart
from bench.report import US, Line, Sample, lines
from bench.roofline import decode_limit, prefill_limit
from bench.servers import Server, free_port, load_test
from bench.usage import Usage, Watch, wait_for_quiet
from bench.workloads import Lengths, Workload, prompts
from brigade.cli.machine import describe
from brigade.spec.model import ModelSpec
from brigade.spec.params import active, count

ADAPTERS: dict[str, ModuleType] = {US: brigade, "transformers": transformers, "vllm": vllm, "llama.cpp": llama_cpp}
PREFILL_SAMPLES = 3
HTTP_REQUESTS_EACH = 2
"""Requests of an HTTP test for each one in flight."""
WARM_OUT = 4
QUIET = 0.15
"""Busy cores below which the machine counts as quiet."""
MARGIN = 16
"""Positions that an engine may want beyond prompt and output."""


@dataclass(frozen=True)
class Installed:
    """One engine that can be measured."""

    name: str
    adapter: ModuleType
    venv: Path


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a session measures."""

    checkpoint: Path
    spec: ModelSpec
    engines: Sequence[Installed]
    precisions: Sequence[str]
    workloads: Sequence[Workload]
    lengths: Lengths
    rounds: int
    threads: int
    logs: Path
    """Folder for what the engines print."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of the engines' own, by engine."""
    timeout: float = 900.0
    """Seconds for one load or one job."""
    quiet: float = 0.0
    """Seconds to wait, at most, for a quiet machine before each turn."""

    @property
    def offline(self) -> list[Workload]:
        return [w for w in self.workloads if w.kind != "http"]

    @property
    def served(self) -> list[Workload]:
        return [w for w in self.workloads if w.kind == "http"]


class Session:
    """Runs a plan. What it has measured so far can be read at any time."""

    def __init__(self, plan: Plan, on_sample: Callable[[Sample], None], on_problem: Callable[[str], None]) -> None:
        self.plan = plan
        self.samples: list[Sample] = []
        self.limits: list[Limits] = []
        self.facts: dict[str, dict[str, Any]] = {}
        self.problems: list[str] = []
        self._on_sample, self._on_problem = on_sample, on_problem

    def run(self) -> None:
        """Every round of every precision and engine: A B A B."""
        for number in range(self.plan.rounds):
            for precision in self.plan.precisions:
                for engine in self.plan.engines:
                    if precision in engine.adapter.PRECISIONS:
                        self._turn(engine, precision, number)

    def median_limits(self) -> Limits:
        """The machine's limits over the whole session."""
        return replace(
            self.limits[0],
            cache_line_ns=None,
            read_gbs=statistics.median(x.read_gbs for x in self.limits),
            bf16_gflops=statistics.median(x.bf16_gflops for x in self.limits),
            int8_gops=statistics.median(x.int8_gops for x in self.limits),
        )

    def lines(self) -> list[Line]:
        """What was measured so far, beside its limits."""
        return lines(self.samples)

    def record(self) -> dict[str, Any]:
        """Everything, as plain values."""
        spec = self.plan.spec
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe(),
            "model": f"{spec.architecture}, {count(spec) / 1e9:.3f} B parameters, {active(spec) / 1e9:.3f} B active",
            "threads": self.plan.threads,
            "rounds": self.plan.rounds,
            "lengths": asdict(self.plan.lengths),
            "limits": asdict(self.median_limits()),
            "all_limits": [asdict(x) for x in self.limits],
            "engines": self.facts,
            "problems": self.problems,
            "samples": [asdict(s) for s in self.samples],
            "lines": [asdict(x) | {"brigade_ratio": x.brigade_ratio} for x in self.lines()],
        }

    def _limit(self, workload: Workload, precision: str) -> float:
        spec, lengths, limits = self.plan.spec, self.plan.lengths, self.limits[-1]
        if workload.kind == "prefill":
            return prefill_limit(spec, limits, precision, workload.size)
        decode = decode_limit(spec, limits, precision, workload.size, lengths.context)
        if workload.kind == "decode":
            return decode
        # every output token costs its part of a decode step and of its prompt
        prefill = prefill_limit(spec, limits, precision, lengths.n_in)
        return 1 / (1 / decode + lengths.n_in / lengths.n_out / prefill)

    def _turn(self, engine: Installed, precision: str, number: int) -> None:
        wait_for_quiet(QUIET, self.plan.quiet)
        self.limits.append(measure_apart(self.plan.threads))
        try:
            if self.plan.offline:
                self._offline(engine, precision, number)
            for workload in self.plan.served if hasattr(engine.adapter, "server") else ():
                self._served(engine, precision, workload, number)
        except (ChildFailed, ValueError) as e:
            self._trouble(f"{engine.name} {precision}: {e}")

    def _offline(self, engine: Installed, precision: str, number: int) -> None:
        options = self._options(engine, precision, self.plan.offline)
        command = [engine.adapter.python(options), "-m", engine.adapter.__name__, options.to_json()]
        with Child(command, engine.adapter.environment(options), self._log(engine, precision)) as child:
            self.facts[f"{engine.name} {precision}"] = child.ready(self.plan.timeout)
            for workload in self.plan.offline:
                try:
                    rate, ttft, usage = self._ask(child, workload, number)
                    self._keep(engine, precision, workload, number, rate, ttft, usage)
                except JobRefused as e:
                    self._trouble(f"{engine.name} {precision}, {workload.name}: {e}")

    def _ask(self, child: Child, workload: Workload, number: int) -> tuple[float, float, Usage]:
        """Tokens/s and TTFT of one workload, done once before as a warm-up with other prompts."""
        lengths, vocab = self.plan.lengths, self.plan.spec.vocab
        decodes = workload.kind == "decode"
        n, length = (workload.size, lengths.n_in) if decodes else (PREFILL_SAMPLES, workload.size)
        seed = f"{workload.name} {number}"
        warm = {"job": "warm", "prompts": prompts(f"warm {seed}", n if decodes else 1, length, vocab)}
        job = {"job": workload.kind, "prompts": prompts(seed, n, length, vocab), "n_out": lengths.n_out}
        child.ask(warm, self.plan.timeout)
        watch = Watch()
        result = child.ask(job, self.plan.timeout)
        usage = watch.usage()
        if decodes:
            return result["tokens_per_second"], result["ttft"], usage
        ttft = statistics.median(result["seconds"])
        return length / ttft, ttft, usage

    def _served(self, engine: Installed, precision: str, workload: Workload, number: int) -> None:
        options, port, n = self._options(engine, precision, [workload]), free_port(), workload.size
        lengths, vocab = self.plan.lengths, self.plan.spec.vocab
        command, environment = engine.adapter.server(options, port), engine.adapter.environment(options)
        with Server(command, environment, port, self._log(engine, precision)) as server:
            server.wait(self.plan.timeout)
            load_test(server.url, n, n, replace(lengths, n_out=WARM_OUT), vocab, seed=1000 + number)
            watch = Watch()
            numbers = load_test(server.url, n, n * HTTP_REQUESTS_EACH, lengths, vocab, seed=number)
            usage = watch.usage()
        rate, ttft = numbers["output_tokens_per_second"], numbers["ttft"]["p50"]
        self._keep(engine, precision, workload, number, rate, ttft, usage)
        if numbers["failed"]:
            self._trouble(
                f"{engine.name} {precision}, {workload.name}: {numbers['failed']} failed, {numbers['first_error']}"
            )

    def _keep(
        self,
        engine: Installed,
        precision: str,
        workload: Workload,
        number: int,
        tokens_per_second: float,
        ttft: float,
        usage: Usage,
    ) -> None:
        limit = self._limit(workload, precision)
        sample = Sample(engine.name, precision, workload, number, tokens_per_second, ttft, limit, usage)
        self.samples.append(sample)
        self._on_sample(sample)

    def _trouble(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)
            self._on_problem(problem)

    def _options(self, engine: Installed, precision: str, workloads: Sequence[Workload]) -> Options:
        lengths = self.plan.lengths
        longest = max([lengths.n_in, *(w.size for w in workloads if w.kind == "prefill")])
        return Options(
            checkpoint=str(self.plan.checkpoint),
            venv=str(engine.venv),
            precision=precision,
            threads=self.plan.threads,
            max_concurrency=max([1, *(w.size for w in workloads if w.kind != "prefill")]),
            max_context=longest + lengths.n_out + MARGIN,
            settings=self.plan.settings.get(engine.name, {}),
        )

    def _log(self, engine: Installed, precision: str) -> Path:
        return self.plan.logs / f"{engine.name}-{precision}.log"


def installed(venvs: Path | None) -> Iterator[Installed]:
    """Brigade, and the peers below `venvs`, in the order of their names."""
    yield Installed(US, ADAPTERS[US], Path(sys.prefix))
    for folder in sorted(venvs.iterdir()) if venvs else ():
        adapter = folder.name.split("-")[0]
        if adapter != US and adapter in ADAPTERS and (folder / "bin").is_dir():
            yield Installed(folder.name, ADAPTERS[adapter], folder)
