"""Code that runs too long is ended, in any frame, and nothing is left switched on."""

import contextlib
import sys
import time

import pytest

from brigade.engine.config import DEMO_MODEL
from brigade.engine.output import BadRequest
from brigade.engine.tokenizer import Tokenizer
from brigade.serve.chat_template import ChatTemplate
from brigade.serve.config import ConfigError
from brigade.serve.deadline import Alarm, Deadline, TooSlow
from brigade.serve.schema import Message

TOKENIZER = Tokenizer(DEMO_MODEL)


def spin() -> None:
    while True:
        pass


def test_an_endless_loop_ends() -> None:
    began = time.monotonic()
    with pytest.raises(TooSlow, match=r"0\.1 s"), Deadline(0.1):
        spin()
    assert time.monotonic() - began < 1
    assert sys.gettrace() is None


def test_quick_code_is_left_alone() -> None:
    with Deadline(10):
        assert sum(range(1000)) == 499500
    assert sys.gettrace() is None


def test_an_alarm_ends_an_endless_loop_and_rings_no_more() -> None:
    alarm = Alarm()
    with pytest.raises(TooSlow):
        alarm.within(0.01, spin)
    assert alarm.within(0.02, lambda: sum(range(100))) == 4950
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass


def test_an_alarm_that_is_swallowed_rings_again() -> None:
    def stubborn() -> None:
        for _ in range(2):
            with contextlib.suppress(TooSlow):
                spin()
        spin()

    with pytest.raises(TooSlow):
        Alarm().within(0.01, stubborn)


def test_a_template_that_is_slow_is_left_to_a_thread_from_then_on() -> None:
    slow = "{% for i in range(99999) %}{% for j in range(9) %}{% endfor %}{% endfor %}{{ messages[0].content }}"
    template = ChatTemplate(slow, "file", TOKENIZER, 1024)
    chat = [Message(role="user", content="hi there")]
    assert template.quick_prompt(chat, {}) is None
    began = time.process_time()
    assert template.quick_prompt(chat, {}) is None
    assert time.process_time() - began < 0.005


def test_a_quick_template_gives_the_same_either_way_and_long_chats_go_to_a_thread() -> None:
    template = ChatTemplate("{{ messages[0].content }}", "file", TOKENIZER, 1024)
    chat = [Message(role="user", content="Once upon a time")]
    assert template.quick_prompt(chat, {}) == template.prompt(chat, {})
    assert template.quick_prompt([Message(role="user", content="word " * 1000)], {}) is None
    assert template.quick_prompt(chat, {"text": "word " * 1000}) is None
    assert template.quick_prompt(chat * 100, {}) is None


def test_a_template_that_says_much_is_left_to_a_thread() -> None:
    template = ChatTemplate("Be brief. " * 500, "file", TOKENIZER, 4096)
    chat = [Message(role="user", content="hi")]
    assert template.quick_prompt(chat, {}) is None
    assert len(template.prompt(chat, {}).tokens) > 500


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x",
        "{% macro f(n) %}{% for i in range(9) %}{{ f(n + 1) }}{% endfor %}{% endmacro %}{{ f(0) }}",
        "{{ '%0500000000d' % 1 }}",
        "{{ 'x' * 1000000000 }}",
        "{% set n = 9 %}{{ n ** 99999 ** 9 }}",
        "{{ lipsum(n=200000) | length }}",
        "{{ ''.__class__.__mro__ }}{{ messages.__init__.__globals__ }}",
    ],
)
def test_a_hostile_template_is_refused_in_bounded_time(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brigade.serve.chat_template.RENDER_SECONDS", 0.3)
    template = ChatTemplate(source, "file", TOKENIZER, 1024)
    began = time.monotonic()
    with pytest.raises(BadRequest, match="template"):
        template.prompt([Message(role="user", content="hi")], {})
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("source", ["{% if %}", "{% for a in b %}" * 25 + "{% endfor %}" * 25, "{{ " + "(" * 3000])
def test_a_template_that_cannot_be_compiled_is_an_error_of_the_file(source: str) -> None:
    with pytest.raises(ConfigError, match="some file"):
        ChatTemplate(source, "some file", TOKENIZER, 1024)


def test_a_constant_that_would_be_huge_is_not_computed_while_compiling() -> None:
    began = time.monotonic()
    ChatTemplate("{% if false %}{{ 9 ** 9 ** 9 }}{% endif %}ok", "file", TOKENIZER, 1024)
    assert time.monotonic() - began < 1
