"""<think>...</think> is cut out of an answer, wherever the pieces of a stream happen to be cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brigade.serve.reasoning import Splitter


def split(text: str, inside: bool, cuts: list[int]) -> tuple[str, str]:
    splitter = Splitter(inside)
    places = [0, *sorted(cuts), len(text)]
    parts = [splitter.push(text[a:b]) for a, b in pairwise(places)]
    parts.append(splitter.flush())
    return "".join(p[0] for p in parts), "".join(p[1] for p in parts)


CASES = [
    ("Just an answer.", False, "", "Just an answer."),
    ("<think>Hm.</think>Yes.", False, "Hm.", "Yes."),
    ("\n <think>\nHm.\n</think>\n\nYes.\n", False, "Hm.\n", "Yes.\n"),
    ("Hm.</think>\n\nYes.", True, "Hm.", "Yes."),
    ("Hm, for ever", True, "Hm, for ever", ""),
    ("<think>cut sho", False, "cut sho", ""),
    ("a </thin b </think> c </think> d", True, "a </thin b ", " c </think> d"),
    ("Yes <think>not at the start</think>", False, "", "Yes <think>not at the start</think>"),
    ("<thin", False, "", "<thin"),
    ("<thinker>", False, "", "<thinker>"),
    ("almost</thi", True, "almost</thi", ""),
    ("</think>", True, "", ""),
    ("\n</think>\n\n", True, "", ""),
    ("", True, "", ""),
    ("", False, "", ""),
    ("  \n", False, "", "  \n"),
]


@pytest.mark.parametrize(("text", "inside", "reasoning", "content"), CASES)
def test_an_answer_is_cut_at_its_tags(text: str, inside: bool, reasoning: str, content: str) -> None:
    assert split(text, inside, []) == (reasoning, content)
    assert split(text, inside, list(range(len(text)))) == (reasoning, content)


@given(
    st.sampled_from(CASES),
    st.lists(st.integers(0, 40), max_size=8),
)
def test_where_a_stream_is_cut_changes_nothing(case: tuple[str, bool, str, str], cuts: list[int]) -> None:
    text, inside, reasoning, content = case
    assert split(text, inside, [min(cut, len(text)) for cut in cuts]) == (reasoning, content)


def test_text_that_cannot_be_a_tag_is_not_held_back() -> None:
    splitter = Splitter(inside=True)
    assert splitter.push("I think <") == ("I think ", "")
    assert splitter.push("b") == ("<b", "")
