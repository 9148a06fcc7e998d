"""What the CUDA programs that are installed want from NVIDIA's libraries: functions and variables.

From it the pretend libraries get their names and the entry points that nobody wrote by hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from turbofit.pretend.elf import dynamic_symbols, needed, needed_versions

__all__ = ["FAMILIES", "LibraryInterface", "family_of", "wanted_from"]

#: NVIDIA's libraries by the beginning of their functions' names; the first that fits counts.
FAMILIES: Mapping[str, re.Pattern[str]] = {
    name: re.compile(pattern)
    for name, pattern in {
        "libcudart": r"__cuda|cuda[A-Z]",
        "libcublasLt": r"cublasLt",
        "libcublas": r"cublas",
        "libcudnn": r"cudnn",
        "libcusparseLt": r"cusparseLt",
        "libcusparse": r"cusparse",
        "libcusolver": r"cusolver",
        "libcufft": r"cufft",
        "libcurand": r"curand",
        "libcupti": r"cupti",
        "libcufile": r"cuFile",
        "libnvshmem_host": r"nvshmem",
        "libnvrtc": r"nvrtc",
        "libnvJitLink": r"nvJitLink",
        "libnvToolsExt": r"nvtx",
        "libnccl": r"p?nccl",
        "libnvidia-ml": r"nvml[A-Z]",
        "libcuda": r"cu[A-Z]",
    }.items()
}

#: Packages whose libraries call CUDA.
_PACKAGES = ("torch/lib", "torchvision", "torchaudio", "lmdeploy", "flash_attn", "xformers", "vllm")
#: Triton compiles a part of itself where it runs; its source says what it calls.
_CALL = re.compile(r"\b(cu[A-Z]\w+)\s*\(")
#: c10 looks up functions of the driver by name; the names lie in its library.
_NAME = re.compile(rb"(?<=\0)cu[A-Z]\w+(?=\0)")
_LOOKS_UP = "torch/lib/libc10_cuda.so"
_SHARED = re.compile(r"\.so(\.\d+)*$")


def family_of(soname: str) -> str | None:
    """``libcudart`` for ``libcudart.so.13``; None for what is not NVIDIA's."""
    stem = soname.partition(".so")[0]
    return stem if stem in FAMILIES else None


class LibraryInterface(NamedTuple):
    """What programs want of one library: functions, versions of its symbols, and variables."""

    names: frozenset[str] = frozenset()
    versions: frozenset[str] = frozenset()
    variables: frozenset[str] = frozenset()

    def __or__(self, other: object) -> LibraryInterface:
        """Both."""
        assert isinstance(other, LibraryInterface)
        return LibraryInterface(
            self.names | other.names,
            self.versions | other.versions,
            self.variables | other.variables,
        )


def wanted_from(site: Path) -> dict[str, LibraryInterface]:
    """What the packages in a ``site-packages`` folder import, by soname.

    Reads ELF headers only, about 0.3 s for torch. Empty where nothing there calls CUDA.
    """
    found: dict[str, LibraryInterface] = {}
    for library in _libraries(site):
        for soname, wants in _wants(library).items():
            found[soname] = found.get(soname, LibraryInterface()) | wants
    for family in FAMILIES:  # what is called without being linked, from whoever has linked it
        loose = found.pop(family, LibraryInterface())
        for soname in [name for name in found if family_of(name) == family]:
            found[soname] |= loose
    driver = found.get("libcuda.so.1", LibraryInterface()) | LibraryInterface(
        frozenset(_by_name(site))
    )
    if driver.names:
        found["libcuda.so.1"] = driver
    return dict(sorted(found.items()))


def _by_name(site: Path) -> Iterator[str]:
    """Functions of the driver that are not imported but looked up where they are needed."""
    for source in (site / "triton/backends/nvidia").glob("*.c"):
        yield from _CALL.findall(source.read_text(encoding="utf-8", errors="replace"))
    library = site / _LOOKS_UP
    if library.exists():
        yield from (name.decode() for name in _NAME.findall(library.read_bytes()))


def _wants(library: Path) -> dict[str, LibraryInterface]:
    """Empty for a file that is no library of this kind of machine."""
    try:
        return _read(library)
    except (OSError, ValueError):
        return {}


def _read(library: Path) -> dict[str, LibraryInterface]:
    """By soname; by family what the library calls of others without linking them itself."""
    sonames = {family: name for name in needed(library) if (family := family_of(name))}
    if not sonames:
        return {}
    sonames.setdefault("libcuda", "libcuda.so.1")  # it is often loaded by name only
    names: dict[str, set[str]] = {family: set() for family in sonames}
    variables: dict[str, set[str]] = {family: set() for family in sonames}
    loose: dict[str, set[str]] = {}
    for symbol in dynamic_symbols(library):
        if symbol.defined:
            continue
        family = next((name for name, begin in FAMILIES.items() if begin.match(symbol.name)), None)
        if symbol.data:
            variables.get(family or "", set()).add(symbol.name)
        elif family is not None:
            names.get(family, loose.setdefault(family, set())).add(symbol.name)
    versions = needed_versions(library)
    found = {
        family: LibraryInterface(frozenset(called)) for family, called in loose.items() if called
    }
    return found | {
        soname: LibraryInterface(
            frozenset(names[family]),
            versions.get(soname, frozenset()),
            frozenset(variables[family]),
        )
        for family, soname in sonames.items()
    }


def _libraries(site: Path) -> Iterator[Path]:
    for package in _PACKAGES:
        for path in sorted((site / package).rglob("*.so*")):
            if _SHARED.search(path.name) and path.is_file():
                yield path
