"""Whatever bytes a library has: it is read, or is broken, or needs a decompressor."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.hostile import hostile
from turbofit.core.errors import PackageError
from turbofit.kernels.census import empty_kernels, take_census
from turbofit.kernels.device_code import architectures, entries, functions
from turbofit.pretend.elf import dynamic_symbols, needed, needed_versions


@hostile("device_code")
def test_a_library_is_read_or_is_broken(data: bytes) -> None:
    with suppress(ValueError):
        list(functions(data))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "library.so"
        path.write_bytes(data)
        for read in (
            architectures, take_census, lambda it: empty_kernels(it, (8, 6)),
            lambda it: list(entries(it, "86")),
        ):  # fmt: skip
            with suppress(ValueError, PackageError):
                read(path)
        for look in (needed, needed_versions, lambda it: list(dynamic_symbols(it))):
            with suppress(ValueError):
                look(path)
