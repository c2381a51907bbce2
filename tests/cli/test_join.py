"""`brigade join`: addresses, and a secret that only its owner can read."""

from pathlib import Path

import pytest

from brigade.cli.fault import Fault
from brigade.cli.join import parse_address
from brigade.cli.secret import read_secret
from tests.cli.test_command_line import invoke
from tests.engine.hosting import SECRET, secret_file


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.1", ("10.0.0.1", 7000)),
        ("head.example:71", ("head.example", 71)),
        ("[fe80::1]", ("fe80::1", 7000)),
        ("[fe80::1]:7001", ("fe80::1", 7001)),
        ("fe80::1", ("fe80::1", 7000)),
    ],
)
def test_an_address_may_have_a_port(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", ":7000", "host:", "host:x", "host:0", "host:70000", "[]:1"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(Fault, match="is no address; write it like"):
        parse_address(text)


def test_a_secret_is_a_files_bytes_without_the_last_line_end(tmp_path: Path) -> None:
    assert read_secret(str(secret_file(tmp_path))) == SECRET


def test_what_is_no_secret_is_refused_and_never_shown(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_text("hush\n")
    path.chmod(0o600)
    for where, why in ((path, "a secret has 16 to 4096 bytes, not 4"), (tmp_path, "Is a directory")):
        code, out, err = invoke("join", "127.0.0.1", "--address", "127.0.0.2", "--secret-file", str(where))
        assert (code, out) == (2, "")
        assert why in err
        assert "hush" not in err


@pytest.mark.parametrize("option", ["--address", "--secret-file"])
def test_what_is_needed_must_be_given(option: str) -> None:
    given = {"--address": "127.0.0.2", "--secret-file": "x"}
    del given[option]
    code, _, err = invoke("join", "127.0.0.1", *(word for pair in given.items() for word in pair))
    assert code == 2
    assert option in err


def test_a_wait_that_cannot_be_is_refused(tmp_path: Path) -> None:
    arguments = ("join", "127.0.0.1", "--address", "127.0.0.2", "--secret-file", str(secret_file(tmp_path)))
    code, _, err = invoke(*arguments, "--wait", "-1")
    assert code == 2
    assert "wait must be 0 or more seconds, not -1" in err


def test_a_host_does_not_take_the_place_of_another_one(tmp_path: Path) -> None:
    arguments = ("join", "127.0.0.1", "--secret-file", str(secret_file(tmp_path)))
    code, _, err = invoke(*arguments, "--address", "192.0.2.1")
    assert code == 2
    assert "192.0.2.1 is not an address of this machine" in err
