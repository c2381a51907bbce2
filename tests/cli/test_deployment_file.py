"""deploy.yaml as text: lines, doubled keys, and YAML that a settings file has no need for."""

from pathlib import Path

import pytest

from brigade.cli.deployment_file import MOST_BYTES, parse, read_deployment
from brigade.cli.fault import Fault
from brigade.spec.deploy import BadDeployment


def error_of(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "d.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(Fault) as caught:
        read_deployment(path)
    assert caught.value.code == 2
    message = str(caught.value)
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "d.yaml"
    path.write_text("units:\n  - role: mixed\n    ranks_per_host: 2\n")
    assert read_deployment(path).units[0].ranks_per_host == 2


def test_paths_know_their_lines() -> None:
    _, line_of = parse("model: x\nunits:\n  - role: mixed\n    hosts: [a,\n      b]\n", "d.yaml")
    assert line_of[("units",)] == 2
    assert line_of[("units", 0)] == 3
    assert line_of[("units", 0, "hosts")] == 4
    assert line_of[("units", 0, "hosts", 1)] == 5


def test_plain_words_are_what_yaml_1_2_says() -> None:
    text = "[no, on, 010, 12:30, 1e3, 2024-01-01, ~, 'true', true, 0x10, -3, 1_000]"
    assert parse(text, "d")[0] == [
        *("no", "on", 10, "12:30", 1000.0, "2024-01-01", None, "true", True, "0x10", -3, "1_000"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": is empty; start with 'units:'"),
        ("# nothing\n", ": is empty"),
        ("model: x\nlisten: 127.0.0.1:1\nmodel: y\n", ":3: model: is there twice, first on line 1"),
        ("units:\n - role: mixed\n   role: mixed", ":3: units[0].role: is there twice, first on line 2"),
        ("model: &a x\n", ":1: anchors and aliases (& and *) are not read"),
        ("limits:\n  <<: *x\n", ":2: anchors and aliases"),
        ("\nmodel: !!python/object/apply:os.system [id]\n", ":2: tags (tag:yaml.org,2002:python"),
        ("model: !!str 1\n", ":1: tags"),
        ("[" * 200, ":1: is nested deeper than 16 levels"),
        ("a: 1\n---\nb: 2\n", ":2: is not valid YAML"),
        ("units: [\n", ": is not valid YAML"),
        ("a: b: c\n", ":1: is not valid YAML: mapping values are not allowed here"),
        ("? [a]\n: b\n", ":1: a key must be a plain word"),
        ("model: a\x07b\n", ": is not valid YAML"),
        (b"model: \xff\n", ": is not UTF-8 text"),
        (" " * (MOST_BYTES + 1), f": is longer than {MOST_BYTES} bytes"),
        ("limits:\n  max_running: yes\n", ":2: limits.max_running: must be a whole number from 1 to 4096, not 'yes'"),
        ("limits:\n  max_running: 99999999999999999999\n", ":2: limits.max_running: must be a whole number"),
    ],
)
def test_a_bad_file_is_one_line_that_says_where(tmp_path: Path, text: str | bytes, message: str) -> None:
    assert message in error_of(tmp_path, text)


def test_a_thousand_laughs_are_refused_before_they_grow(tmp_path: Path) -> None:
    laughs = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
    )
    assert "anchors and aliases" in error_of(tmp_path, laughs)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(Fault, match="cannot be read"):
        read_deployment(tmp_path / "none.yaml")
    with pytest.raises(Fault, match="is not a file"):
        read_deployment(tmp_path)


def test_parse_raises_what_spec_raises() -> None:
    with pytest.raises(BadDeployment):
        parse("[", "d.yaml")
