"""Checks the packages that engines need; names the folders with stand-ins for their processes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final

from turbofit.core.errors import PackageError
from turbofit.core.installation import installed, without_gpu
from turbofit.core.plan import Plan
from turbofit.core.version import REFERENCE
from turbofit.machine.kernels.census import turbomind_library
from turbofit.rehearsal.pretend.build import build
from turbofit.rehearsal.pretend.command import cuda_site
from turbofit.rehearsal.pretend.libraries import check_surface
from turbofit.rehearsal.spec import Spec

_HERE: Final = Path(__file__).parent / "torch"
#: The folder whose modules each process of an engine on torch finds first.
INSIDE: Final = _HERE / "inside"
#: The folder whose modules each process of an engine with a draft finds first.
DRAFT: Final = _HERE / "draft_inside"
_LMDEPLOY: Final = f"lmdeploy=={REFERENCE}.0"
_PINNED: Final = {"lmdeploy": _LMDEPLOY}
_CUDA_TORCH: Final = (
    "install torch from PyPI (pip install torch==2.12.1), which brings Triton; no GPU and no driver"
    " needed"
)
_CALLED: Final = {
    "turbomind": "TurboMind", "pytorch": "LMDeploy's PyTorch engine", "transformers": "Transformers"
}  # fmt: skip
_PACKAGES: Final = {
    "turbomind": ("lmdeploy",),
    "pytorch": ("torch", "triton", "lmdeploy", "transformers"),
    "transformers": ("torch", "transformers", "accelerate"),
}


def needs(spec: Spec) -> dict[str, str]:
    """Check the packages that a rehearsal runs; return their versions.

    Raises:
        PackageError: a package or a C compiler is missing, or TurboMind's library calls a function
            that has no stand-in.
    """
    on_torch = "torch" in _PACKAGES[spec.engine]
    if not on_torch:
        check_surface(engine_library(), build(site=cuda_site()))
    several = on_torch and int(spec.settings.get("tp") or 1) > 1
    backend = spec.settings.get("distributed_executor_backend")
    return need_packages(spec.engine, ray=several and backend in (None, "ray"))


def engine_library() -> Path:
    """Return the path of TurboMind's shared library in the installed wheel.

    Raises:
        PackageError: the library is not installed.
    """
    library = turbomind_library()
    if library is None:
        raise PackageError(
            "LMDeploy's TurboMind library is not installed",
            hint=f"install it beside turbofit: pip install {_LMDEPLOY}{without_gpu()}",
        )
    return library


def need_packages(engine: str, *, ray: bool = False) -> dict[str, str]:
    """Check an engine's packages; return their versions.

    Raises:
        PackageError: a package is missing, or the installed torch is a CPU build.
    """
    names = (*_PACKAGES[engine], *(["ray"] if ray else []))
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    hint = f"pip install {' '.join(_PINNED.get(name, name) for name in missing)}"
    if "torch" in names and cuda_site() is None:
        missing = ["a CUDA build of torch", *(name for name in missing if name != "torch")]
        hint = without_gpu(pytorch=True) or _CUDA_TORCH
    if missing:
        raise PackageError(
            f"{_CALLED[engine]} on pretend GPUs needs packages that this environment lacks:"
            f" {', '.join(missing)}",
            hint=hint,
        )
    return {name: version for name in names if (version := installed(name)) is not None}


def need_engine(plan: Plan) -> None:
    """Check the packages of a plan's engine for pretend GPUs, if the engine runs on torch.

    Raises:
        PackageError: a package is missing, or the installed torch is a CPU build.
    """
    if plan.backend.on_torch:
        need_packages(plan.backend.name, ray=plan.tp > 1)
