"""Compares what an engine's library imports of CUDA with what the pretend libraries have."""

from __future__ import annotations

import re
from pathlib import Path

from turbofit.pretend.elf import dynamic_symbols
from turbofit.pretend.errors import PretendError
from turbofit.pretend.libraries import LIBRARIES

# Names that belong to the libraries we stand in for.
_OURS = re.compile(r"^(cuda[A-Z]|__cuda|cu[A-Z]|cublas|nccl|pnccl)")


def wanted(engine: Path) -> set[str]:
    """The CUDA, cuBLAS and NCCL functions that a library imports."""
    return {s.name for s in dynamic_symbols(engine) if not s.defined and _OURS.match(s.name)}


def provided(libraries: Path) -> set[str]:
    """The functions that the built pretend libraries have."""
    return {
        s.name
        for library in LIBRARIES
        for s in dynamic_symbols(libraries / library.name)
        if s.defined and s.function
    }


def check_surface(engine: Path, libraries: Path) -> None:
    """Raises PretendError that names what is missing; 0.1 s."""
    missing = sorted(wanted(engine) - provided(libraries))
    if missing:
        raise PretendError(
            f"{engine.name} calls what the pretend libraries do not have: {', '.join(missing)}",
            hint="rehearse with LMDeploy 0.18.0, or report these names to turbofit",
        )
