from pathlib import Path

import pytest

from tests.kernels.device_code import CODE, cubin, elf, fatbin, library
from turbofit.core.errors import PackageError
from turbofit.kernels.device_code import entries

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
    assert all(cubin is not None and cubin.startswith(CUBIN) for _, cubin in found)


def test_ptx_is_named_and_not_read(path: Path) -> None:
    path.write_bytes(library(fatbin([(90, b".version 8.0", 0)], ptx=True)))
    assert list(entries(path)) == [("90", None)]


@pytest.mark.parametrize("flag", [0x2000, 0x8000])
def test_compressed_entries(path: Path, flag: int) -> None:
    path.write_bytes(library(fatbin([(80, CUBIN, 0x11 | flag)])))
    assert list(entries(path)) == [("80", CUBIN)]


def test_compressed_entries_need_cramjam(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(library(fatbin([(80, CUBIN, 0x2011)])))
    monkeypatch.setitem(__import__("sys").modules, "cramjam", None)
    with pytest.raises(PackageError) as caught:
        list(entries(path))
    assert caught.value.hint == "pip install cramjam"


def test_a_library_without_device_code(path: Path) -> None:
    path.write_bytes(elf({".text": b"\x90"}))
    assert list(entries(path)) == []


def test_a_broken_fat_binary(path: Path) -> None:
    whole = fatbin([(80, CUBIN, 0x11)])
    path.write_bytes(elf({".text": b"", ".nv_fatbin": whole[:16] + bytes(100)}))
    with pytest.raises(ValueError, match="a fat binary is"):
        list(entries(path))
