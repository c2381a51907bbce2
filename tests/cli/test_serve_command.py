"""`brigade serve` around the server: names, hints, a taken port, and signals while the model is loaded."""

import signal
import socket
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from brigade.cli import app
from brigade.cli.serve import hint, served_name
from brigade.engine.config import DEMO_MODEL
from brigade.serve.config import ServeConfig


def test_a_model_is_named_after_its_folder() -> None:
    assert served_name("/models/some-model/") == "some-model"
    assert served_name(None) == served_name(str(DEMO_MODEL)) == "brigade-demo"


def test_the_hint_works_for_odd_names_and_never_shows_the_key() -> None:
    shown = hint("http://127.0.0.1:8000", ServeConfig(served_name='a"b', api_key="secret-key"))
    assert '{"model": "a\\"b"' in shown
    assert "$BRIGADE_API_KEY" in shown
    assert "secret-key" not in shown


def test_a_taken_port_is_known_before_the_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["serve", "--port", str(port)])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"brigade: cannot listen on 127.0.0.1 port {port} (Address already in use)")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_loading_ends_it_without_a_word(number: int, code: int) -> None:
    command = [sys.executable, "-m", "brigade", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("brigade: loading ")
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (code, "", "")
