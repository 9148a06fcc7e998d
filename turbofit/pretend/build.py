"""Builds the pretend CUDA libraries with the system's C compiler, at first use.

The result is kept in the user's cache folder under a name made of the sources,
the compiler and the interface number, so that a changed source builds anew and
nothing else ever does.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from turbofit.pretend.errors import PretendError

SOURCES = Path(__file__).parent / "csrc"
ACCOUNT = "libturbofit_pretend.so"
_FLAGS = ("-std=gnu11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra")


@dataclass(frozen=True)
class Library:
    """One shared library: its file name, its sources and its symbols' version, if any."""

    name: str
    sources: tuple[str, ...]
    version: str | None = None
    libs: tuple[str, ...] = ()


_ACCOUNT_SOURCES = (
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
)
_CUDART_SOURCES = ("cudart_device.c", "cudart_memory.c", "cudart_launch.c", "effects.c")
_NVML_SOURCES = ("nvml.c", "nvml_memory.c", "nvml_links.c", "nvml_values.c")

LIBRARIES = (
    Library(ACCOUNT, _ACCOUNT_SOURCES, libs=("-lpthread",)),
    Library("libcudart.so.12", _CUDART_SOURCES, version="libcudart.so.12"),
    Library("libcuda.so.1", ("cuda.c",)),
    Library("libcublas.so.12", ("cublas.c",), version="libcublas.so.12"),
    Library("libcublasLt.so.12", ("cublaslt.c",), version="libcublasLt.so.12"),
    Library("libnccl.so.2", ("nccl.c",), libs=("-lpthread",)),
    Library("libnvidia-ml.so.1", _NVML_SOURCES),
)


def cache_folder() -> Path:
    """The folder for built libraries, ``turbofit/pretend`` in the user's cache folder (XDG)."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "turbofit" / "pretend"


def compiler() -> list[str]:
    """The C compiler's command: ``$CC``, else the first of cc, gcc and clang on the path."""
    chosen = os.environ.get("CC", "").split()
    if chosen and shutil.which(chosen[0]):
        return chosen
    for name in ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found:
            return [found]
    raise PretendError(
        "no C compiler found, and the pretend CUDA libraries are not built yet",
        hint="install gcc or clang (Debian, Ubuntu: apt install gcc libc6-dev), or set CC",
    )


def _digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for part in (*_FLAGS, repr(LIBRARIES), sysconfig.get_platform()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]


def _compile(library: Library, folder: Path, command: list[str]) -> None:
    arguments = [*command, *_FLAGS, f"-Wl,-soname,{library.name}"]
    arguments += [str(SOURCES / source) for source in library.sources]
    if library.version:
        script = folder / f"{library.name}.map"
        script.write_text(f"{library.version} {{ global: *; }};\n", encoding="ascii")
        arguments.append(f"-Wl,--version-script={script}")
    if library.name != ACCOUNT:
        arguments += [f"-L{folder}", "-lturbofit_pretend", "-Wl,-rpath,$ORIGIN"]
    arguments += [*library.libs, "-o", str(folder / library.name)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
        raise PretendError(
            f"the C compiler could not build {library.name}: {first.strip()}",
            hint="set CC to another compiler; the sources need a C11 compiler and glibc's headers",
        )


def build(folder: Path | None = None) -> Path:
    """The folder with the built libraries; builds them (about a second) where they are missing."""
    target = (folder or cache_folder()) / _digest()
    if all((target / library.name).exists() for library in LIBRARIES):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    command = compiler()
    made = Path(tempfile.mkdtemp(prefix="building-", dir=target.parent))
    try:
        for library in LIBRARIES:
            _compile(library, made, command)
        made.chmod(0o755)
        try:
            made.rename(target)
        except OSError:  # another process was faster
            if not target.exists():
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return target
