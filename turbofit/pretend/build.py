"""Builds the pretend CUDA libraries with a C compiler, at first use or after a source changed."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from turbofit.core.process.compiler import (
    cache_folder,
    compile_c,
    find_compiler,
    make_folder,
)
from turbofit.core.process.log import LazyLogger
from turbofit.pretend.libraries import (
    ACCOUNT,
    SOURCES,
    LibraryInterface,
    PretendError,
    cuda_major,
    family_of,
    libraries_for,
    sources_of,
    wanted_from,
)

_LOG: Final = LazyLogger(__name__)

#: Increased if the folder's format changes, but no source does.
_FORM = "2"
_FLAGS = ("-std=gnu11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra")


def compiler() -> list[str]:
    """The command of a C compiler.

    Raises:
        PretendError: the machine has no C compiler.
    """
    found = find_compiler()
    if found is None:
        raise PretendError(
            "no C compiler found, and the pretend CUDA libraries are not built yet",
            hint="install gcc or clang (Debian, Ubuntu: apt install gcc libc6-dev), or set CC",
        )
    return found


def _digest(libraries: Mapping[str, LibraryInterface]) -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    parts = [(name, sources_of(name), *map(sorted, wants)) for name, wants in libraries.items()]
    for part in (_FORM, *_FLAGS, repr(parts), stub_source("", ()), sysconfig.get_platform()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]


def _compile(soname: str, wants: LibraryInterface, folder: Path, command: list[str]) -> None:
    arguments = [*command, *_FLAGS, f"-Wl,-soname,{soname}", f"-I{SOURCES}"]
    arguments.append(f"-DPRETEND_CUDA={cuda_major(soname)}")
    arguments += [str(SOURCES / source) for source in sources_of(soname)]
    if wants.versions:
        script = folder / f"{soname}.map"
        first, *more = sorted(wants.versions)
        nodes = [f"{first} {{ global: *; }};", *(f"{name} {{ }};" for name in more)]
        script.write_text("\n".join(nodes) + "\n", encoding="ascii")
        arguments.append(f"-Wl,--version-script={script}")
    if soname != ACCOUNT:
        generated = folder / f"{soname}.c"
        source = stub_source(family_of(soname) or soname, wants.names, wants.variables)
        generated.write_text(source, encoding="ascii")
        linked = [f"-L{folder}", "-lturbofit_pretend", "-Wl,-rpath,$ORIGIN"]
        arguments += [str(generated), *linked]
    arguments += ["-ldl", "-lpthread", "-o", str(folder / soname)]
    why = compile_c(arguments)
    if why is not None:
        raise PretendError(
            f"the C compiler could not build {soname}: {why}",
            hint="set CC to another compiler; the sources need a C11 compiler and glibc's headers",
        )


def build(folder: Path | None = None, site: Path | None = None) -> Path:
    """The folder of the libraries; they are built in one to three seconds if they are missing.

    ``site`` is the program's ``site-packages`` folder; None: TurboMind with CPU torch.
    """
    libraries = libraries_for(wanted_from(site) if site else None)
    target = (folder or cache_folder("pretend")) / _digest(libraries)
    if all((target / name).exists() for name in libraries):
        return target
    command = compiler()
    _LOG.info("building the pretend libraries with %s in %s", command, target)

    def compile_all(temporary: Path) -> None:
        for name, wants in libraries.items():
            _compile(name, wants, temporary, command)
        (temporary / "libcuda.so").symlink_to("libcuda.so.1")  # older Tritons link it by this name
        temporary.chmod(0o755)

    make_folder(target, compile_all)
    return target


#: Libraries whose generated functions fail, since callers would use outputs that nobody filled.
_REFUSING = ("libcudart", "libcuda")
_NOT_SUPPORTED = 801  # cudaErrorNotSupported and CUDA_ERROR_NOT_SUPPORTED

_HEAD = """\
/* Generated: entry points of %s that do nothing; one written by hand takes its place. */
#include "account.h"

#define STUB(name) \\
    __attribute__((weak, visibility("default"))) int name(void); \\
    __attribute__((weak, visibility("default"))) int name(void) \\
    { \\
        static int told; \\
        if (!told) { \\
            told = 1; \\
            pretend_stub(#name); \\
        } \\
        return %d; \\
    }
#define VARIABLE(name) __attribute__((weak, visibility("default"))) char name[4096];

"""


def stub_source(family: str, names: Iterable[str], variables: Iterable[str] = ()) -> str:
    answer = _NOT_SUPPORTED if family in _REFUSING else 0
    lines = [f"STUB({name})\n" for name in sorted(names)]
    lines += [f"VARIABLE({name})\n" for name in sorted(variables)]
    return _HEAD % (family, answer) + "".join(lines)
