"""What the hosts of a unit must agree on before anything is loaded, as plain texts that can be shown. Opens no socket.

Each host states its terms; the head compares them. A host states only what it knows by itself: `brigade join` learns
layout and settings from the head, a host that reads a deployment file of its own states those, too.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from time import gmtime, strftime

import msgspec

from brigade.engine.config import DEMO_MODEL, EngineConfig
from brigade.engine.host_messages import FromSupervisor, ToSupervisor
from brigade.spec.config import BadConfig
from brigade.spec.layout import Layout

MAX_CLOCK_S = 5.0
"""Seconds that the clocks of two hosts may be apart: logs of several hosts are read side by side."""
_ALWAYS = ("Brigade version", "message version", "model")
_OWN = ("model", "threads")
"""Settings that may differ from host to host."""
_MAX_HEADER = 100 << 20
"""Longest header of a tensor file, as the safetensors library has it."""


def versions() -> dict[str, str]:
    """Of Brigade and of the messages between hosts: a digest of their fields, so that none can change unnoticed."""
    schema = msgspec.json.schema(ToSupervisor | FromSupervisor)
    digest = hashlib.sha256(json.dumps(schema, sort_keys=True).encode()).hexdigest()
    return {"Brigade version": metadata.version("brigade"), "message version": digest[:16]}


def layout_terms(
    layouts: Sequence[Layout], units: Sequence[EngineConfig], names: Sequence[str] = ("the unit",)
) -> dict[str, str]:
    """Of every unit: hosts with their ranks, and every setting that must be the same on all of them.

    One alone is not named; of several, the name stands before each term.
    """
    out = {"units": ", ".join(names)} if len(names) > 1 else {}
    for layout, config, name in zip(layouts, units, names, strict=True):
        of = f"{name} " if len(names) > 1 else ""
        out[f"{of}layout"] = ", ".join(f"{h.address} x{h.n_ranks}" for h in layout.hosts)
        out |= {f"{of}{f.name}": str(getattr(config, f.name)) for f in fields(config) if f.name not in _OWN}
    return out


def model_terms(folder: Path) -> dict[str, str]:
    """The digest of a checkpoint, or why there is none: the other side shows it."""
    try:
        return {"model": model_digest(folder)}
    except BadConfig as e:
        return {"model": f"not readable: {e}"}


def model_digest(folder: Path) -> str:
    """What tells one checkpoint from another without reading gigabytes, as 16 hex digits of a SHA-256.

    It covers config.json (its values, not its spacing), and of every .safetensors file the name, the size in bytes and
    each tensor's name, type and shape. It does not cover the tensors' bytes: two checkpoints of one architecture that
    were trained differently and stored alike have the same digest. Raises BadConfig, naming the file.
    """
    digest = hashlib.sha256()
    config = _read_json(folder / "config.json", (folder / "config.json").read_bytes) if folder.is_dir() else None
    if config is None:
        raise BadConfig(f"{folder}: is no folder on this host")
    digest.update(json.dumps(config, sort_keys=True).encode())
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BadConfig(f"{folder}: holds no .safetensors file")
    for path in files:
        tensors = sorted((n, t.get("dtype"), t.get("shape")) for n, t in header(path).items() if n != "__metadata__")
        digest.update(json.dumps([path.name, path.stat().st_size, tensors]).encode())
    return digest.hexdigest()[:16]


def differences(head: Mapping[str, str], host: Mapping[str, str], name: str) -> str:
    """What two hosts state differently, with both values; empty if they agree. `name` is the host's.

    Versions and model must be stated; the rest only by a host that knows it.
    """
    stated = {**dict.fromkeys(_ALWAYS, "not stated"), **host}
    return "; ".join(
        f"{term}: {head[term]} on the head, {stated[term]} on {name}"
        for term in head
        if term in stated and head[term] != stated[term]
    )


def clock_difference(head: float, host: float, name: str) -> str:
    """Empty if two clocks, in seconds since 1970, are near enough to each other."""
    if abs(head - host) <= MAX_CLOCK_S:
        return ""
    shown = [strftime("%Y-%m-%d %H:%M:%S UTC", gmtime(t)) if 0 <= t < 1e11 else str(t) for t in (head, host)]
    return (
        f"clock: {shown[0]} on the head, {shown[1]} on {name}, {abs(head - host):.0f} s apart; "
        f"{MAX_CLOCK_S:.0f} s are allowed"
    )


def folder_name(model: str) -> str:
    """How the head names its model folder to other hosts: empty for the bundled one, which lies elsewhere on each."""
    return "" if Path(model).resolve() == DEMO_MODEL.resolve() else str(Path(model).resolve())


def header(path: Path) -> dict[str, dict[str, object]]:
    def read() -> bytes:
        with path.open("rb") as file:
            n = int.from_bytes(file.read(8), "little")
            if n > min(_MAX_HEADER, path.stat().st_size):
                raise ValueError(f"its header claims {n} bytes")
            return file.read(n)

    header = _read_json(path, read)
    if not all(isinstance(t, dict) for t in header.values()):
        raise BadConfig(f"{path}: not a safetensors file; copy it again")
    return header


def _read_json(path: Path, read: Callable[[], bytes]) -> dict[str, dict[str, object]]:
    try:
        found = json.loads(read())
    except (OSError, ValueError, RecursionError) as e:
        raise BadConfig(f"{path}: cannot be read ({e}); copy it again") from e
    if not isinstance(found, dict):
        raise BadConfig(f"{path}: must be a JSON object; copy it again")
    return found
