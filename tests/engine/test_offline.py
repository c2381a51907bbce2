"""The offline API as a script would use it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from brigade import Brigade, SamplingParams
from brigade.engine.output import BadRequest, LoadError
from tests.engine.conftest import workers

ROOT = Path(__file__).parents[2]
STORY = "Once upon a time"
GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def model() -> Iterator[Brigade]:
    with Brigade(max_running=8, max_waiting=4) as model:
        yield model


def test_a_text_a_list_of_texts_and_lists_of_tokens_are_all_prompts(model: Brigade) -> None:
    ids = model.engine.tokenizer.encode(STORY)
    (want,) = model.generate(STORY, GREEDY)
    assert want.text
    assert (want.finish_reason, len(want.token_ids), want.n_prompt) == ("length", 12, len(ids))
    assert model.engine.tokenizer.decode(want.token_ids) == want.text
    assert 0 < want.timings.ttft <= want.timings.total
    for prompts in ([STORY], (STORY,), ids, tuple(ids), [ids], [STORY, ids], [tuple(ids)]):
        assert {c.text for c in model.generate(prompts, GREEDY)} == {want.text}
    assert model.generate([], GREEDY) == []


def test_answers_come_in_the_order_of_the_prompts_each_with_its_own_parameters(model: Brigade) -> None:
    sets = [SamplingParams(temperature=0, max_tokens=n) for n in (9, 1, 5)]
    got = model.generate([STORY, "The dog", "Lily"], sets)
    assert [len(c.token_ids) for c in got] == [9, 1, 5]
    assert got[2].text == model.generate("Lily", sets[2])[0].text


def test_n_answers_differ_and_repeat_with_their_seed(model: Brigade) -> None:
    params = SamplingParams(n=3, seed=5, max_tokens=12)
    got = [c.text for c in model.generate([STORY, "The dog"], params)]
    assert len(got) == 6
    assert len(set(got)) == 6
    assert [c.text for c in model.generate([STORY, "The dog"], params)] == got
    assert model.generate(STORY, SamplingParams(seed=6, max_tokens=12))[0].text == got[1]


def test_more_prompts_than_may_run_and_wait_are_all_answered(model: Brigade) -> None:
    texts = [c.text for c in model.generate([STORY, "The dog"] * 40, GREEDY)]
    assert texts == [c.text for c in model.generate([STORY, "The dog"], GREEDY)] * 40


@pytest.mark.parametrize(
    ("prompts", "params"),
    [
        ([STORY, "a\ud800"], GREEDY),
        ([STORY, []], GREEDY),
        ([STORY, [99999]], GREEDY),
        ([STORY, [5] * 2000], GREEDY),
        ([STORY, STORY], [GREEDY, SamplingParams(temperature=-1)]),
        (STORY, SamplingParams(n=0)),
        (STORY, SamplingParams(n=-1)),
        (STORY, SamplingParams(n=1 << 40)),
        (STORY, SamplingParams(stop="\n")),  # type: ignore[arg-type]
    ],
    ids=["surrogate", "empty", "unknown token", "too long", "temperature", "n=0", "n=-1", "huge n", "stop is a text"],
)
@pytest.mark.timeout(30)
def test_what_cannot_be_served_is_an_error_and_the_model_stays_usable(
    model: Brigade, prompts: Any, params: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = SamplingParams.choices

    def careful(self: SamplingParams) -> list[SamplingParams]:
        assert self.n < 1000, "this would fill the memory"
        return choices(self)

    monkeypatch.setattr(SamplingParams, "choices", careful)
    before = workers()
    with pytest.raises(BadRequest):
        model.generate(prompts, params)
    assert len(model.generate(STORY, GREEDY)[0].token_ids) == 12
    assert workers() == before


def test_a_list_of_texts_and_single_tokens_is_not_shortened_in_silence(model: Brigade) -> None:
    with pytest.raises((BadRequest, ValueError, TypeError)):
        model.generate([STORY, 5], GREEDY)  # type: ignore[list-item]


def test_as_many_parameter_sets_as_prompts_are_needed(model: Brigade) -> None:
    with pytest.raises(ValueError, match="2 prompts but 1"):
        model.generate([STORY, STORY], [GREEDY])


def test_closing_ends_the_worker_and_may_be_done_twice() -> None:
    before = workers()
    with Brigade() as model:
        assert len(workers() - before) == 1
        (got,) = model.generate(STORY, SamplingParams(temperature=0, max_tokens=3, logprobs=1))
        assert len(got.logprobs) == 3
    assert workers() == before
    model.close()


def test_a_model_that_cannot_be_loaded_leaves_nothing_behind(tmp_path: Path) -> None:
    before = workers()
    with pytest.raises(LoadError, match="nowhere"):
        Brigade(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="page"):
        Brigade(page=0)
    with pytest.raises(TypeError, match="pages"):
        Brigade(pages=5)
    assert workers() == before


def run_script(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


CODE = "from brigade import *; print(Brigade().generate('Once', SamplingParams(temperature=0, max_tokens=4))[0].text)"


def test_one_line_of_python_needs_no_main_guard_and_no_closing(tmp_path: Path) -> None:
    done = run_script("-c", CODE, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


def test_files_in_the_current_folder_are_not_run_by_the_worker(tmp_path: Path) -> None:
    """A script elsewhere, started in a folder that happens to hold a module of the same name as one of ours."""
    scripts, here = tmp_path / "scripts", tmp_path / "here"
    scripts.mkdir()
    here.mkdir()
    (scripts / "story.py").write_text(CODE)
    (here / "psutil.py").write_text("raise SystemExit('the current folder is not to be imported from')")
    done = run_script(str(scripts / "story.py"), cwd=here)
    assert done.returncode == 0, done.stderr[-500:]
