"""`brigade chat`: a conversation in the terminal with a server that speaks OpenAI's API. Must not know the engine.

1. find a server: --url, or the one at the usual address, or start one (child.py)
2. read a question, stream the answer, and again, until Ctrl-D, /exit or the end of piped input
3. end the server if it was started here
"""

import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brigade.cli.child import OwnServer, serve_command
from brigade.cli.fault import Fault, one_line, printable
from brigade.cli.protocol import DEFAULT_URL, Piece, base_url
from brigade.cli.units import show_seconds

if TYPE_CHECKING:
    from rich.console import Console

    from brigade.cli.talk import Answer, Talk

PROBE_DEADLINE = 2.0
HELP = """\
/reset  forget the conversation    /exit  end (Ctrl-D too)    /help  this text
Ctrl-C stops an answer."""


def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a model to start a server for; with --url, the name of one of the server's models. "
            f"Default: what a server at {DEFAULT_URL} serves if there is one, else the bundled demo model."
        ),
    ] = None,
    url: Annotated[str | None, typer.Option(help="Address of a running server.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="BRIGADE_API_KEY", help="The server's key. Prefer the variable: other users can see command lines."
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. Default: the server's.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer in tokens. Default: the server's.")] = None,
    system: Annotated[str | None, typer.Option(help="System message that begins the conversation.")] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal answers.")] = None,
    show_thinking: Annotated[
        bool | None,
        typer.Option(
            "--show-thinking/--hide-thinking", help="Reasoning of the model. Default: shown, but not in piped output."
        ),
    ] = None,
) -> None:
    """Talk to a model. Piped input is read as one question a line, and only answers are written."""
    from rich.console import Console

    from brigade.cli.talk import Talk

    fields = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    options = {name: value for name, value in fields.items() if value is not None}
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    console = Console(highlight=False, markup=False, emoji=False)
    with ExitStack() as stack:
        address, name = _find_server(stack, model, url, api_key)
        talk = Talk(address, api_key, name, options, system)
        screen = Screen(console, thinking=interactive if show_thinking is None else show_thinking)
        if interactive:
            console.print(f"{one_line(name)} at {address}\n{HELP}", style="dim", soft_wrap=True)
            _converse(talk, screen, console)
        else:
            _answer_lines(talk, screen)


def _find_server(stack: ExitStack, model: str | None, url: str | None, api_key: str | None) -> tuple[str, str]:
    """Address and model to talk to; a server started here is ended by `stack`."""
    from brigade.cli.talk import is_healthy, list_models

    if url is not None:
        address = base_url(url)
        return address, pick(list_models(address, api_key), model, address)
    if model is None and is_healthy(DEFAULT_URL, PROBE_DEADLINE):
        try:
            ids = list_models(DEFAULT_URL, api_key)
        except Fault as e:
            raise Fault(f"{e}; talk to another server with --url, or name a MODEL to start one") from e
        _say(f"talking to the server at {DEFAULT_URL}")
        return DEFAULT_URL, pick(ids, None, DEFAULT_URL)
    _say(f"starting a server for {model or 'the demo model'}")
    server = stack.enter_context(OwnServer(serve_command(model), api_key))
    return server.url, pick(list_models(server.url, api_key), None, server.url)


def pick(ids: list[str], wanted: str | None, url: str) -> str:
    """The model to ask for: `wanted` if the server has it, the first one if nothing is wanted. Raises Fault."""
    if not ids:
        raise Fault(f"{url}: the server lists no model")
    if wanted is not None and wanted not in ids:
        raise Fault(f"{url}: has no model {wanted}; it has {', '.join(ids[:10])}", 2)
    return wanted or ids[0]


def _say(text: str) -> None:
    typer.echo(f"brigade: {one_line(text)}", err=True)


class Screen:
    """Writes the pieces of an answer so that nothing in them can steer the terminal."""

    def __init__(self, console: "Console", *, thinking: bool) -> None:
        self._console = console
        self._thinking = thinking
        self._last = ""
        """Kind of the last piece: "reasoning" or "text"."""
        self._open_line = False

    def show(self, piece: Piece) -> None:
        if piece.reasoning and self._thinking:
            self._write("reasoning", piece.reasoning, "dim")
        if piece.text:
            self._write("text", piece.text, None)

    def end(self) -> None:
        """Begin a new line, whatever the answer ended with."""
        if self._open_line:
            self._console.out("", highlight=False)
        self._last, self._open_line = "", False

    def _write(self, kind: str, text: str, style: str | None) -> None:
        if self._last not in ("", kind):
            self.end()
            self._console.out("", highlight=False)
        shown = printable(text)
        self._console.out(shown, style=style, end="", highlight=False)
        self._console.file.flush()
        self._last = kind
        if shown:
            self._open_line = not shown.endswith("\n")


def _converse(talk: "Talk", screen: Screen, console: "Console") -> None:
    """Questions typed by a person. Errors are shown and the conversation goes on."""
    with_line_editing()
    while True:
        try:
            question = input("\n> ").strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("\n(Ctrl-D or /exit ends)", style="dim")
            continue
        except UnicodeDecodeError:
            console.print("(that was not UTF-8 text)", style="dim")
            continue
        if not question:
            continue
        if is_command(question):
            if not _obey(question, talk, console):
                return
            continue
        try:
            answer = talk.ask(question, screen.show)
            screen.end()
            console.print(stats_line(answer), style="dim", soft_wrap=True)
        except KeyboardInterrupt:
            screen.end()
            console.print("(stopped)", style="dim")
        except Fault as e:
            screen.end()
            _say(str(e))


def with_line_editing() -> None:
    """Arrow keys and history in `input`, where Python was built with readline."""
    try:
        import readline  # noqa: F401 - importing it is all that is needed
    except ImportError:
        return


def is_command(line: str) -> bool:
    """Whether a line is one word after a slash; "/etc/hosts is what?" is a question."""
    return re.fullmatch(r"/[a-z]+", line) is not None


def _obey(command: str, talk: "Talk", console: "Console") -> bool:
    """Do what a command says; whether the conversation goes on."""
    if command == "/exit":
        return False
    if command == "/reset":
        talk.reset()
        console.print("(forgotten)", style="dim")
    else:
        console.print(HELP if command == "/help" else f"no command {command}\n{HELP}", style="dim", soft_wrap=True)
    return True


def stats_line(answer: "Answer") -> str:
    """TTFT, speed and length of an answer, and why it ended if not by itself."""
    parts = []
    if answer.ttft is not None:
        parts.append(f"TTFT {show_seconds(answer.ttft)}")
    if answer.tokens_per_second is not None:
        parts.append(f"{answer.tokens_per_second:.1f} tokens/s")
    if answer.n_tokens is not None:
        parts.append(f"{answer.n_tokens} tokens")
    if answer.finish == "length":
        parts.append("cut off at the length limit")
    return ", ".join(parts) or "no text"


def _answer_lines(talk: "Talk", screen: Screen) -> None:
    """Questions from a pipe. The first failure ends the program: later questions may build on the answer."""
    for question in _lines():
        if question == "/exit":
            return
        if question == "/reset":
            talk.reset()
            continue
        if is_command(question):
            raise Fault(f"no command {question} in piped input; /reset and /exit are", 2)
        try:
            talk.ask(question, screen.show)
        finally:
            screen.end()


def _lines() -> Iterator[str]:
    stream: Any = sys.stdin
    try:
        for line in stream:
            if line.strip():
                yield line.strip()
    except UnicodeDecodeError as e:
        raise Fault(f"standard input is not UTF-8 text ({e.reason} at byte {e.start})", 2) from e
