"""Which shared libraries a pretend machine has, and what each is made of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from turbofit.pretend.elf import dynamic_symbols
from turbofit.pretend.errors import PretendError
from turbofit.pretend.wants import LibraryInterface

__all__ = [
    "ACCOUNT", "LIBRARIES", "Library", "check_surface", "libraries_for", "provided", "wanted",
]  # fmt: skip

ACCOUNT = "libturbofit_pretend.so"


@dataclass(frozen=True)
class Library:
    """One shared library: its file name, its sources, and the versions that its symbols carry.

    ``names`` are entry points that must exist, ``variables`` what programs read of it; those that
    no source has are generated.
    """

    name: str
    sources: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    libs: tuple[str, ...] = ()
    names: frozenset[str] = frozenset()
    variables: frozenset[str] = frozenset()

    @property
    def family(self) -> str:
        """``libcudart`` of ``libcudart.so.13``."""
        return self.name.partition(".so")[0]

    @property
    def major(self) -> int:
        """13 of ``libcudart.so.13``; 12 where the number is not CUDA's."""
        last = self.name.rpartition(".")[2]
        return int(last) if self.family in ("libcudart", "libnvrtc") else 12


_ACCOUNT = Library(
    ACCOUNT,
    (
        "account.c",
        "process.c",
        "visible.c",
        "shared.c",
        "scenario.c",
        "addresses.c",
        "pools.c",
        "vmm.c",
        "timeline.c",
        "threads.c",
        "attributes.c",
        "stubs.c",
    ),
    libs=("-lpthread",),
)

#: What is written by hand, by family.
_BY_HAND = {
    "libcudart": (
        "cudart_device.c",
        "cudart_memory.c",
        "cudart_launch.c",
        "cudart_graph.c",
        "effects.c",
        "empty.c",
    ),
    "libcuda": ("cuda.c", "cuda_module.c"),
    "libcublas": ("cublas.c",),
    "libcublasLt": ("cublaslt.c",),
    "libcudnn": ("cudnn.c",),
    "libnvrtc": ("nvrtc.c",),
    "libnccl": ("nccl.c",),
    "libnvidia-ml": ("nvml.c", "nvml_memory.c", "nvml_links.c", "nvml_values.c"),
}
_LIBS = {"libcudart": ("-ldl",), "libnccl": ("-lpthread",)}

#: Always there: what LMDeploy's TurboMind links, with the versions it wants, and NVML.
_ENGINE = {
    "libcudart.so.12": LibraryInterface(versions=frozenset({"libcudart.so.12"})),
    "libcuda.so.1": LibraryInterface(),
    "libcublas.so.12": LibraryInterface(versions=frozenset({"libcublas.so.12"})),
    "libcublasLt.so.12": LibraryInterface(versions=frozenset({"libcublasLt.so.12"})),
    "libnccl.so.2": LibraryInterface(),
    "libnvidia-ml.so.1": LibraryInterface(),
}


def libraries_for(wanted: Mapping[str, LibraryInterface] | None = None) -> tuple[Library, ...]:
    """All libraries, the account first.

    Args:
        wanted: by soname, see ``wants.wanted_from``; what TurboMind wants is always there.
    """
    every = dict(_ENGINE)
    for name, wants in (wanted or {}).items():
        every[name] = every.get(name, LibraryInterface()) | wants
    return (_ACCOUNT, *(_library(name, wants) for name, wants in every.items()))


def _library(name: str, wants: LibraryInterface) -> Library:
    family = name.partition(".so")[0]
    return Library(
        name,
        _BY_HAND.get(family, ()),
        versions=tuple(sorted(wants.versions)),
        libs=_LIBS.get(family, ()),
        names=wants.names,
        variables=wants.variables,
    )


LIBRARIES = libraries_for()

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
