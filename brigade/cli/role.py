"""`brigade role`: has a unit compute prompts, decode, or do both, while the deployment serves."""

from typing import Annotated

import typer

from brigade.cli.fault import Fault
from brigade.cli.orders import DEFAULT_URL, WAIT, Admin, File, Force, Key, Url, Wait


def role(
    unit: Annotated[str, typer.Argument(help="Name of the unit; `brigade drain` lists them.")],
    new_role: Annotated[str, typer.Argument(metavar="ROLE", help="prefill, decode or mixed.")],
    force: Force = False,
    wait: Wait = WAIT,
    file: File = None,
    url: Url = DEFAULT_URL,
    admin_key: Key = None,
) -> None:
    """Change what a unit does. It finishes what only its old role does, and then takes work of the new one."""
    if new_role not in ("prefill", "decode", "mixed"):
        raise Fault(f"the role must be prefill, decode or mixed, not {new_role}", 2)
    admin = Admin.of(url, admin_key, file)
    told = admin.order(unit, "role", role=new_role, force=force)
    if wait:
        told = admin.wait(unit, lambda u: u.role == u.next_role, wait)
    typer.echo(f"{unit}: {told.role}" + ("" if told.role == told.next_role else f", becomes {told.next_role}"))
