"""Converts a checkpoint of make_checkpoint to llama.cpp's file format in each precision. Must not import brigade.

    CONVERT/bin/python -m bench.convert_gguf /tmp/mid --source LLAMA_CPP_SOURCE --quantize LLAMA_CPP/bin/llama-quantize

Run by a Python of its own, with what llama.cpp's converter needs (bench/README.md). That converter knows tokenizers by
a fingerprint; ours cuts words as DeepSeek-V3's does but has merges of its own, so it is told the name of the cut.
"""

import argparse
import importlib
import runpy
import subprocess
import sys
from pathlib import Path

QUANTISED = ("q8_0", "q4_K_M")
PRE_TOKENIZER = "deepseek-v3"


def convert(checkpoint: Path, source: Path, target: Path) -> None:
    """Write `target` in bf16 with the converter of llama.cpp's source tree."""
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    base = importlib.import_module("conversion.base")
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: PRE_TOKENIZER
    script = source / "convert_hf_to_gguf.py"
    sys.argv = [str(script), str(checkpoint), "--outtype", "bf16", "--outfile", str(target)]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


def main() -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="bench.convert_gguf", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--source", type=Path, required=True, help="llama.cpp's source tree")
    parser.add_argument("--quantize", type=Path, required=True, help="the program llama-quantize")
    a = parser.parse_args()
    folder = a.checkpoint / "gguf"
    folder.mkdir(exist_ok=True)
    whole = folder / "bf16.gguf"
    if not whole.exists():
        convert(a.checkpoint, a.source, whole)
    for kind in QUANTISED:
        target = folder / f"{kind}.gguf"
        if not target.exists():
            subprocess.run([str(a.quantize), str(whole), str(target), kind.upper()], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
