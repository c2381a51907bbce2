"""Runs step plans in order: owns the model, the cache and what sampling remembers. Must not decide what runs."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from brigade.comm.group import PeerLost
from brigade.comm.segment import FIRST_GENERATION, Segment
from brigade.comm.wire import Wire, wire
from brigade.core.overlap import cut
from brigade.core.placement import Placement
from brigade.core.scheduler import Slice, StepPlan
from brigade.engine import auto
from brigade.engine.config import EngineConfig
from brigade.engine.machine import read_cpu
from brigade.engine.messages import Form, Loads
from brigade.engine.moving import Mover
from brigade.engine.placing import first_placement
from brigade.engine.unit_rank import UnitRank
from brigade.kernels.cpu.build import Buildable, Built, find_library, look_up
from brigade.kernels.cpu.layers import Kernels, unsupported
from brigade.kernels.cpu.wire import TileCodec
from brigade.model.batch import Batch, build
from brigade.model.cache import KvCache
from brigade.model.deepseek import DeepSeek
from brigade.model.dense import Dense
from brigade.model.drafts import following
from brigade.model.on_cpu_kernels import CpuModel
from brigade.model.reread import ExpertFiles
from brigade.model.sampling import BROKEN, Choice, History, draw, proceed
from brigade.model.spread import Spread
from brigade.model.weights import Checkpoint
from brigade.spec.config import read_spec
from brigade.spec.model import ModelSpec
from brigade.spec.sampling import SamplingParams

log = logging.getLogger("brigade.worker")

Model = DeepSeek | Dense | CpuModel
Wrote = Callable[[Sequence[Slice], int], None]
"""Called with slices of a step and a layer: the cache rows of these slices are written in this layer."""
MODELS: dict[str, type[DeepSeek] | type[Dense]] = {
    "DeepseekV3ForCausalLM": DeepSeek,
    "LlamaForCausalLM": Dense,
    "Qwen2ForCausalLM": Dense,
}


@dataclass
class Worker:
    """One rank's model. Its methods are called in plan order, from one thread at a time."""

    spec: ModelSpec
    model: Model
    page: int
    histories: dict[int, History]
    dtype: str = "bfloat16"
    """Of activations and cache."""
    arithmetic: str = ""
    """What decides how results are rounded: the library with its kind of weights, or torch's version and code path."""
    kv_file: int = -1
    """Shared memory for the cache, if others are to read it."""
    notes: list[str] = field(default_factory=list)
    """What "auto" settings became while loading, and why."""
    mover: Mover | None = None
    """What exchanges experts while this rank serves; None where all of them are here."""
    wire: Wire | None = None
    """How rows reach their experts, if they take that way."""

    @classmethod
    def load(
        cls, config: EngineConfig, machine: auto.Machine, progress: Callable[[int, int], None]
    ) -> tuple["Worker", auto.Resolved]:
        """A worker that runs alone: weights and cache. Raises BadConfig (also for tensor files), ValueError and
        MemoryError."""
        spec = read_spec(Path(config.model), config.drafts)
        segment = -1
        if config.wire != "auto":
            segment = Segment.create(1, config.max_step_tokens, spec.dim, spec.moe.top_k if spec.moe else 1).fd
        unit = UnitRank(0, 1, segment, config.rank_deadline)
        worker = cls.read(config, machine, progress, unit)
        resolved = worker.make_cache(config, auto.this_machine())
        unit.meet(Form(FIRST_GENERATION))
        worker.meet(unit)
        return worker, resolved

    @classmethod
    def read(
        cls,
        config: EngineConfig,
        machine: auto.Machine,
        progress: Callable[[int, int], None],
        unit: UnitRank,
        placement: Placement | None = None,
        portion: int = 0,
    ) -> "Worker":
        """Read what this rank holds of the checkpoint. `machine`: this rank's part of it. Raises as `load` does.

        `placement`: of the experts, if not as at the first start; `portion`: the last one of moves that it includes.
        Before it runs anything it needs a cache and, in a unit of several ranks, the others.
        """
        folder = Path(config.model)
        spec = read_spec(folder, config.drafts)
        if config.wire != "auto" and spec.moe is None:
            raise ValueError(f"wire {config.wire} is for rows of routed experts; this model has none, leave it at auto")
        if config.micro_batches == 2 and spec.moe is None:
            raise ValueError("micro_batches is 2, but this model has no routed experts to reach; leave it at 0 or 1")
        travels = unit.size > 1 or config.wire != "auto"
        placement = (placement or first_placement(config, spec)) if travels else None
        checkpoint = Checkpoint(folder, spec, _experts(placement, unit.rank) if placement else None)
        library, why_not = _kernels(config, spec)
        computing = auto.computing(config, spec, machine, library, why_not)
        threads, threads_note = auto.threads(config, spec, machine, computing)
        total = checkpoint.n_bytes()
        progress(0, total)
        dtype = getattr(torch, computing.dtype)
        model = _read(checkpoint, spec, dtype, computing, threads, lambda done: progress(done, total))
        mover, way = None, None
        if placement and not isinstance(model, Dense):
            way = _wire(config, spec, model, dtype)
            spread = model.spread = Spread(spec, unit.rank, placement)
            if unit.size > 1:
                files = ExpertFiles(checkpoint, dtype)
                mover = Mover(model, spread, files, unit.rank, placement, portion, spec.n_dense)
        notes = [computing.note, threads_note]
        if spec.drafting:
            notes.append(f"drafts {config.drafts}: model.layers.{spec.n_layers} guesses, the next step checks")
        return cls(
            spec, model, config.page, {}, computing.dtype, _arithmetic(computing), notes=notes, mover=mover, wire=way
        )

    def make_cache(self, config: EngineConfig, machine: auto.Machine) -> auto.Resolved:
        """Make the cache from what the weights leave free. Raises ValueError, MemoryError."""
        resolved = auto.resolve(config, self.spec, machine, self.dtype)
        cache = KvCache(self.spec, resolved.n_pages, config.page, getattr(torch, self.dtype), self.kv_file)
        self.model.attach(cache, resolved.max_context)
        resolved.notes[:0] = self.notes
        return resolved

    def meet(self, unit: UnitRank) -> None:
        """Reach the experts of other ranks through the unit, which has just formed."""
        exchange = unit.exchange(self.spec, self.wire) if self.wire else None
        if exchange is None:
            return
        if isinstance(self.model, Dense) or self.model.spread is None:
            raise TypeError("a dense model has no experts to spread")
        self.model.spread.exchange = exchange

    def add(self, rid: int, prompt: list[int], params: SamplingParams, new: Sequence[int] = ()) -> None:
        """`new`: tokens that were generated elsewhere."""
        history = self.histories[rid] = History(params, prompt)
        for token in new:
            history.append(token)

    def forget(self, rid: int) -> None:
        self.histories.pop(rid, None)

    def warm_up(self) -> None:
        """Run one token, so that the first request does not pay for first-call set-up, and a broken model shows now."""
        self.add(-1, [0], SamplingParams(temperature=0))
        try:
            [choice] = self.run(StepPlan((Slice(-1, (0,), 0, (0,), True),)))[-1]
        finally:
            self.forget(-1)
        if choice.token == BROKEN:
            raise ValueError("the model computes numbers that are not finite; try --dtype float32 or bfloat16")

    def loads(self, seq: int) -> Loads:
        """How often this rank's tokens asked for which expert since the last time. From any one thread."""
        if isinstance(self.model, Dense) or self.model.spread is None:
            raise TypeError("a dense model has no experts")
        return Loads(seq, *self.model.spread.news())

    @torch.inference_mode()
    def run(self, plan: StepPlan, n: int = 1, wrote: Wrote | None = None) -> dict[int, list[Choice]]:
        """Run one step, in n micro-batches, and sample; then guess what comes next, where the model drafts. The last
        token of a request may be needed by the very next step.

        Gives the tokens of each request: one, and one more for each guess that was right. Raises PeerLost, after which
        it is as if the step had not been run. `wrote` is called after each layer's attention, from this thread.
        """
        laps = self.model.laps
        laps.begin()
        histories = [(s, self.histories[s.rid]) for s in plan.slices]
        last = {s.rid: h.new[-1] for s, h in histories if h.new}
        drafts = {s.rid: h.drafts for s, h in histories}
        batches = [
            build(part, self.page, last, drafts, partial(wrote, part.slices) if wrote else None)
            for part in cut(plan, n)
        ]
        laps.end("batch")
        sampled = {s.rid: (h, s.n_drafts) for s, h in histories if s.sample}
        if not self.spec.drafting or isinstance(self.model, Dense):
            chosen = proceed(self.model.forward(*batches), [*sampled.values()])
            laps.end("sampling")
            return dict(zip(sampled, chosen, strict=True))
        hidden = self.model.trunk(*batches)
        new = dict(zip(sampled, proceed(self.model.logits(batches, hidden), [*sampled.values()]), strict=True))
        laps.end("sampling")
        try:
            self._draft(self.model, batches, hidden)
        except PeerLost:
            for rid, choices in new.items():
                self.histories[rid].take_back(len(choices))
            raise
        laps.end("drafting")
        return new

    def _draft(self, model: DeepSeek | CpuModel, batches: list[Batch], hidden: list[Tensor]) -> None:
        """Guess the token after the last one of each request that has just got one. All ranks of a unit come here in
        every step, with or without rows: the layer that drafts has experts, too."""
        ahead = [following(batch, self.page, self.histories) for batch in batches]
        rows = [x_TD if kept is None else x_TD[kept] for (_, kept), x_TD in zip(ahead, hidden, strict=True)]
        histories = [self.histories[rid] for batch, _ in ahead for rid in batch.rids]
        guesses = draw(model.draft([batch for batch, _ in ahead], rows), histories)
        for history, guess in zip(histories, guesses, strict=True):
            history.drafts = (max(guess, 0),)


def _wire(config: EngineConfig, spec: ModelSpec, model: Model, dtype: torch.dtype) -> Wire:
    """How rows reach experts. Raises ValueError for a type that cannot travel.

    A unit of one rank has no wire, but where a wire rounds, it rounds too: text must not depend on the number of ranks.
    """
    codec = None
    if isinstance(model, CpuModel) and (config.wire == "int8" or config.wire == "fp8"):
        codec = TileCodec(model.kernels, config.wire)
    return wire(config.wire, spec.dim, dtype, codec)


def _arithmetic(computing: auto.Computing) -> str:
    if computing.library is None:
        return f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()} {computing.dtype}"
    return f"{computing.library.name} {computing.kind}"


def _experts(placement: Placement, rank: int) -> list[tuple[int, ...]]:
    """For each layer with routed experts, those that this rank's slots hold."""
    mine = placement.slots_of_rank[rank]
    return [slots[mine.start : mine.stop] for slots in placement.phy2log]


def stop_ids(spec: ModelSpec, params: SamplingParams) -> frozenset[int]:
    """Tokens that end a request."""
    return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(spec.eos_ids))


def _kernels(config: EngineConfig, spec: ModelSpec) -> tuple[Path | None, str]:
    """The library of C++ kernels, built now if need be, or why it is not used."""
    if config.dtype not in ("auto", "bfloat16"):
        return None, ""
    if why_not := unsupported(spec):
        return None, f"the C++ kernels do not serve this model: {why_not}"
    features = read_cpu().features
    if isinstance(found := look_up(features), Buildable):
        log.warning("building the C++ kernels with %s; this happens once and takes about 20 s", found.compiler.name)
    library = find_library(features)
    if not isinstance(library, Built):
        return None, str(library)
    for note in library.notes:
        log.warning(note)
    return library.path, ""


def _read(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    dtype: torch.dtype,
    computing: auto.Computing,
    threads: int,
    progress: Callable[[int], None],
) -> Model:
    if computing.library is None or computing.kind is None:
        torch.set_num_threads(threads)
        return MODELS[spec.architecture](spec, checkpoint.load(dtype, progress))
    torch.set_num_threads(1)  # the kernels' own threads do the work
    kernels = Kernels(computing.library, threads)
    return CpuModel(spec, checkpoint.reader(dtype, progress), kernels, computing.kind)
