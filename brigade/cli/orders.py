"""What `brigade drain` and `brigade role` have in common: the admin address, its key, and waiting for a unit."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brigade.cli.fault import Fault, one_line
from brigade.cli.protocol import base_url, error_text, headers, is_loopback

if TYPE_CHECKING:
    from brigade.core.roles import UnitState

DEFAULT_URL = "http://127.0.0.1:8001"
ANSWER_SECONDS = 15.0
LOOK_EVERY = 0.5
WAIT = 3600.0

Url = Annotated[str, typer.Option(help="The admin address of the deployment.")]
Key = Annotated[
    str | None,
    typer.Option(envvar="BRIGADE_ADMIN_KEY", help="The admin key. Prefer the variable: others can see command lines."),
]
File = Annotated[
    Path | None,
    typer.Option("--file", "-f", metavar="FILE", help="Deployment file, which says the address and where the key is."),
]
Wait = Annotated[float, typer.Option(help="Seconds to wait for the unit; 0: only give the order.")]
Force = Annotated[
    bool, typer.Option("--force", help="Also the last unit of its kind: requests then wait, and may fail.")
]


@dataclass(frozen=True)
class Admin:
    """The admin address of a running deployment. All methods raise Fault."""

    url: str
    key: str

    @classmethod
    def of(cls, url: str, key: str | None, file: Path | None) -> "Admin":
        """From options: a deployment file says both."""
        if file is not None:
            from brigade.cli.deployed import Deployed
            from brigade.cli.deployment_file import read_deployment

            config = Deployed(file, read_deployment(file)).admin_config()
            if config is None:
                raise Fault(f"{file}: has no admin_key_file, so its deployment takes no orders", 2)
            host = f"[{config.host}]" if ":" in config.host else config.host
            return cls(f"http://{host}:{config.port}", config.key)
        if not key:
            raise Fault("orders need the admin key: set BRIGADE_ADMIN_KEY, or name the deployment with --file", 2)
        return cls(base_url(url), key)

    def units(self) -> "list[UnitState]":
        return self._ask("GET", "/admin/units")

    def order(self, name: str, what: str, **body: Any) -> "UnitState":
        """Tell a unit something; what it does now."""
        from urllib.parse import quote

        [unit] = self._ask("POST", f"/admin/units/{quote(name, safe='')}/{what}", body)
        return unit

    def unit(self, name: str) -> "UnitState":
        found = next((unit for unit in self.units() if unit.name == name), None)
        if found is None:
            raise Fault(f"{self.url} has no unit {name} any more")
        return found

    def wait(self, name: str, there: "Callable[[UnitState], bool]", seconds: float) -> "UnitState":
        """Look at a unit until it is so far, and say what it still has to do. Raises Fault at the deadline."""
        until, told = time.monotonic() + seconds, ""
        while not there(unit := self.unit(name)):
            if time.monotonic() > until:
                raise Fault(f"{progress(unit)}, after {seconds:g} s; it goes on by itself")
            if (now := progress(unit)) != told:
                told = now
                typer.echo(told)
            time.sleep(LOOK_EVERY)
        return unit

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> "list[UnitState]":
        import httpx
        import msgspec

        from brigade.core.roles import UnitState

        try:
            with httpx.Client(trust_env=not is_loopback(self.url), timeout=ANSWER_SECONDS) as client:
                answer = client.request(method, self.url + path, headers=headers(self.key), json=body)
        except httpx.HTTPError as e:
            why = one_line(str(e)) or type(e).__name__
            hint = "does its deployment run, and does its file have admin_key_file?"
            raise Fault(f"no answer from {self.url}: {why}; {hint}") from e
        if answer.status_code != 200:
            raise Fault(error_text(answer.status_code, answer.content))
        try:
            return msgspec.json.decode(answer.content, type=dict[str, list[UnitState]])["units"]
        except (msgspec.MsgspecError, KeyError) as e:
            raise Fault(f"{self.url} did not answer as this version of Brigade does: {e}") from e


def progress(unit: "UnitState") -> str:
    """What a unit does, in one line."""
    n = unit.prefill + unit.decode
    left = f"{n} {'request' if n == 1 else 'requests'}"
    match unit.state:
        case "draining":
            return f"{unit.name}: draining, {left} left"
        case "changing":
            return f"{unit.name}: {unit.role}, becomes {unit.next_role}, {left} left"
    return f"{unit.name}: {unit.state}" + (f": {one_line(unit.reason)}" if unit.reason else "")


def table(units: "list[UnitState]") -> None:
    """All units, on the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    out = Table("unit", "role", "state", "ranks", "prompts", "decoding", box=box.SIMPLE)
    for u in units:
        role = u.role if u.role == u.next_role else f"{u.role}, becomes {u.next_role}"
        state = f"{u.state}: {one_line(u.reason)}" if u.reason else u.state
        out.add_row(u.name, role, state, str(u.ranks), str(u.prefill), str(u.decode))
    Console().print(out)
