"""The layer that drafts says what a plain reading of its definition says, and no guess changes a token.

The reference is a layer of transformers: a checkpoint's last layer with experts serves as its multi-token-prediction
layer (DeepSeek-V3, arXiv:2412.19437, section 2.2), and the two norms, the projection and the head around it are spelled
out here.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from brigade.comm.group import PeerLost
from brigade.core.scheduler import Slice, StepPlan
from brigade.engine import auto
from brigade.engine.config import DEMO_MODEL, EngineConfig
from brigade.engine.machine import read_cpu
from brigade.engine.worker import Worker
from brigade.kernels.cpu.build import Built, find_library
from brigade.kernels.cpu.layers import Kernels
from brigade.model.batch import Batch, build
from brigade.model.cache import KvCache
from brigade.model.drafts import following
from brigade.model.on_cpu_kernels import CpuModel
from brigade.model.sampling import BROKEN, History, proceed
from brigade.model.weights import Checkpoint
from brigade.spec.config import BadConfig, read_spec
from brigade.spec.sampling import SamplingParams
from tests.model import driving
from tests.model.checkpoints import MODELS, VOCAB
from tests.model.test_schedules import workload

KIND = "v3 with group-limited routing"
WIDE = "v3 with a wide latent"
GREEDY = SamplingParams(temperature=0)
Get = Callable[[str], Path]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def drafting(checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """drafting(kind) -> a checkpoint whose last layer drafts, and the transformers model that has it as a layer."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(kind: str) -> tuple[Path, Any]:
        if kind in made:
            return made[kind]
        source, model = checkpoint(kind)
        folder = tmp_path_factory.mktemp("drafting")
        config = json.loads((source / "config.json").read_text())
        n, dim = config["num_hidden_layers"] - 1, config["hidden_size"]
        (folder / "config.json").write_text(
            json.dumps({**config, "num_hidden_layers": n, "num_nextn_predict_layers": 1})
        )
        torch.manual_seed(4)
        more = {f"{name}.weight": torch.randn(dim) * 0.1 + 1 for name in ("enorm", "hnorm", "shared_head.norm")}
        more["eh_proj.weight"] = torch.randn(dim, 2 * dim) * (2 * dim) ** -0.5
        tensors = load_file(source / "model.safetensors")
        tensors |= {f"model.layers.{n}.{name}": t for name, t in more.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        made[kind] = folder, (model, more)
        return made[kind]

    return get


def on_kernels(folder: Path, kind: str = "bf16", n_pages: int = 64) -> Worker:
    library = find_library(read_cpu().features)
    if not isinstance(library, Built):
        pytest.skip(f"no C++ kernels: {library}")
    spec = read_spec(folder, 1)
    model = CpuModel(spec, Checkpoint(folder, spec).reader(torch.bfloat16), Kernels(library.path, 1), kind)  # type: ignore[arg-type]
    model.attach(KvCache(spec, n_pages, 8, torch.bfloat16), 512)
    return Worker(spec, model, 8, {})


@torch.inference_mode()
def expected(worker: Worker, tokens: list[int]) -> Tensor:
    """What the layer says at every position but the last, the text being known: logits of the tokens after next."""
    pages = tuple(range(worker.model.cache.layers.shape[1]))
    plan = StepPlan((Slice(0, tuple(tokens[:-1]), 0, pages[: -(-len(tokens) // worker.page)], True),))
    batch = build(plan, worker.page, {})
    ahead, rows = following(batch, worker.page, {0: History(GREEDY, tokens)})
    assert rows is None
    every_row = replace(ahead, sample_R=torch.arange(len(tokens) - 1))
    return worker.model.draft([every_row], worker.model.trunk(batch))  # type: ignore[union-attr]


@torch.no_grad()
def by_definition(model: Any, more: dict[str, Tensor], tokens: list[int]) -> Tensor:
    ids, n = torch.tensor([tokens]), model.config.num_hidden_layers - 1
    eps = model.config.rms_norm_eps
    hidden = model.model(ids[:, :-1], output_hidden_states=True).hidden_states[n]  # before the last layer

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], weight, eps)

    here = norm(norm(hidden, model.model.norm.weight), more["hnorm.weight"])
    after = norm(model.model.embed_tokens(ids[:, 1:]), more["enorm.weight"])
    x = functional.linear(torch.cat([after, here], -1), more["eh_proj.weight"])
    position = torch.arange(x.shape[1])[None]
    mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)[None, None]
    x = model.model.layers[n](
        x, attention_mask=mask, position_ids=position, position_embeddings=model.model.rotary_emb(x, position)
    )
    x = x[0] if isinstance(x, tuple) else x
    return model.lm_head(norm(x, more["shared_head.norm.weight"]))[0]


@pytest.mark.parametrize("kind", [KIND, "v3 without q_lora", "v3 with two shared experts"])
def test_the_layer_is_that_of_its_definition(drafting, kind: str) -> None:
    kind = next(k for k in MODELS if k.startswith(kind))
    folder, (model, more) = drafting(kind)
    rng = random.Random(3)
    tokens = [rng.randrange(VOCAB) for _ in range(60)]
    want = by_definition(model, more, tokens)
    got = expected(driving.load(folder, drafts=1), tokens)
    assert (got - want).abs().max() < 1e-4
    assert want.std() > 0.3
    ours = expected(on_kernels(folder), tokens)
    off = (ours - want).norm(dim=-1) / want.norm(dim=-1)
    assert float(off.median()) < 0.06  # seen: 0.02 to 0.04, after four layers and two gates that rounding may turn


@pytest.mark.parametrize("model", ["demo", "two forms"])
@pytest.mark.parametrize("load", [partial(driving.load, drafts=1), on_kernels], ids=["torch", "kernels"])
def test_guesses_change_no_text_in_any_schedule(drafting, load: Callable[..., Worker], model: str) -> None:
    worker, rng = load(Path(DEMO_MODEL) if model == "demo" else drafting(WIDE)[0]), random.Random(len(model))
    without = replace(worker, spec=replace(worker.spec, drafting=False))
    for seed in (1, 2, 3):
        prompts, lengths = workload(rng)
        for params in (GREEDY, SamplingParams(temperature=0.8, top_p=0.9, seed=seed, presence_penalty=0.5)):
            want = driving.generate(without, prompts, lengths, params=params).texts
            eos = rng.choice([t for text in want for t in text])
            want = [text[: text.index(eos) + 1] if eos in text else text for text in want]
            limits = {
                "max_step_tokens": rng.choice((3, 8, 31, 64)),
                "n_pages": rng.choice((9, 11, 40)),
                "max_running": rng.randint(1, 8),
                "arrive_every": rng.choice((0, 1, 3)),
            }
            got = driving.generate(worker, prompts, lengths, params=params, stop_ids=frozenset({eos}), **limits)
            assert got.texts == want, limits
            assert got.scheduler.n_drafted > 0


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_what_is_accepted_is_what_the_layer_says_about_the_whole_text(kind: str) -> None:
    """However a prompt is cut and however far each step comes: so its cache holds what it should."""
    worker = on_kernels(Path(DEMO_MODEL), kind)
    prompt = [400 + i for i in range(37)]
    for limits in ({}, {"max_step_tokens": 5}):
        served = driving.generate(worker, [prompt], [60], **limits)
        tokens = [*prompt, *served.texts[0]]
        guesses = expected(worker, tokens).argmax(-1).tolist()
        at, n_accepted, n_drafted = len(prompt) + 1, 0, 0
        while at < len(tokens):  # a step: the token at `at` is the first that it gives
            if at < len(tokens) - 1:
                n_drafted += 1
                if guesses[at - 2] == tokens[at]:
                    n_accepted += 1
                    at += 1
            at += 1
        assert (served.scheduler.n_accepted, served.scheduler.n_drafted) == (n_accepted, n_drafted)
        assert n_accepted > 10


@pytest.mark.parametrize("temperature", [0, 0.6])
def test_two_of_three_guesses_of_the_demo_model_are_right(temperature: float) -> None:
    """A drawn token is guessed with the same noise that draws it: a guess from the most likely tokens alone would be
    right less often."""
    worker = on_kernels(Path(DEMO_MODEL), n_pages=120)
    rng = random.Random(5)
    prompts = [[1] + [rng.randrange(300, 900) for _ in range(5)] for _ in range(6)]
    served = driving.generate(
        worker, prompts, [60] * 6, n_pages=120, params=SamplingParams(temperature=temperature, seed=1)
    )
    rate = served.scheduler.n_accepted / served.scheduler.n_drafted
    assert rate > 0.5
    assert len({t for text in served.texts for t in text}) > 50  # no text that repeats itself


def test_a_step_that_is_lost_while_it_drafts_is_as_if_it_had_not_been_run() -> None:
    worker = driving.load(Path(DEMO_MODEL), drafts=1)
    worker.add(1, [1, 400, 401], GREEDY)
    prompt = StepPlan((Slice(1, (1, 400, 401), 0, (0,), True),))

    def lost(batches: list[Batch], hidden: list[Tensor]) -> Tensor:
        raise PeerLost([1], "was killed")

    draft, worker.model.draft = worker.model.draft, lost  # type: ignore[union-attr, method-assign]
    with pytest.raises(PeerLost):
        worker.run(prompt)
    history = worker.histories[1]
    assert (history.new, dict(history.counts), history.drafts) == ([], {}, ())
    worker.model.draft = draft  # type: ignore[union-attr, method-assign]
    [choice] = worker.run(prompt)[1]
    assert history.new == [choice.token]
    assert len(history.drafts) == 1


def test_a_broken_row_after_a_guess_ends_its_request_one_step_later() -> None:
    """As one at a time: the token before it is told first."""
    logits = torch.zeros(2, 5)
    logits[0, 3], logits[1, 0] = 9, torch.nan
    history = History(GREEDY, [1], drafts=(3,))
    [choices] = proceed(logits, [(history, 1)])
    assert [c.token for c in choices] == history.new == [3]
    [choices] = proceed(logits[1:], [(history, 0)])
    assert [c.token for c in choices] == [BROKEN]


def test_only_the_rows_whose_next_token_is_known_are_run() -> None:
    history = History(GREEDY, [5, 6, 7], new=[8, 9])
    plan = StepPlan((Slice(1, (8, 0), 3, (0,), True), Slice(2, (1, 2), 0, (1,), False)))
    batch = replace(build(plan, 8, {}), rids=[1])
    ahead, rows = following(batch, 8, {1: history, 2: History(GREEDY, [1, 2, 3, 4])})
    assert rows is not None
    assert rows.tolist() == [0, 2, 3]
    assert ahead.ids_T.tolist() == [9, 2, 3]
    assert ahead.positions_T.tolist() == [3, 0, 1]
    assert ahead.sample_R.tolist() == [0]


def test_without_drafts_the_layer_is_neither_read_nor_cached() -> None:
    settings = {"kv_bytes": 1 << 22, "threads": 1}
    without, with_drafts = (
        Worker.load(EngineConfig(drafts=n, **settings), auto.this_machine(), lambda done, total: None)[0]  # type: ignore[arg-type]
        for n in (0, 1)
    )
    assert with_drafts.model.cache.layers.shape[0] == without.model.cache.layers.shape[0] + 1
    assert without.spec.n_blocks == without.spec.n_layers
    assert not isinstance(without.model, CpuModel) or without.model.drafts is None


def test_a_model_without_the_layer_is_refused_with_what_to_do(checkpoint, tmp_path: Path) -> None:
    folder, _ = checkpoint("llama")
    with pytest.raises(BadConfig, match=r"no multi-token-prediction layer .* leave drafts at 0"):
        read_spec(folder, 1)
    (tmp_path / "config.json").write_text((Path(DEMO_MODEL) / "config.json").read_text())
    tensors = load_file(Path(DEMO_MODEL) / "model.safetensors")
    del tensors["model.layers.4.eh_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    Checkpoint(tmp_path, read_spec(tmp_path))
    with pytest.raises(BadConfig, match=r"'model.layers.4.eh_proj.weight' is in none"):
        Checkpoint(tmp_path, read_spec(tmp_path, 1))
