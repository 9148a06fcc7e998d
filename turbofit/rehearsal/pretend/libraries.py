"""Lists the shared libraries of a pretend machine, and the functions that programs call in them."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from turbofit.core.errors import PackageError
from turbofit.core.version import REFERENCE
from turbofit.rehearsal.pretend.elf import dynamic_symbols, needed, needed_versions

#: As in csrc/account.h. ``_ABI``: the version of the interface. ``_NO_MEMORY``: the status of a
#: refused allocation.
_ABI, _NO_MEMORY = 5, 2
#: NVIDIA's libraries, and how the names of their functions begin; the first match counts.
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
#: A call of the CUDA driver in the C source that Triton compiles when it runs.
_CALL = re.compile(r"\b(cu[A-Z]\w+)\s*\(")
#: The name of a driver function in the library of c10, which looks functions up by name.
_NAME = re.compile(rb"(?<=\0)cu[A-Z]\w+(?=\0)")
_LOOKS_UP = "torch/lib/libc10_cuda.so"
_SHARED = re.compile(r"\.so(\.\d+)*$")
ACCOUNT = "libturbofit_pretend.so"
SOURCES = Path(__file__).parent / "csrc"
#: The C files written by hand, by family.
_BY_HAND = {
    "libcudart": (
        "cudart_device.c",
        "cudart_memory.c",
        "cudart_launch.c",
        "cudart_graph.c",
        "effects.c",
        "clock.c",
    ),
    "libcuda": ("cuda.c", "cuda_module.c"),
    "libcublas": ("cublas.c",),
    "libcublasLt": ("cublaslt.c",),
    "libcudnn": ("cudnn.c",),
    "libcusolver": ("cusolver.c",),
    "libnvrtc": ("nvrtc.c",),
    "libnccl": ("nccl.c",),
    "libnvidia-ml": ("nvml.c", "nvml_memory.c", "nvml_links.c", "nvml_values.c"),
}
#: The C files by library; the account has those that belong to no other library.
_SOURCES = {
    **_BY_HAND,
    ACCOUNT: tuple(
        sorted({path.name for path in SOURCES.glob("*.c")}.difference(*_BY_HAND.values()))
    ),
}


class PretendError(PackageError):
    """Something that the pretend machine needs is missing or unsupported (exit code 7)."""

    kind = "pretend"


def family_of(soname: str) -> str | None:
    """Return the family of a soname: ``libcudart`` for ``libcudart.so.13``; None if unknown."""
    stem = soname.partition(".so")[0]
    return stem if stem in FAMILIES else None


class LibraryInterface(NamedTuple):
    """The functions and symbol versions that programs need from one library."""

    names: frozenset[str] = frozenset()
    versions: frozenset[str] = frozenset()

    def __or__(self, other: object) -> LibraryInterface:
        assert isinstance(other, LibraryInterface)
        return LibraryInterface(*(mine | more for mine, more in zip(self, other, strict=True)))


def wanted_from(site: Path) -> dict[str, LibraryInterface]:
    """Return what packages in ``site-packages`` import from CUDA's libraries, by soname.

    The result is empty if no package calls CUDA.
    """
    interfaces: dict[str, LibraryInterface] = {}
    for library in _libraries(site):
        with suppress(OSError, ValueError):
            for soname, wants in _read(library).items():
                interfaces[soname] = interfaces.get(soname, LibraryInterface()) | wants
    # A package may call a library without a link to it, if another package links the library.
    for family in FAMILIES:
        loose = interfaces.pop(family, LibraryInterface())
        for soname in [name for name in interfaces if family_of(name) == family]:
            interfaces[soname] |= loose
    looked_up = LibraryInterface(frozenset(_by_name(site)))
    driver = interfaces.get("libcuda.so.1", LibraryInterface()) | looked_up
    if driver.names:
        interfaces["libcuda.so.1"] = driver
    return dict(sorted(interfaces.items()))


def _by_name(site: Path) -> Iterator[str]:
    """Yield the functions of the CUDA driver that programs look up by name at run time."""
    for source in (site / "triton/backends/nvidia").glob("*.c"):
        yield from _CALL.findall(source.read_text(encoding="utf-8", errors="replace"))
    library = site / _LOOKS_UP
    if library.exists():
        yield from (name.decode() for name in _NAME.findall(library.read_bytes()))


def _read(library: Path) -> dict[str, LibraryInterface]:
    """Return what a library imports from CUDA's libraries, by soname.

    If the file is not linked with the CUDA library of a function, the key is that library's family.
    """
    sonames = {family: name for name in needed(library) if (family := family_of(name))}
    if not sonames:
        return {}
    sonames.setdefault("libcuda", "libcuda.so.1")  # many libraries load the driver by name only
    names: dict[str, set[str]] = {soname: set() for soname in sonames.values()}
    for symbol in dynamic_symbols(library):
        if symbol.defined:
            continue
        family = next((name for name, begin in FAMILIES.items() if begin.match(symbol.name)), "")
        if family:
            names.setdefault(sonames.get(family, family), set()).add(symbol.name)
    versions = needed_versions(library)
    return {
        name: LibraryInterface(frozenset(called), versions.get(name, frozenset()))
        for name, called in names.items()
    }


def _libraries(site: Path) -> Iterator[Path]:
    """Yield the shared libraries of all packages that call CUDA."""
    for package in _PACKAGES:
        for path in sorted((site / package).rglob("*.so*")):
            if _SHARED.search(path.name) and path.is_file():
                yield path


#: The libraries that TurboMind links, with their symbol versions, and NVML. They are always built.
_ENGINE = {
    "libcudart.so.12": LibraryInterface(versions=frozenset({"libcudart.so.12"})),
    "libcuda.so.1": LibraryInterface(),
    "libcublas.so.12": LibraryInterface(versions=frozenset({"libcublas.so.12"})),
    "libcublasLt.so.12": LibraryInterface(versions=frozenset({"libcublasLt.so.12"})),
    "libnccl.so.2": LibraryInterface(),
    "libnvidia-ml.so.1": LibraryInterface(),
}


def libraries_for(
    wanted: Mapping[str, LibraryInterface] | None = None,
) -> dict[str, LibraryInterface]:
    """Return all libraries to build, by soname: the account, those of TurboMind, and ``wanted``."""
    libraries = {ACCOUNT: LibraryInterface(), **_ENGINE}
    for name, wants in (wanted or {}).items():
        libraries[name] = libraries.get(name, LibraryInterface()) | wants
    return libraries


LIBRARIES = libraries_for()


def sources_of(soname: str) -> tuple[str, ...]:
    """Return the names of the C files of a library."""
    return _SOURCES.get(family_of(soname) or soname, ())


def cuda_major(soname: str) -> int:
    """Return the CUDA version of a soname: 13 for ``libcudart.so.13``, 12 without a version."""
    ours = family_of(soname) in ("libcudart", "libnvrtc")
    return int(soname.rpartition(".")[2]) if ours else 12


def check_surface(engine: Path, libraries: Path) -> None:
    """Check that the built libraries have all functions that an engine's library imports.

    The check takes 0.1 s.

    Raises:
        PretendError: the engine calls functions that the libraries lack.
    """
    provided = {
        symbol.name
        for name in LIBRARIES
        for symbol in dynamic_symbols(libraries / name)
        if symbol.defined and symbol.function
    }
    ours = [FAMILIES[family] for family in map(family_of, LIBRARIES) if family]
    called = {symbol.name for symbol in dynamic_symbols(engine) if not symbol.defined} - provided
    missing = sorted(name for name in called if any(begin.match(name) for begin in ours))
    if missing:
        raise PretendError(
            f"{engine.name} calls functions that the pretend libraries lack: {', '.join(missing)}",
            hint=f"rehearse with LMDeploy {REFERENCE}.0, or report these names to turbofit",
        )


class LibraryAccount:
    """The account of this process on the pretend machine, which the library in C keeps."""

    def __init__(self, folder: Path) -> None:
        self._lib = ctypes.CDLL(str(folder / ACCOUNT))
        if self._lib.pretend_abi() != _ABI:
            raise PretendError(
                "TURBOFIT_PRETEND_LIBRARIES names libraries of another version of turbofit",
                hint="unset TURBOFIT_PRETEND_LIBRARIES",
            )
        self._lib.pretend_calls.restype = ctypes.c_uint64
        self._lib.pretend_pool_create.restype = ctypes.c_void_p

    def mark(self, phase: str) -> None:
        """Begin a phase in the timeline of this process."""
        self._lib.pretend_mark(" ".join(phase.split()).encode())

    def calls(self) -> int:
        """Return the number of CUDA calls of all threads so far."""
        return int(self._lib.pretend_calls())

    def physical(self, device: int) -> int:
        """Return the machine's index of card ``device`` of this process; -1 without such a card."""
        return int(self._lib.pretend_physical(device))

    def freeze(self) -> bool:
        """Stop all other threads that call CUDA; return False if one still runs after 5 seconds."""
        return int(self._lib.pretend_freeze(5000)) >= 0

    def thaw(self) -> None:
        """Let the stopped threads run again; without this call they run again after 5 seconds."""
        self._lib.pretend_thaw()

    def pool(self, device: int, step: int) -> ctypes.c_void_p:
        """Make a memory pool on a card; the pool grows by ``step`` bytes, and shrinks in `trim`.

        Raises:
            ValueError: there is no such pretend device.
        """
        handle = self._lib.pretend_pool_create(device)
        if not handle:
            raise ValueError(f"no pretend device {device}")
        pool = ctypes.c_void_p(handle)
        self._lib.pretend_pool_threshold(pool, ctypes.c_uint64(2**64 - 1))
        self._lib.pretend_pool_step(pool, ctypes.c_size_t(step))
        return pool

    def allocate(self, pool: ctypes.c_void_p, size: int) -> int | None:
        """Allocate ``size`` bytes from a pool; return the address, or None if the card is full.

        With 0 bytes the address is 0.
        """
        pointer, length = ctypes.c_void_p(), ctypes.c_size_t(size)
        if self._lib.pretend_pool_malloc(pool, length, ctypes.byref(pointer)) == _NO_MEMORY:
            return None
        return pointer.value or 0

    def free(self, address: int) -> None:
        """Free an allocation by its address."""
        self._lib.pretend_free(ctypes.c_void_p(address))

    def trim(self, pool: ctypes.c_void_p) -> None:
        """Return the pool's unused bytes to the card."""
        self._lib.pretend_pool_trim(pool, ctypes.c_size_t(0))
