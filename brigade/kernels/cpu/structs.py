"""The C++ structs and functions of layers.cpp as ctypes sees them. Field order and types must follow the C++ side."""

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path


class Matrix(ctypes.Structure):
    """Packed weights; tiles.h describes the layout."""

    _fields_ = (
        ("data", c_void_p),
        ("scales", c_void_p),
        ("sums", c_void_p),
        ("outs", c_int64),
        ("ins", c_int64),
        ("kind", c_int32),
        ("paired", c_int32),
    )


class Sequence(ctypes.Structure):
    _fields_ = tuple((name, c_int64) for name in ("row", "n", "start", "first_page", "expanded"))


class Heads(ctypes.Structure):
    _fields_ = tuple(
        (name, c_int64)
        for name in (
            *("n_kv", "group", "key_at", "key_width", "value_at", "value_width"),
            *("row_width", "key_step", "value_step"),
        )
    )


class Step(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int64),
        ("n_sequences", c_int64),
        ("page", c_int64),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("slots", c_void_p),
        ("sequences", c_void_p),
        ("pages", c_void_p),
    )


class Mla(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("norm", "q_norm", "kv_norm")),
        *((name, Matrix) for name in ("down", "q_up", "key", "value", "expand_key", "out")),
        *((name, c_int64) for name in ("dim", "n_heads", "q_rank", "kv_rank", "nope", "rope", "v")),
        *((name, c_float) for name in ("eps", "latent_eps", "scale")),
        ("interleaved", c_int32),
    )


class Gqa(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("norm", "bias")),
        *((name, Matrix) for name in ("qkv", "out")),
        *((name, c_int64) for name in ("dim", "n_kv", "group", "head_dim")),
        *((name, c_float) for name in ("eps", "scale")),
    )


class Gate(ctypes.Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("bias", c_void_p),
        *((name, c_int64) for name in ("n_experts", "top_k", "n_groups", "top_groups")),
        ("scale", c_float),
        ("normalise", c_int32),
    )


_P, _L = c_void_p, c_int64
_SIGNATURES: dict[str, tuple[object, ...]] = {
    "pool_free": (_P,),
    "pack": (_P, POINTER(Matrix)),
    "linear_float": (_P, POINTER(Matrix), _P, _L, _L, _P, _L),
    "attention": (_P, POINTER(Heads), POINTER(Step), _P, _P, _L, _P, _L),
    "mla": (_P, POINTER(Mla), POINTER(Step), _P, _L, _P),
    "gqa": (_P, POINTER(Gqa), POINTER(Step), _P, _L, _P),
    "norm_and_route": (_P, _P, _L, _P, c_float, _L, _L, _P, _L, POINTER(Gate), _P, _P, _L),
    "add_weighted": (_P, _P, _L, _P, _P, _L, _L, _P, _L, _L),
    "wire_encode": (_P, _P, _L, _L, _L, c_int32, _P),
    "wire_decode": (_P, _P, _L, _P, _L, _L, c_int32, _P, _L),
    "experts": (_P, _P, _L, _P, _P, _P, _L, _L, _L, _L, POINTER(Matrix), POINTER(Matrix)),
}


def open_library(path: Path) -> ctypes.CDLL:
    """Load the library and declare its functions, so that a wrong argument is an error and not a crash."""
    library = ctypes.CDLL(str(path))
    library.pool_new.argtypes, library.pool_new.restype = [c_int32], c_void_p
    library.copy_checked.argtypes, library.copy_checked.restype = [c_void_p] * 3 + [c_int64], c_uint64
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = list(arguments), None
    return library
