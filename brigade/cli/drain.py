"""`brigade drain`: takes a unit out of service without losing a request, starts it again, or puts it back."""

from typing import Annotated

import typer

from brigade.cli.fault import Fault
from brigade.cli.orders import DEFAULT_URL, WAIT, Admin, File, Force, Key, Url, Wait, table


def drain(
    unit: Annotated[str | None, typer.Argument(help="Name of the unit. Default: list all units.")] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Give the unit work again.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start it again once it is empty; then it takes work.")
    ] = False,
    force: Force = False,
    wait: Wait = WAIT,
    file: File = None,
    url: Url = DEFAULT_URL,
    admin_key: Key = None,
) -> None:
    """Give a unit no new work, and wait until it has finished what it has. The others keep serving.

    Without a name: list all units.
    """
    if undo and restart:
        raise Fault("--undo and --restart are opposites; give one of them", 2)
    admin = Admin.of(url, admin_key, file)
    if unit is None:
        if undo or restart or force:
            raise Fault("which unit? `brigade drain` alone lists them", 2)
        table(admin.units())
        return
    if undo:
        typer.echo(f"{unit}: {admin.order(unit, 'undrain').state}")
        return
    told = admin.order(unit, "drain", restart=restart, force=force)
    if not wait:
        typer.echo(f"{unit}: {told.state}")
    elif restart:
        admin.wait(unit, lambda u: u.state == "serving", wait)
        typer.echo(f"{unit}: was started again and takes work")
    else:
        if admin.wait(unit, lambda u: u.state != "draining", wait).state not in ("drained", "restarting"):
            raise Fault(f"{unit}: was given work again meanwhile")
        typer.echo(f"{unit}: empty; `brigade drain {unit} --undo` gives it work again")
