"""`brigade chat` against a server whose answers are known: piped, and in a terminal."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from brigade.cli import app
from brigade.cli.chat import is_command, pick, stats_line
from brigade.cli.fault import Fault
from brigade.cli.talk import Answer
from tests.cli.fake_openai import FakeServer, Script


def chat(server: FakeServer, text: str, *args: str) -> Result:
    result = CliRunner().invoke(app, ["chat", "--url", server.url, *args], input=text)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def asked(server: FakeServer) -> list[dict[str, Any]]:
    return [body for path, _, body in server.requests if path == "/v1/chat/completions"]


def test_piped_questions_give_plain_answers_and_keep_the_history() -> None:
    with FakeServer(lambda body: Script(tokens=("to ", body["messages"][-1]["content"]))) as server:
        result = chat(server, "first\n\nsecond\n", "--system", "be brief", "--temperature", "0", "--seed", "4")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "to first\nto second\n", "")
    last = asked(server)[-1]
    assert [(m["role"], m["content"]) for m in last["messages"]] == [
        ("system", "be brief"),
        ("user", "first"),
        ("assistant", "to first"),
        ("user", "second"),
    ]
    assert (last["model"], last["temperature"], last["seed"], last["stream"]) == ("fake-model", 0, 4, True)
    assert "max_tokens" not in last, "what was not asked for is the server's to decide"


def test_reset_forgets_and_exit_ends() -> None:
    with FakeServer() as server:
        result = chat(server, "one\n/reset\ntwo\n/exit\nthree\n")
    assert result.exit_code == 0
    assert [len(body["messages"]) for body in asked(server)] == [1, 1]


def test_an_unknown_command_in_a_script_is_bad_input() -> None:
    with FakeServer() as server:
        assert chat(server, "/rest\n").exit_code == 2
    assert is_command("/reset")
    assert not is_command("/etc/hosts is what?")


def test_reasoning_is_left_out_of_piped_output_unless_asked_for() -> None:
    with FakeServer(lambda _: Script(tokens=("yes",), reasoning=("hm ", "hm"))) as server:
        assert chat(server, "q\n").stdout == "yes\n"
        assert chat(server, "q\n", "--show-thinking").stdout == "hm hm\n\nyes\n"
    assert all("hm" not in str(body) for body in asked(server))


def test_control_characters_of_an_answer_do_not_reach_the_terminal() -> None:
    with FakeServer(lambda _: Script(tokens=("a\x1b", "[31mb\x07", "\r\nc\x9b"))) as server:
        result = chat(server, "q\n")
    assert result.stdout == "a[31mb\nc\n"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (Script(status=429, error="queue\nfull"), "HTTP 429: queue full"),
        (Script(ending="event", error="the worker died"), "broke off: the worker died"),
        (Script(ending="cut"), "broke off: peer closed"),
        (Script(ending="quiet"), r"without \[DONE\]"),
        (Script(ending="garbage"), "not JSON"),
    ],
)
def test_a_failed_answer_is_one_line_and_ends_a_script(script: Script, message: str) -> None:
    with FakeServer(lambda _: script) as server:
        result = chat(server, "q\nsecond\n")
    assert result.exit_code == 1
    assert re.search(message, result.stderr)
    assert result.stderr.startswith("brigade: ")
    assert result.stderr.count("\n") == 1
    assert len(asked(server)) == 1


def test_a_model_is_chosen_by_name_among_those_of_the_server() -> None:
    with FakeServer(models=["a", "b"]) as server:
        assert chat(server, "q\n", "b").exit_code == 0
        assert asked(server)[-1]["model"] == "b"
        assert chat(server, "q\n", "c").exit_code == 2
    with pytest.raises(Fault, match="lists no model"):
        pick([], None, "url")


def test_the_key_is_sent_as_a_bearer_token() -> None:
    with FakeServer() as server:
        result = CliRunner(env={"BRIGADE_API_KEY": "secret-key"}).invoke(
            app, ["chat", "--url", server.url], input="q\n"
        )
    assert result.exit_code == 0
    assert {headers["authorization"] for _, headers, _ in server.requests} == {"Bearer secret-key"}


def test_a_server_that_is_not_there_is_one_line() -> None:
    with FakeServer() as server:
        pass
    result = chat(server, "q\n")
    assert result.exit_code == 1
    assert "no server answers" in result.stderr


def test_a_server_at_the_usual_address_is_used_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeServer() as server:
        monkeypatch.setattr("brigade.cli.chat.DEFAULT_URL", server.url)
        result = CliRunner().invoke(app, ["chat"], input="q\n")
    assert result.stdout == "one two three\n"
    assert f"talking to the server at {server.url}" in result.stderr


def test_without_a_server_one_is_started_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeServer() as server:
        code = f"import time; print('Brigade is ready at {server.url}', flush=True); time.sleep(60)"
        monkeypatch.setattr("brigade.cli.chat.serve_command", lambda model: [sys.executable, "-c", code])
        started = time.monotonic()
        result = CliRunner().invoke(app, ["chat", "some/model"], input="q\n")
    assert result.stdout == "one two three\n"
    assert "starting a server for some/model" in result.stderr
    assert time.monotonic() - started < 10


def test_the_line_after_an_answer_says_what_is_known() -> None:
    full = Answer("x", "length", 84, ttft=0.123, tokens_per_second=35.26)
    assert stats_line(full) == "TTFT 123 ms, 35.3 tokens/s, 84 tokens, cut off at the length limit"
    assert stats_line(Answer("", "stop", None, None, None)) == "no text"


class Terminal:
    """A `brigade chat` on a pseudo-terminal."""

    def __init__(self, *args: str) -> None:
        self._master, child = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "brigade", "chat", *args],
            stdin=child,
            stdout=child,
            stderr=child,
            env={**os.environ, "TERM": "dumb", "NO_COLOR": "1"},
            start_new_session=True,
        )
        os.close(child)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def expect(self, pattern: str, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} did not come; seen: {self.seen!r}"
            try:
                self.seen += os.read(self._master, 4096).decode()
            except OSError:  # the other side is gone
                pytest.fail(f"{pattern!r} did not come; seen: {self.seen!r}")
        self.seen = self.seen[match.end() :]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)


def test_in_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_ends_the_program() -> None:
    def script(body: dict[str, Any]) -> Script:
        slow = body["messages"][-1]["content"] == "slow"
        return Script(tokens=("begun",), ending="hang") if slow else Script(reasoning=("hm",), gap=0.01)

    with FakeServer(script) as server:
        terminal = Terminal("--url", server.url)
        try:
            terminal.expect("fake-model at http")
            terminal.expect("> ")
            terminal.type("slow\n")
            terminal.expect("begun")
            terminal.process.send_signal(signal.SIGINT)
            terminal.expect(r"\(stopped\)")
            terminal.expect("> ")
            terminal.type("quick\n")
            terminal.expect(r"hm\s+one two three\s+TTFT .* tokens/s, 4 tokens")
            terminal.type("/help\n")
            terminal.expect("forget the conversation")
            terminal.expect("> ")
            time.sleep(0.5)  # CPython's input() does not see a signal that comes between its prompt and its first wait
            terminal.process.send_signal(signal.SIGINT)
            terminal.expect("Ctrl-D or /exit ends")
            terminal.expect("> ")
            terminal.type("\x04")
            assert terminal.process.wait(10) == 0
        finally:
            terminal.close()
    assert [m["content"] for m in asked(server)[-1]["messages"]] == ["slow", "begun", "quick"]
