"""What a user can type is written down."""

import re
from pathlib import Path

import typer.main

from brigade.cli import app

DOCS = Path(__file__).parents[2] / "docs"


def options(command: str) -> set[str]:
    """The visible options of a command."""
    group = typer.main.get_group(app)
    found = {o for p in group.commands[command].params if not getattr(p, "hidden", False) for o in p.opts}
    return {o for o in found if o.startswith("--")} - {"--help"}


def test_each_option_of_serve_has_its_row_and_no_row_is_of_another() -> None:
    rows = re.findall(r"^\| `(--[a-z-]+)` \|", (DOCS / "serve.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(options("serve"))
