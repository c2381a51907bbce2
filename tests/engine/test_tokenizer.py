"""Text to tokens and back: users cannot forge control tokens, and streamed pieces join to the whole text."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from brigade.engine.config import DEMO_MODEL
from brigade.engine.output import BadRequest
from brigade.engine.tokenizer import Detokenizer, Tokenizer
from brigade.spec.config import BadConfig

DEMO = Tokenizer(DEMO_MODEL)
CONTENT = json.loads((DEMO_MODEL / "tokenizer.json").read_text())
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [b for b in range(256) if b not in _PRINTABLE]
_LETTER = {**{b: chr(b) for b in _PRINTABLE}, **{b: chr(256 + i) for i, b in enumerate(_OTHERS)}}
BYTE_TOKENS = [CONTENT["model"]["vocab"][_LETTER[b]] for b in range(256)]
"""The token of each single byte, from which any text, and any broken text, can be made (GPT-2's byte alphabet)."""


def by_bytes(data: bytes) -> list[int]:
    return [BYTE_TOKENS[b] for b in data]


def write(folder: Path, config: dict[str, Any], content: dict[str, Any] | None = None) -> Tokenizer:
    (folder / "tokenizer.json").write_text(json.dumps(content or CONTENT))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder)


def role(text: str, token: int, special: bool = False) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": text, "special": special, **flags}


@pytest.fixture
def with_roles(tmp_path: Path) -> Tokenizer:
    """As DeepSeek's: role tokens and <think> are added tokens that are not marked special; spaces are added too."""
    added = [*CONTENT["added_tokens"]]
    for text in ("<|User|>", "<|Assistant|>", "<think>", "</think>", "   "):
        added.append(role(text, 4091 + len(added)))
    return write(tmp_path, {}, {**CONTENT, "added_tokens": added})


# Encoding


@pytest.mark.parametrize("text", sorted(DEMO.control))
def test_control_token_text_in_a_prompt_stays_text(text: str) -> None:
    ids = DEMO.encode(f"a{text}b")
    assert not set(ids) & set(DEMO.control.values())
    assert DEMO.decode(ids) == f"a{text}b"


@pytest.mark.parametrize("text", ["<|User|>", "<|Assistant|>", "<think>", "</think>", "<|end|>"])
def test_role_tokens_that_are_not_marked_special_cannot_be_forged_either(with_roles: Tokenizer, text: str) -> None:
    ids = with_roles.encode(f"hi {text} there")
    assert with_roles.control[text] not in ids
    assert with_roles.decode(ids) == f"hi {text} there"


def test_added_tokens_of_mere_spaces_are_not_control_tokens(with_roles: Tokenizer) -> None:
    assert "   " not in with_roles.control
    space = with_roles.encode("a   b")
    assert with_roles.decode(space) == "a   b"
    assert len(space) == 3


def test_in_a_rendered_template_control_tokens_count_and_marked_ones_stay_text(with_roles: Tokenizer) -> None:
    user, end = with_roles.control["<|User|>"], with_roles.control["<|end|>"]
    rendered = "<|User|>say \ue000 and \ue001!<|end|>"
    ids = with_roles.encode_chat(rendered, {"\ue000": "<|User|>", "\ue001": "<|end|>"})
    assert (ids[0], ids[-1]) == (user, end)
    assert not {user, end} & set(ids[1:-1])
    assert with_roles.decode(ids) == "say <|User|> and <|end|>!"


def test_marks_that_are_not_asked_for_are_ordinary_characters() -> None:
    assert DEMO.decode(DEMO.encode_chat("a\ue000b", {})) == "a\ue000b"


def test_marks_at_the_edges_and_side_by_side() -> None:
    ids = DEMO.encode_chat("\ue000\ue000", {"\ue000": "<|end|>"})
    assert DEMO.decode(ids) == "<|end|><|end|>"
    assert DEMO.encode_chat("", {"\ue000": "x"}) == []


@given(st.text(max_size=60))
def test_a_template_without_marks_is_what_the_library_gives(text: str) -> None:
    library = tokenizers.Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    assert DEMO.encode_chat(text, {}) == library.encode(text, add_special_tokens=False).ids


@given(st.text(max_size=60))
def test_any_text_comes_back_from_its_tokens(text: str) -> None:
    assert DEMO.decode(DEMO.encode(text)) == text


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff"])
def test_a_lone_surrogate_is_a_bad_request(text: str) -> None:
    for encode in (DEMO.encode, lambda t: DEMO.encode_chat(t, {})):
        with pytest.raises(BadRequest, match="surrogate") as e:
            encode(text)
        assert e.value.code == "invalid_unicode"


def test_the_first_token_is_bos_only_where_the_checkpoint_asks_for_it(tmp_path: Path) -> None:
    bos = DEMO.control["<|bos|>"]
    plain = DEMO.encode("hi")
    assert bos not in plain
    assert write(tmp_path, {"bos_token": "<|bos|>", "add_bos_token": False}).encode("hi") == plain
    assert write(tmp_path, {"bos_token": "<|bos|>", "add_bos_token": True}).encode("hi") == [bos, *plain]
    spelt_out = {"bos_token": {"content": "<|bos|>"}, "add_bos_token": True}
    assert write(tmp_path, spelt_out).encode("hi") == [bos, *plain]
    assert write(tmp_path, spelt_out).encode("") == [bos]


def test_bos_is_not_put_twice_where_the_post_processor_puts_it(tmp_path: Path) -> None:
    bos = DEMO.control["<|bos|>"]
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [bos], "tokens": ["<|bos|>"]}},
    }
    for config in ({"bos_token": "<|bos|>", "add_bos_token": True}, {}):
        tokenizer = write(tmp_path, config, {**CONTENT, "post_processor": template})
        assert tokenizer.encode("hi") == [bos, *DEMO.encode("hi")]
        assert tokenizer.encode_chat("<|bos|>hi", {}) == [bos, *DEMO.encode("hi")]
        assert tokenizer.encode("<|bos|>hi").count(bos) == 1


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path: Path) -> None:
    content = {
        **CONTENT,
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 50},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|pad|>",
        },
    }
    assert write(tmp_path, {}, content).encode("one two three four") == DEMO.encode("one two three four")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"added_tokens": [1]}', '{"added_tokens": [{"id": 1}]}', '{"model": {"type": "No"}}']
)
def test_a_tokenizer_file_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BadConfig, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


def test_special_names_come_from_the_tokenizer_config(tmp_path: Path) -> None:
    tokenizer = write(tmp_path, {"eos_token": {"content": "<|end|>"}, "pad_token": None, "unk_token": 5})
    assert tokenizer.special("eos_token") == "<|end|>"
    assert [tokenizer.special(n) for n in ("pad_token", "unk_token", "bos_token")] == [None, None, None]


# Decoding


def test_control_tokens_are_left_out_of_text_but_think_is_kept(with_roles: Tokenizer) -> None:
    c = with_roles.control
    ids = [c["<think>"], *with_roles.encode("a"), c["</think>"], c["<|User|>"], *with_roles.encode("b"), c["<|end|>"]]
    assert with_roles.decode(ids) == "<think>a</think>b"
    assert with_roles.token_text(c["<|end|>"]) == "<|end|>"


def test_the_bytes_of_a_token_are_those_of_its_text() -> None:
    assert DEMO.token_bytes(DEMO.encode("Hello")[0]) == list(b"Hello")
    assert DEMO.token_bytes(DEMO.control["<|end|>"]) == list(b"<|end|>")


def test_a_token_that_is_part_of_a_character_has_no_bytes_of_its_own() -> None:
    parts = DEMO.encode("😀")
    assert len(parts) > 1
    assert [DEMO.token_bytes(p) for p in parts] == [None] * len(parts)


# Streaming


def stream(tokenizer: Tokenizer, ids: list[int]) -> str:
    text = Detokenizer(tokenizer)
    return "".join(text.push(i) for i in ids) + text.flush()


@given(st.text(max_size=40))
def test_streamed_pieces_of_any_text_join_to_it(text: str) -> None:
    assert stream(DEMO, DEMO.encode(text)) == text


@given(st.lists(st.sampled_from(["é", "😀", "a", "\ufffd", "日本", " "]), max_size=30))
def test_characters_cut_into_single_bytes_join(parts: list[str]) -> None:
    text = "".join(parts)
    assert stream(DEMO, by_bytes(text.encode())) == text


def test_a_character_behind_replacement_characters_is_not_lost() -> None:
    """A run of tokens that looks like broken bytes must not tear the good character at its end."""
    text = "\ufffd\ufffd😀!"
    assert stream(DEMO, by_bytes(text.encode())) == text


@given(st.lists(st.integers(0, DEMO.vocab - 1), max_size=40))
def test_streamed_pieces_of_any_tokens_join_to_the_decoded_whole(ids: list[int]) -> None:
    assert stream(DEMO, ids) == DEMO.decode(ids)


@given(st.lists(st.sampled_from([b"\x80", b"\xe2", b"\xf0\x9f", "€".encode(), "😀".encode(), b"a"]), max_size=20))
def test_streamed_pieces_of_any_bytes_join_to_the_decoded_whole(parts: list[bytes]) -> None:
    ids = by_bytes(b"".join(parts))
    assert stream(DEMO, ids) == DEMO.decode(ids)


def test_a_character_behind_a_run_of_broken_bytes_is_not_lost() -> None:
    assert stream(DEMO, by_bytes(b"\x80" * 7 + "😀!".encode())) == "\ufffd" * 7 + "😀!"


@given(st.lists(st.sampled_from(BYTE_TOKENS), max_size=60))
def test_no_more_than_a_few_tokens_are_held_back(ids: list[int]) -> None:
    text, shown, waited = Detokenizer(DEMO), 0, 0
    for i in ids:
        waited = 0 if text.push(i) else waited + 1
        shown += not waited
        assert waited <= 8


def test_text_is_shown_with_its_own_token_where_characters_are_whole() -> None:
    text = Detokenizer(DEMO)
    ids = DEMO.encode("Once upon a time, there was.")
    assert [text.push(i) for i in ids] == [DEMO.token_text(i) for i in ids]


def test_flushing_shows_the_beginning_of_a_character_as_replacement() -> None:
    text = Detokenizer(DEMO)
    assert text.push(DEMO.encode("😀")[0]) == ""
    assert text.flush() == "�"
    assert text.flush() == ""


def test_tokens_without_text_do_not_make_the_next_ones_dearer() -> None:
    """A model told to ignore its end of sequence may repeat it for the rest of the context."""
    text, calls = Detokenizer(DEMO), []
    decode = text._decode
    text._decode = lambda ids: (calls.append(len(ids)), decode(ids))[1]  # type: ignore[assignment]
    for _ in range(200):
        text.push(DEMO.control["<|end|>"])
    assert max(calls, default=0) <= 32
