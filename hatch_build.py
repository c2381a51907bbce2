"""Puts the compiled CPU kernels into a wheel that is built with BRIGADE_PREBUILD=1. Must not run for anything else."""

import os
import sys
import sysconfig
import tempfile
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Prebuild(BuildHookInterface):  # type: ignore[type-arg]
    """Without the variable the wheel is the usual one for every platform, and the kernels are built at first use."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Raises RuntimeError if the library cannot be built: whoever asks for it wants no wheel without it."""
        if version == "editable" or os.environ.get("BRIGADE_PREBUILD") != "1":
            return
        sys.path.insert(0, self.root)
        from pathlib import Path

        from brigade.kernels.cpu.build import Built, prebuild

        self._folder = tempfile.TemporaryDirectory(prefix="brigade-prebuild-")
        built = prebuild(Path(self._folder.name))
        if not isinstance(built, Built):
            raise RuntimeError(str(built))
        build_data["force_include"][str(built.path)] = f"brigade/kernels/cpu/prebuilt/{built.path.name}"
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"  # it is called through ctypes: any Python will do

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_folder"):
            self._folder.cleanup()
