"""Device code: ELF sections, fat binaries, cubins and their functions; any bytes of a library."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.hostile import hostile
from tests.machine.kernels import device_code
from tests.machine.kernels.device_code import CODE, EMPTY, cubin, elf, fatbin, library
from turbofit.core.errors import PackageError
from turbofit.machine.kernels.census import take_census
from turbofit.machine.kernels.device_code import entries, functions, sections
from turbofit.rehearsal.pretend.elf import dynamic_symbols, needed, needed_versions

CUBIN = cubin({"kernel": CODE})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "_turbomind.so"


def test_entries_of_all_fat_binaries(path: Path) -> None:
    path.write_bytes(
        library(fatbin([(80, CUBIN, 0x11), (86, CUBIN, 0x11)]), fatbin([(90, CUBIN, 0x100011)]))
    )
    found = list(entries(path))
    assert [architecture for architecture, _ in found] == ["80", "86", "90a"]
    assert all(cubin.startswith(CUBIN) for _, cubin in found)
    path.write_bytes(library(fatbin([(90, b".version 8.0", 0)], ptx=True)))
    assert list(entries(path)) == [("90", None)]  # PTX is named and not read
    path.write_bytes(elf({".text": b"\x90"}))
    assert list(entries(path)) == []


@pytest.mark.parametrize("flag", [0x2000, 0x8000])
def test_compressed_entries(path: Path, flag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(library(fatbin([(80, CUBIN, 0x11 | flag)])))
    assert list(entries(path)) == [("80", CUBIN)]
    monkeypatch.setitem(sys.modules, "cramjam", None)
    with pytest.raises(PackageError) as caught:
        list(entries(path))
    assert caught.value.hint == "pip install cramjam"


def test_a_broken_fat_binary(path: Path) -> None:
    whole = fatbin([(80, CUBIN, 0x11)])
    path.write_bytes(elf({".text": b"", ".nv_fatbin": whole[:16] + bytes(100)}))
    with pytest.raises(ValueError, match="a fat binary is"):
        list(entries(path))


def test_functions_and_sections_have_their_names_and_places() -> None:
    data = cubin({"full": CODE, "hollow": EMPTY})
    assert list(functions(data)) == [("full", False), ("hollow", True)]
    data = elf({".text": b"abc", ".nv_fatbin": b"defg"})
    found = {one.name: data[one.offset : one.offset + one.size] for one in sections(data)}
    assert (found[".text"], found[".nv_fatbin"]) == (b"abc", b"defg")


@pytest.mark.parametrize(
    ("body", "empty"),
    [
        ("LDC EXIT BRA NOP NOP", True),
        ("MOV SHFL EXIT BRA", True),  # Volta's
        ("MOV FFMA EXIT", False),
        ("MOV EXIT_IF EXIT", False),
        ("MOV BRA", False),
        ("", False),
    ],
)
def test_what_is_empty(body: str, empty: bool) -> None:
    code = [getattr(device_code, instruction) for instruction in body.split()]
    assert [empty for _, empty in functions(cubin({"kernel": code}))] == [empty]


@hostile("device_code")
def test_a_library_is_read_or_is_broken(data: bytes) -> None:
    with suppress(ValueError):
        list(functions(data))
    looks = [lambda it: list(entries(it)), lambda it: list(dynamic_symbols(it))]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "library.so"
        path.write_bytes(data)
        for look in (take_census, needed, needed_versions, *looks):
            with suppress(ValueError, PackageError):
                look(path)
