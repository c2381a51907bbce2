"""Stop strings: text is cut before the first one, however it arrives, and nothing certain is held back."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brigade.engine.stops import StopStrings

LETTERS = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Letter by letter: as soon as the text ends with a stop string, cut it off (the longest, if several end here)."""
    for end in range(1, len(text) + 1):
        hits = [s for s in stops if text[:end].endswith(s)]
        if hits:
            hit = max(hits, key=len)
            return text[: end - len(hit)], hit
    return text, None


def run(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    s = StopStrings(stops)
    out = "".join(s.push(p) for p in pieces) + s.flush()
    return out, s.hit


@given(LETTERS, STOPS)
def test_letter_by_letter_the_text_is_cut_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    assert run(stops, list(text)) == naive(text, stops)


@given(LETTERS, STOPS, st.lists(st.integers(0, 30), max_size=6))
def test_how_the_text_is_split_does_not_matter(text: str, stops: list[str], cuts: list[int]) -> None:
    edges = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert run(stops, pieces) == naive(text, stops)


@given(LETTERS, st.text("ab", min_size=1, max_size=4), st.lists(st.integers(0, 30), max_size=6))
def test_with_one_stop_string_the_text_is_what_partition_gives(text: str, stop: str, cuts: list[int]) -> None:
    edges = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    head, found, _ = text.partition(stop)
    assert run([stop], pieces) == (head, found or None)


@given(LETTERS, STOPS)
def test_only_what_may_begin_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    s = StopStrings(stops)
    out = s.push(text)
    held = text[len(out) :] if s.hit is None else ""
    assert held == "" or any(stop != held and stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(
    ("stops", "pieces", "want", "hit"),
    [
        (["END"], ["E", "N", "D"], "", "END"),
        (["END"], ["EEN", "ND", "END!"], "EENND", "END"),
        (["aab"], ["a", "a", "a", "b"], "a", "aab"),
        (["abab"], ["ab", "aab", "ab", "z"], "aba", "abab"),
        (["\n\n"], ["one\n", "two\n", "\nthree"], "one\ntwo", "\n\n"),
        (["b", "abc"], ["a", "b"], "a", "b"),
        (["bc", "abc"], ["a", "bc"], "", "abc"),
        (["né"], ["n", "é"], "", "né"),
        ([], ["anything"], "anything", None),
    ],
)
def test_overlaps(stops: list[str], pieces: list[str], want: str, hit: str | None) -> None:
    assert run(stops, pieces) == (want, hit)


def test_nothing_passes_after_a_hit() -> None:
    s = StopStrings(["x"])
    assert s.push("axb") == "a"
    assert (s.push("more"), s.flush(), s.hit) == ("", "", "x")
