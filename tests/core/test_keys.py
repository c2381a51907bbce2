"""Names of stored pages depend on everything that rows depend on, and on nothing else."""

import subprocess
import sys

import pytest

from brigade.core.keys import SIZE, keys

TOKENS = list(range(100, 112))


def names(identity: bytes = b"model", salt: str = "", tokens: list[int] = TOKENS, step: int = 4) -> list[bytes]:
    return list(keys(identity, salt, tokens, step))


def test_each_whole_group_has_a_name() -> None:
    assert [len(k) for k in names()] == [SIZE] * 3
    assert names(tokens=TOKENS[:11]) == names()[:2]
    assert names(tokens=TOKENS[:3]) == []


def test_a_name_depends_on_all_tokens_before_it() -> None:
    other = names(tokens=[*TOKENS[:5], 0, *TOKENS[6:]])
    assert [a == b for a, b in zip(names(), other, strict=True)] == [True, False, False]


@pytest.mark.parametrize(
    "how", [{"identity": b"other"}, {"salt": "tenant"}, {"salt": "\ud800"}, {"identity": b"modelx"}]
)
def test_models_and_tenants_share_no_name(how: dict[str, bytes]) -> None:
    assert not set(names()) & set(names(**how))  # type: ignore[arg-type]


def test_the_border_between_model_tenant_and_tokens_cannot_be_moved() -> None:
    assert names(b"ab", "c") != names(b"a", "bc")


def test_names_are_the_same_in_another_process() -> None:
    script = "from brigade.core.keys import keys; print(next(keys(b'model', 's', [1, 2], 2)).hex())"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert told.stdout.strip() == next(keys(b"model", "s", [1, 2], 2)).hex()
