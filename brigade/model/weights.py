"""Reads a checkpoint's tensors: safetensors files, checked against the table of parameters first.

Only what a rank holds is read, and experts one by one where that is asked for. FP8 block-scaled weights are dequantised
on the way. Never pickle, never code.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from brigade.model.stored import FP8, BadCheckpoint, Stored, stored_in
from brigade.spec.config import read_json
from brigade.spec.model import ModelSpec
from brigade.spec.params import Param, params

PLAIN_DTYPES = {"BF16": 2, "F16": 2, "F32": 4}
SCALE = "_scale_inv"
WITHOUT_EFFECT = (".rotary_emb.inv_freq",)
"""Tensors that old exporters wrote and that are computed here."""


class Checkpoint:
    """The tensor files of one folder, opened and checked against a spec before anything is read.

    Raises BadCheckpoint for a missing, truncated or foreign file, and for a missing, unknown or misshapen tensor.
    """

    def __init__(self, folder: Path, spec: ModelSpec, experts: Sequence[Sequence[int]] | None = None) -> None:
        """`experts`: for each layer with routed experts, those that are to be read, in this order and as often as they
        stand there; None: all. All are checked."""
        self.spec, self.experts = spec, experts
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        self._stored: dict[str, Stored] = {}
        for path in _tensor_files(folder):
            self._open[path] = _opened(path)
            for name in self._open[path].keys():  # noqa: SIM118 - not a dict
                if name in self._file_of:
                    raise BadCheckpoint(f"{path}: tensor '{name}' is also in {self._file_of[name]}; keep one")
                self._file_of[name] = path
            with path.open("rb") as file:
                self._stored |= stored_in(path, file.fileno())
        self.folder = folder
        self.params = list(params(spec))
        self._check()

    def files(self) -> list[Path]:
        """The tensor files."""
        return list(self._open)

    def n_bytes(self) -> int:
        """Bytes that load() will read."""
        return sum(self._bytes_of(p) for p in self.params)

    def reader(self, dtype: torch.dtype, progress: Callable[[int], None] = lambda n: None) -> "Reader":
        """What reads the parameter of a name as `dtype` when it is called. `progress` hears the bytes read so far."""
        return Reader(self, dtype, progress)

    def load(self, dtype: torch.dtype, progress: Callable[[int], None] = lambda n: None) -> dict[str, Tensor]:
        """Every parameter by name."""
        read = self.reader(dtype, progress)
        return {p.name: read(p.name) for p in self.params}

    def _mine(self, p: Param) -> list[str]:
        """Checkpoint tensors of a parameter that are read."""
        names = [name for name, _ in p.tensors()]
        if self.experts is None or not p.per_expert:
            return names
        layer = int(p.name.split(".")[2]) - self.spec.n_dense
        return [names[e] for e in self.experts[layer]]

    def _copy(self, name: str, out: Tensor) -> None:
        """Raises BadCheckpoint."""
        if self._dtype(name) != FP8:
            with _reading(self._file_of[name]) as file:
                self._stored[name].read_into(file.fileno(), out)
            return
        dequantize(self._tensor(name), self._tensor(name + SCALE), self._block(), out)

    def _tensor(self, name: str) -> Tensor:
        with _reading(self._file_of[name]) as file:
            return self._stored[name].read(file.fileno())

    def _block(self) -> tuple[int, int]:
        if self.spec.block_scale is None:
            raise BadCheckpoint(
                f"{self.folder}: FP8 weights, but config.json has no quantization_config with weight_block_size"
            )
        return self.spec.block_scale

    def _dtype(self, name: str) -> str:
        return str(self._open[self._file_of[name]].get_slice(name).get_dtype())

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open[self._file_of[name]].get_slice(name).get_shape())

    def _bytes_of(self, p: Param) -> int:
        names = [name for name, _ in p.tensors()]
        size = p.size // len(names) * len(self._mine(p))
        return size * PLAIN_DTYPES.get(self._dtype(names[0]), 1)

    def _check(self) -> None:
        expected: set[str] = set()
        for p in self.params:
            for name, shape in p.tensors():
                self._check_tensor(name, shape, p.scaled)
                expected |= {name, name + SCALE}
        unknown = [n for n in self._file_of if n not in expected and not self._is_known_extra(n)]
        if unknown:
            raise BadCheckpoint(
                f"{self._file_of[unknown[0]]}: tensor '{unknown[0]}' ({len(unknown)} such in all) is not part of "
                f"{self.spec.architecture} with this config.json; the two do not belong together"
            )

    def _check_tensor(self, name: str, shape: tuple[int, ...], scaled: bool) -> None:
        path = self._file_of.get(name)
        if path is None:
            raise BadCheckpoint(f"{self.folder}: tensor '{name}' is in none of the safetensors files; copy them again")
        if self._shape(name) != shape:
            raise BadCheckpoint(
                f"{path}: tensor '{name}' has shape {list(self._shape(name))}, but config.json asks for {list(shape)}; "
                "the two do not belong together, copy both from one place"
            )
        dtype = self._dtype(name)
        if dtype in PLAIN_DTYPES:
            if name + SCALE in self._file_of:
                raise BadCheckpoint(f"{path}: tensor '{name}' has scales, but its type {dtype} is not {FP8}")
            return
        if dtype != FP8 or not scaled:
            raise BadCheckpoint(f"{path}: tensor '{name}' has type {dtype}, which cannot be served")
        rows, cols = self._block()
        blocks = (-(-shape[0] // rows), -(-shape[1] // cols))
        if name + SCALE not in self._file_of:
            raise BadCheckpoint(f"{path}: tensor '{name}' is FP8 but its scales '{name + SCALE}' are missing")
        if self._dtype(name + SCALE) not in PLAIN_DTYPES:
            raise BadCheckpoint(f"{path}: scales '{name + SCALE}' have type {self._dtype(name + SCALE)}, not F32")
        if self._shape(name + SCALE) != blocks:
            raise BadCheckpoint(
                f"{path}: scales '{name + SCALE}' have shape {list(self._shape(name + SCALE))}, not {list(blocks)}"
            )

    def _is_known_extra(self, name: str) -> bool:
        """Multi-token-prediction layers, a tied head stored twice, and tables that are computed here."""
        if name.endswith(WITHOUT_EFFECT) or (self.spec.tied_head and name == "lm_head.weight"):
            return True
        parts = name.split(".")
        if parts[:2] != ["model", "layers"] or not parts[2].isdigit():
            return False
        return self.spec.n_layers <= int(parts[2]) < self.spec.n_layers + self.spec.n_mtp


class Reader:
    """Reads parameters as one type, and remembers how far it is. Every read raises BadCheckpoint and MemoryError."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, progress: Callable[[int], None]) -> None:
        self._checkpoint, self._dtype, self._progress = checkpoint, dtype, progress
        self._by_name = {p.name: p for p in checkpoint.params}
        self._done = 0

    def __call__(self, name: str) -> Tensor:
        """The parameter of this name, experts stacked."""
        p, mine, each = self._stored(name)
        out = _room(p, self._dtype, len(mine))
        for tensor, part in zip(mine, out if p.per_expert else [out], strict=True):
            self._read(tensor, each, part)
        return out

    def experts(self, name: str) -> "Experts":
        """The experts of a stacked parameter, each read when its turn comes."""
        return Experts(self, *self._stored(name))

    def _stored(self, name: str) -> tuple[Param, list[str], int]:
        """A parameter, the checkpoint's tensors of it that are read, and the bytes of each."""
        p = self._by_name[name]
        mine = self._checkpoint._mine(p)
        return p, mine, self._checkpoint._bytes_of(p) // len(mine)

    def _read(self, tensor: str, n_bytes: int, out: Tensor) -> None:
        self._checkpoint._copy(tensor, out)
        self._done += n_bytes
        self._progress(self._done)


@dataclass(frozen=True)
class Experts:
    """Experts of one parameter that come one by one, so that they need not be in memory all at once."""

    _reader: Reader
    _param: Param
    _names: list[str]
    _each: int

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[Tensor]:
        for name in self._names:
            [out] = _room(self._param, self._reader._dtype, 1)
            self._reader._read(name, self._each, out)
            yield out


def _room(p: Param, dtype: torch.dtype, n: int) -> Tensor:
    """Memory for a parameter, or for n experts of one that is stacked."""
    shape = (n, *p.shape[1:]) if p.per_expert else p.shape
    try:
        return torch.empty(shape, dtype=torch.float32 if p.exact else dtype)
    except RuntimeError as e:  # torch has no type of its own for this on the CPU
        raise MemoryError(f"no memory for '{p.name}' ({p.size} numbers as {dtype}): {e}") from e


def dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int], out: Tensor) -> None:
    """out = float8 weight times its block's scale (DeepSeek-V3, arXiv:2412.19437, section 3.3.2), a band at a time.

    weight, out: [N, M]; scale: [ceil(N / rows), ceil(M / cols)], the factor that was divided out.
    """
    rows, cols = block
    wide = scale.float().repeat_interleave(cols, 1)[:, : weight.shape[1]]
    for band, factor in enumerate(wide):
        at = slice(band * rows, (band + 1) * rows)
        out[at] = weight[at].float() * factor


def _tensor_files(folder: Path) -> Iterable[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise BadCheckpoint(
                f"{folder}: holds neither model.safetensors nor model.safetensors.index.json; copy the "
                "checkpoint's tensor files here"
            )
        return [single]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise BadCheckpoint(f"{index}: 'weight_map' must map tensor names to file names; copy the file again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise BadCheckpoint(f"{index}: '{name}' is not the plain name of a .safetensors file beside it")
        if not (folder / name).exists():
            raise BadCheckpoint(f"{folder / name}: this shard is missing; copy it beside the index")
    return [folder / name for name in names]


def _reading(path: Path) -> BinaryIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as e:
        raise BadCheckpoint(f"{path}: cannot be opened ({e.strerror}); copy it again") from e


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, json.JSONDecodeError) as e:
        raise BadCheckpoint(f"{path}: truncated or not a safetensors file ({e}); copy it again") from e
