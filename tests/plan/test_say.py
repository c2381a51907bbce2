"""Sentences in English and Chinese: nothing is left untranslated, and no value is lost on the way."""

import ast
import json
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from string import Formatter

import pytest

import brigade
from brigade.plan.ask import answer
from brigade.plan.html import report
from brigade.plan.models import find_model
from brigade.plan.quantity import servers
from brigade.plan.question import Question
from brigade.plan.rates import shipped
from brigade.plan.say import Say, say
from brigade.plan.units import Slo
from brigade.spec.work import OPS, PRECISIONS

ZH = json.loads((resources.files("brigade.plan") / "data/zh.json").read_text(encoding="utf-8"))
ROOT = Path(brigade.__file__).parent
C = shipped()


def templates() -> Iterator[str]:
    """Every literal that is said, and strings that are said by name."""
    for path in [*ROOT.glob("plan/*.py"), *ROOT.glob("cli/plan*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Name(id="say"), args=[ast.Constant(value=str(text)), *_]):
                    yield text
    yield from OPS
    yield from ("compute", "memory", "scale-up", "scale-out", "latency", "stages")


def fields(template: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(template) if name}


def test_everything_that_is_said_has_its_chinese() -> None:
    assert set(templates()) - set(ZH) == set()


def test_a_translation_has_the_values_of_its_english_but_for_the_plural() -> None:
    for template, chinese in ZH.items():
        assert fields(chinese) == fields(template) - {"s"}, template


def test_sentences_are_said_inside_sentences() -> None:
    inner = say("{n:g} node{s}", n=3, s="s")
    outer = say("{a} + {b}", a=inner, b=(inner, inner))
    assert str(outer) == "3 nodes + 3 nodes; 3 nodes"
    assert outer.to("zh") == "3 个节点 + 3 个节点；3 个节点"


def test_what_the_catalogue_lacks_is_an_error_not_english() -> None:
    with pytest.raises(KeyError):
        Say("nobody translated this").to("zh")


QUESTIONS = {
    "boxes": ("4 x 8 x H200", 60, {"api_price": 2.0, "night": 0.4}),
    "too many": ("4 x 8 x H800", 50_000, {"api_price": 0.01}),
    "two kinds": ("6 x 8 x H800 + 2 x 8 x H20", 300, {"night": 0.3, "engine": "sglang"}),
}
WORDS = re.compile(r"(?:[A-Za-z']{2,} ){3,}[A-Za-z']{2,}")


@pytest.mark.parametrize("name", QUESTIONS)
def test_no_english_sentence_is_left_in_the_chinese_report(name: str) -> None:
    fleet, users, more = QUESTIONS[name]
    q = Question(
        find_model("deepseek-v3"), servers(fleet), users, 4000, 1000, 0.56, Slo(0.05, 2.0), PRECISIONS["fp8"], "fp8",
        assumed=(say("1k tokens = 1000"),), **more,  # type: ignore[arg-type]
    )  # fmt: skip
    text = report(answer(q, C), C, "zh")
    shown = re.sub(r"<style>.*?</style>|<[^>]+>", "\n", text, flags=re.S)
    sources = ("AMX.md", "blog", "docs/", "systems/", "data sheet", "SGLang", "catalog", "day 6", "paper", "win on TCO")
    left = [line for line in shown.splitlines() if WORDS.search(line) and not any(s in line for s in sources)]
    assert left == []
