"""Builds the pretend CUDA libraries with a C compiler, at first use or after a source changed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from turbofit.core.process.files import private_folder, state_dir, sync_folder
from turbofit.core.process.log import LazyLogger
from turbofit.rehearsal.pretend.libraries import (
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

#: Increase this number if the folder's format changes while no source file changes.
_FORM = "2"
_FLAGS = ("-std=gnu11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra")


#: Seconds that the compiler may take for one library: on a dead file system it would never end.
_COMPILER_SECONDS: Final = 60.0
#: The name of the file that has the digest of all libraries in its folder.
_SHA256: Final = "SHA256"
#: Libraries whose generated functions return an error: a caller would read outputs that the
#: generated function did not write.
_REFUSING = ("libcudart", "libcuda")
_NOT_SUPPORTED = 801  # cudaErrorNotSupported and CUDA_ERROR_NOT_SUPPORTED
_HEAD = """\
/* Generated: entry points of %s that do nothing. A function written by hand replaces its stub. */
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
"""


def find_compiler() -> list[str] | None:
    """Return the command of a C compiler: ``CC``, else one in ``PATH``; None without a compiler."""
    chosen = os.environ.get("CC", "").split()
    if chosen and shutil.which(chosen[0]):
        return chosen
    paths = filter(None, map(shutil.which, ("cc", "gcc", "clang")))
    return [path] if (path := next(paths, None)) else None


def compiler() -> list[str]:
    """Return the command of a C compiler.

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
    """Return the name of the libraries' folder: a digest of all that decides their content."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    parts = [(name, sources_of(name), *map(sorted, wants)) for name, wants in libraries.items()]
    for part in (_FORM, *_FLAGS, repr(parts), stub_source("", ()), sysconfig.get_platform()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]


def _compile(soname: str, wants: LibraryInterface, folder: Path, command: list[str]) -> None:
    """Compile one library into a folder.

    Raises:
        PretendError: the compiler fails, or takes too long.
    """
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
        source = stub_source(family_of(soname) or soname, wants.names)
        generated.write_text(source, encoding="ascii")
        linked = [f"-L{folder}", "-lturbofit_pretend", "-Wl,-rpath,$ORIGIN"]
        arguments += [str(generated), *linked]
    arguments += ["-ldl", "-lpthread", "-o", str(folder / soname)]
    try:
        done = subprocess.run(
            arguments, capture_output=True, text=True, timeout=_COMPILER_SECONDS, check=False
        )
        errors = done.stderr if done.returncode else None
    except subprocess.TimeoutExpired:
        errors = f"{command[0]} did not end in {_COMPILER_SECONDS:.0f} s"
    except OSError as exc:
        errors = str(exc)
    if errors is not None:
        why = next((line for line in errors.splitlines() if "error" in line), errors)
        raise PretendError(
            f"the C compiler could not build {soname}: {why}",
            hint="set CC to another compiler; the sources need a C11 compiler and glibc's headers",
        )


def build(folder: Path | None = None, site: Path | None = None) -> Path:
    """Return the folder of the libraries; build them if they are missing (one to three seconds).

    Only this user and root can change the files. ``site`` is the ``site-packages`` folder of the
    program that will run; None for TurboMind with CPU torch.

    Raises:
        PretendError: other users can change the folder, or the libraries cannot be built.
    """
    libraries = libraries_for(wanted_from(site) if site else None)
    try:
        target = private_folder(folder or state_dir("pretend", make=False)) / _digest(libraries)
        if not _is_whole(target, libraries):
            _build(target, libraries)
    except OSError as exc:
        raise PretendError(
            f"the pretend CUDA libraries cannot be kept: {exc.filename}: {exc.strerror or exc}",
            hint="set XDG_STATE_HOME to a folder that only you can write",
        ) from None
    return target


def _build(target: Path, libraries: Mapping[str, LibraryInterface]) -> None:
    """Build the whole folder or nothing, even if the power fails.

    Another process may build the same folder at the same time.
    """
    command = compiler()
    _LOG.info("building the pretend libraries with %s in %s", command, target)
    temporary = Path(tempfile.mkdtemp(prefix="building-", dir=target.parent))
    try:
        complete = temporary / "made"
        complete.mkdir(mode=0o700)
        for name, wants in libraries.items():
            _compile(name, wants, complete, command)
        (complete / _SHA256).write_text(_content(complete, libraries), encoding="ascii")
        for path in complete.iterdir():
            sync_folder(path)
        # Older versions of Triton link this name.
        (complete / "libcuda.so").symlink_to("libcuda.so.1")
        sync_folder(complete)
        if not _is_whole(target, libraries):  # another process may have built the folder meanwhile
            with suppress(FileNotFoundError):
                target.rename(temporary / "damaged")
            complete.rename(target)
            sync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _content(folder: Path, libraries: Iterable[str]) -> str:
    """Return the digest of the libraries' bytes."""
    digest = hashlib.sha256()
    for name in libraries:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _is_whole(folder: Path, libraries: Iterable[str]) -> bool:
    """Return whether a folder has all libraries, undamaged."""
    try:
        private_folder(folder, make=False)
        return (folder / _SHA256).read_text("ascii") == _content(folder, libraries)
    except (FileNotFoundError, ValueError):
        return False


def stub_source(family: str, names: Iterable[str]) -> str:
    """Return the C source of entry points that do nothing."""
    answer = _NOT_SUPPORTED if family in _REFUSING else 0
    lines = [f"STUB({name})\n" for name in sorted(names)]
    return _HEAD % (family, answer) + "".join(lines)
