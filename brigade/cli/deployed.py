"""A deployment file as settings of the engine and the server: what `brigade up` runs and `brigade explain` shows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brigade.cli.fault import Fault
from brigade.cli.serve import served_name
from brigade.cli.units import parse_disk
from brigade.engine.config import DEMO_MODEL, EngineConfig
from brigade.serve.config import AdminConfig, ServeConfig
from brigade.spec.deploy import Deployment, Units

MOST_KEY_BYTES = 4096


@dataclass(frozen=True)
class Deployed:
    """A deployment and the file it came from; names of files in it are relative to that file's folder."""

    file: Path
    what: Deployment

    @property
    def model(self) -> Path:
        return DEMO_MODEL if self.what.model is None else self.path(self.what.model)

    @property
    def served_name(self) -> str:
        return served_name(str(self.model))

    def path(self, name: str) -> Path:
        """Where a file named in the deployment is."""
        return (self.file.parent / Path(name).expanduser()).resolve()

    def engine_config(self, units: Units, n_ranks: int = 1) -> EngineConfig:
        """Settings of one unit. Raises Fault for numbers that do not fit each other or this version."""
        limits = self.what.limits_of(units)
        given: dict[str, Any] = {
            "max_running": limits.max_running,
            "max_waiting": limits.max_waiting,
            "max_context": limits.max_context,
            "max_step_tokens": limits.max_step_tokens,
            "kv_bytes": limits.kv_memory,
            "rank_deadline": limits.rank_deadline,
        }
        if limits.kv_disk is not None:
            given["kv_disk"], given["kv_disk_bytes"] = parse_disk(limits.kv_disk)
        if n_ranks > 1:
            given["redundant_experts"] = units.redundant_experts
        try:
            return EngineConfig(
                model=str(self.model),
                weights=self.what.weights,
                drafts=self.what.drafts,
                wire=self.what.wire,
                ranks=n_ranks,
                **{key: value for key, value in given.items() if value is not None},
            )
        except ValueError as e:
            raise Fault(f"{self.file}: {e}", 2) from e

    def serve_config(self) -> ServeConfig:
        """Settings of the server, with the key of clients. Raises Fault."""
        name, (host, port) = self.what.api_key_file, self.what.listen
        web = ServeConfig(
            host=host,
            port=port,
            api_key=None if name is None else read_key(self.path(name), f"{self.file}: api_key_file"),
            served_name=self.served_name,
            admin=self.admin_config(),
        )
        try:
            web.check()
        except ValueError as e:
            raise Fault(f"{self.file}: {e}", 2) from e
        return web

    def admin_config(self) -> AdminConfig | None:
        """Where orders are taken, and their key; None if they are not. Raises Fault."""
        name, (host, port) = self.what.admin_key_file, self.what.admin_listen
        if name is None:
            return None
        return AdminConfig(key=read_key(self.path(name), f"{self.file}: admin_key_file"), host=host, port=port)


def read_key(path: Path, where: str) -> str:
    """The one line of a file that holds a key. Raises Fault; the key is never part of a message."""
    try:
        if not path.is_file():
            raise Fault(
                f"{where}: {path} is not a file; write the key into it: (umask 077; openssl rand -hex 32 > {path})", 2
            )
        if others_can_read(path):
            raise Fault(f"{where}: others than its owner may use {path}; run: chmod 600 {path}", 2)
        with path.open("rb") as file:
            raw = file.read(MOST_KEY_BYTES + 1)
        lines = raw.decode("ascii").split()
    except OSError as e:
        raise Fault(f"{where}: {path} cannot be read ({e.strerror})", 2) from e
    except UnicodeDecodeError as e:
        raise Fault(f"{where}: {path} holds bytes that are not plain characters; write one line of text", 2) from e
    if len(raw) > MOST_KEY_BYTES or len(lines) != 1:
        raise Fault(f"{where}: {path} must hold one key on one line, without spaces", 2)
    return lines[0]


def others_can_read(path: Path) -> bool:
    """Whether other users of this machine can use a file with a key."""
    try:
        return bool(path.stat().st_mode & 0o077)
    except OSError:
        return False
