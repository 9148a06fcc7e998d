"""The environment of a process on a pretend machine; nothing outside that process changes."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

from turbofit.pretend.build import ACCOUNT, LIBRARIES

# Variables that would show the child another machine, or change what the engine allocates.
_DROPPED = ("CUDA_", "NVIDIA_", "TM_", "NCCL_", "LMDEPLOY_", "PYTORCH_")


def torch_folder() -> Path | None:
    """Where the installed torch is, without importing it."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def torch_has_cuda() -> bool:
    """Whether the installed torch is a CUDA build: it then brings real CUDA libraries along."""
    folder = torch_folder()
    return folder is not None and (folder / "lib" / "libtorch_cuda.so").exists()


def pretend_environment(
    libraries: Path, scenario: Path, base: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The environment for a child process on a pretend machine.

    Where torch is a CUDA build it loads real CUDA libraries by their paths; the pretend ones are
    then loaded before everything else, so that the child never reaches the real driver.

    Args:
        libraries: the folder of the built pretend libraries.
        scenario: the scenario file.
        base: the environment to start from, by default this process's.
    """
    source = os.environ if base is None else base
    env = {k: v for k, v in source.items() if not k.startswith(_DROPPED)}
    path = env.get("LD_LIBRARY_PATH", "")
    env["LD_LIBRARY_PATH"] = f"{libraries}:{path}" if path else str(libraries)
    env["TURBOFIT_PRETEND_SCENARIO"] = str(scenario)
    env["TURBOFIT_PRETEND_LIBRARIES"] = str(libraries)
    if torch_has_cuda():
        names = [ACCOUNT, *(lib.name for lib in LIBRARIES if lib.name != ACCOUNT)]
        before = env.get("LD_PRELOAD", "")
        env["LD_PRELOAD"] = " ".join([*(str(libraries / n) for n in names), before]).strip()
    return env
