"""What an engine on torch needs beside turbofit, and where its processes find stand-ins."""

from __future__ import annotations

import contextlib
import importlib.util
from importlib import metadata
from pathlib import Path
from typing import Final

from turbofit.core.errors import PackageError
from turbofit.core.model import TextDims
from turbofit.pretend.environment import cuda_site
from turbofit.rehearse.spec import Spec

__all__ = ["INSIDE", "SERVED", "STAND_IN", "need_kernels", "need_packages", "needs"]

_HERE: Final = Path(__file__).parent
#: For each process of a rehearsal.
INSIDE: Final = _HERE / "torch_inside"
#: For each process of a server.
SERVED: Final = _HERE / "served_inside"
#: Has a stand-in for FlashAttention-3, which drafting does not start without.
STAND_IN: Final = _HERE / "stand_in"
_PACKAGES: Final = {
    "pytorch": ("torch", "triton", "lmdeploy", "transformers"),
    "transformers": ("torch", "transformers", "accelerate"),
}


def needs(spec: Spec) -> dict[str, str]:
    """The versions of what a rehearsal runs; see ``need_packages``."""
    ray = (None, "ray")
    several = int(spec.settings.get("tp") or 1) > 1
    backend = spec.settings.get("distributed_executor_backend")
    return need_packages(spec.engine, ray=several and backend in ray)


def need_packages(engine: str, *, ray: bool = False) -> dict[str, str]:
    """The versions of what an engine runs.

    Args:
        engine: the engine's name.
        ray: whether its workers are Ray's.

    Raises:
        PackageError: something is missing, or torch is no CUDA build.
    """
    names = (*_PACKAGES[engine], *(["ray"] if ray else []))
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise PackageError(
                f"{name} is not installed beside turbofit: rehearsing {engine} runs it",
                hint=f"pip install {'lmdeploy==0.18.0' if name == 'lmdeploy' else name}",
            )
    if cuda_site() is None:
        raise PackageError(
            f"this Python's torch is no CUDA build, which rehearsing {engine} runs",
            hint="install torch from PyPI (pip install torch==2.12.1); no GPU and no driver needed",
        )
    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def need_kernels(text: TextDims) -> None:
    """Kernels of gated delta nets, which LMDeploy requires and imports of such a model alone.

    Raises:
        PackageError: they are not there.
    """
    if text.delta is not None and importlib.util.find_spec("fla") is None:
        raise PackageError(
            f"fla is not installed beside turbofit: rehearsing {text.architecture} runs its"
            " kernels",
            hint="pip install flash-linear-attention",
        )
