"""The environment of a process on a pretend machine; nothing outside that process changes."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

from turbofit.pretend.libraries import ACCOUNT, family_of

#: Names the scenario file to the C side.
SCENARIO = "TURBOFIT_PRETEND_SCENARIO"
#: Variables that would show a child another machine.
_HIDING = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_")
#: Variables that change what an engine allocates: a rehearsal is of the plan's settings only.
CHANGING = ("CUDA_", "TM_", "NCCL_", "LMDEPLOY_", "PYTORCH_")
#: Modules that Python finds first in a process with a CUDA build of torch.
_INSIDE = Path(__file__).parent / "inside"


def cuda_site() -> Path | None:
    """The folder of packages of this Python, if its torch is a CUDA build; None otherwise."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    return folder.parent if (folder / "lib" / "libtorch_cuda.so").exists() else None


def pretend_environment(
    libraries: Path,
    scenario: Path,
    base: Mapping[str, str] | None = None,
    *,
    site: Path | None = None,
    keep: bool = False,
) -> dict[str, str]:
    """The environment for a child process on a pretend machine.

    A CUDA build of torch finds NVIDIA's libraries by their paths; the pretend ones are then loaded
    before everything else, so that the child never reaches the real driver.

    Args:
        libraries: the folder of the built pretend libraries.
        scenario: the scenario file.
        base: the environment to start from, by default this process's.
        site: the folder of packages of the child's Python, if its torch is a CUDA build.
        keep: keep variables that change what programs allocate (``PYTORCH_CUDA_ALLOC_CONF``).
    """
    source = os.environ if base is None else base
    dropped = _HIDING if keep else (*_HIDING, *CHANGING)
    env = {k: v for k, v in source.items() if not k.startswith(dropped)}
    put_first(env, "LD_LIBRARY_PATH", str(libraries))
    env[SCENARIO] = str(scenario)
    env["TURBOFIT_PRETEND_LIBRARIES"] = str(libraries)
    if site is not None:
        every = (path for path in libraries.iterdir() if path.suffix[1:].isdigit())
        names = sorted(path.name for path in every if family_of(path.name) is not None)
        loaded = " ".join(str(libraries / name) for name in (ACCOUNT, *names))
        put_first(env, "LD_PRELOAD", loaded, " ")
        put_first(env, "PYTHONPATH", str(_INSIDE))
        env["TRITON_LIBCUDA_PATH"] = str(libraries)
    return env


def find_turbofit(env: dict[str, str]) -> None:
    """Let a child import this turbofit, after what is on its path already."""
    package = str(Path(__file__).resolve().parents[2])
    before = env.get("PYTHONPATH")
    env["PYTHONPATH"] = f"{before}:{package}" if before else package


def put_first(env: dict[str, str], name: str, first: str, separator: str = ":") -> None:
    """Set a variable that is a list, before what it has."""
    rest = env.get(name)
    env[name] = f"{first}{separator}{rest}" if rest else first
