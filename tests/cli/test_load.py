"""What a load test sends, and what its numbers mean."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brigade.cli.fault import Fault
from brigade.cli.load import Outcome, arrivals, percentile, read_calls, repeat, report, summary, synthetic


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentiles_are_numpys_linear_ones(values: list[float], q: float) -> None:
    assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)), rel=1e-9, abs=1e-6)


def test_percentiles_can_be_worked_out_by_hand() -> None:
    assert percentile([4, 1, 3, 2], 50) == 2.5
    assert percentile([10, 20], 90) == 19
    assert percentile([5], 99) == 5
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)
    assert summary([]) is None


def test_synthetic_prompts_have_the_asked_lengths_and_stay_in_the_safe_ids() -> None:
    calls = synthetic(5, input_len=12, output_len=9, vocab=103, seed=0)
    assert len(calls) == 5
    for call in calls:
        assert call.path == "/v1/completions"
        assert len(call.body["prompt"]) == 12
        assert set(call.body["prompt"]) <= {100, 101, 102}
        assert (call.body["max_tokens"], call.body["temperature"], call.body["ignore_eos"]) == (9, 0, True)


def test_a_seed_decides_the_prompts_and_the_arrivals() -> None:
    assert synthetic(3, 8, 1, 1000, seed=1) == synthetic(3, 8, 1, 1000, seed=1)
    assert synthetic(3, 8, 1, 1000, seed=1) != synthetic(3, 8, 1, 1000, seed=2)
    assert arrivals(9, 2.0, seed=1) == arrivals(9, 2.0, seed=1) != arrivals(9, 2.0, seed=2)


def test_arrivals_are_a_poisson_process_of_the_asked_rate() -> None:
    times = arrivals(20_001, rate=4.0, seed=0)
    gaps = np.diff(times)
    assert times[0] == 0
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.03)  # an exponential's deviation is its mean


def test_every_documented_shape_of_a_prompt_line_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "Once", "category": "x"}\n'
        '\n{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}\n'
        '{"turns": ["first\u2028line", "second"]}\n'
        '{"question": "why?", "answer": "42"}\n'
    )
    calls = read_calls(path, output_len=50)
    assert [c.path.rsplit("/", 2)[-2] for c in calls] == ["v1", "chat", "chat", "chat"]
    assert calls[0].body == {"prompt": "Once", "max_tokens": 50}
    assert calls[1].body == {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    assert calls[2].body["messages"] == [{"role": "user", "content": "first\u2028line"}]
    assert calls[3].body["messages"] == [{"role": "user", "content": "why?"}]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "{}",
        '{"prompt": ""}',
        '{"prompt": 3}',
        '{"prompt": "a", "question": "b"}',
        '{"messages": []}',
        '{"messages": ["hi"]}',
        '{"turns": []}',
        '{"turns": [1]}',
        '{"prompt": "a", "max_tokens": 0}',
        '{"prompt": "a", "max_tokens": true}',
    ],
)
def test_a_bad_line_is_an_error_that_names_file_and_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line + "\n")
    with pytest.raises(Fault, match=r"p\.jsonl, line 3: ") as e:
        read_calls(path, 1)
    assert e.value.code == 2


def test_a_file_without_prompts_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    for name, why in (("empty.jsonl", "no prompts"), ("gone.jsonl", "No such file"), ("latin.jsonl", "UTF-8")):
        with pytest.raises(Fault, match=why):
            read_calls(tmp_path / name, 1)


def test_prompts_start_over_when_they_run_out() -> None:
    a, b = synthetic(2, 1, 1, 1000, 0)
    assert repeat([a, b], 5) == [a, b, a, b, a]


def test_the_times_of_an_answer_follow_their_definitions() -> None:
    o = Outcome(due=10.0, end=12.0, marks=(10.5, 11.0, 11.75), n_in=4, n_out=6)
    assert (o.e2e, o.ttft, o.tpot, o.gaps) == (2.0, 0.5, 0.25, [0.5, 0.75])


def test_one_token_has_no_time_per_output_token_and_no_text_no_first_token() -> None:
    assert Outcome(due=0, end=1, marks=(0.5,), n_out=1).tpot is None
    assert Outcome(due=0, end=1, n_out=3).ttft is None


def test_a_report_counts_failures_by_kind_and_measures_complete_answers_only() -> None:
    good = [Outcome(due=i, end=i + 2.0, marks=(i + 1.0, i + 2.0), n_in=10, n_out=5, n_cached=8) for i in (0, 1)]
    bad = [
        Outcome(due=2, end=9, failure="HTTP 429", detail="later"),
        Outcome(due=2, end=3, failure="timeout", detail="first", marks=(2.5,), n_out=99),
        Outcome(due=2, end=10, failure="HTTP 429"),
    ]
    r = report([*good, *bad])
    assert (r["requests"], r["completed"], r["failed"], r["seconds"]) == (5, 2, 3, 10)
    assert r["failures"] == {"HTTP 429": 2, "timeout": 1}
    assert r["first_error"] == "first"
    assert (r["requests_per_second"], r["input_tokens_per_second"], r["output_tokens_per_second"]) == (0.2, 2.0, 1.0)
    assert (r["cached_input_tokens"], r["output_tokens_per_answer"]) == (16, 5)
    assert r["ttft"] == {"n": 2, "p50": 1.0, "p90": 1.0, "p99": 1.0, "mean": 1.0}
    assert r["tpot"]["p50"] == 0.25


def test_a_report_of_failures_alone_has_no_latency_and_does_not_divide_by_zero() -> None:
    r = report([Outcome(due=1, end=1, failure="no connection", detail="refused")])
    assert (r["ttft"], r["e2e"], r["output_tokens_per_second"]) == (None, None, 0.0)
