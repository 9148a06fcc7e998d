"""Which kernels a library has for which card."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.device_code import CODE, EMPTY, cubin, fatbin, library
from turbofit.kernels.census import Census, Count, empty_kernels, take_census
from turbofit.kernels.families import demangle

MOE = "_ZN9turbomind15MoeGatherKernelEv"
OTHER = "_ZN9turbomind9transposeEv"


def census(*architectures: str, ptx: tuple[str, ...] = ()) -> Census:
    return Census(library="x.so", architectures=architectures, ptx=ptx, families={})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Code for sm_80, an empty function for sm_120a, and another fat binary."""
    full, hollow = cubin({MOE: CODE, OTHER: CODE}), cubin({MOE: EMPTY, OTHER: CODE})
    path = tmp_path / "_turbomind.so"
    path.write_bytes(
        library(fatbin([(80, full, 0x11), (120, hollow, 0x100011)]), fatbin([(80, full, 0x11)]))
    )
    return path


def test_kernels_are_counted_by_family_and_architecture(path: Path) -> None:
    found = take_census(path)
    assert found.architectures == ("80", "120a")
    assert found.ptx == ()
    assert found.families == {"routing of experts": {"80": Count(code=2), "120a": Count(empty=1)}}
    assert found.count(["routing of experts", "norms"], "80") == Count(code=2)
    assert found.count(["norms"], "80") == Count()


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        ((8, 0), "80"),
        ((8, 6), "86"),
        ((8, 9), "86"),
        ((9, 0), "90a"),
        ((7, 5), None),
        ((10, 3), None),  # 100a is for 10.0 alone
        ((12, 1), None),
        ((8, 7), None),  # Jetson runs code for itself alone
    ],
)
def test_the_code_that_a_card_runs(capability: tuple[int, int], architecture: str | None) -> None:
    one = census("80", "86", "90a", "100a", "120a")
    assert one.architecture(capability) == architecture


def test_ptx_is_compiled_for_newer_cards() -> None:
    assert census(ptx=("80",)).has_ptx((12, 0))
    assert not census(ptx=("80",)).has_ptx((7, 5))
    assert not census(ptx=("90a",)).has_ptx((12, 0))


@pytest.mark.parametrize(
    ("capability", "runs"), [((8, 6), True), ((7, 5), False), ((12, 0), True), ((8, 7), False)]
)
def test_a_card_runs_cubins_or_compiled_ptx(capability: tuple[int, int], runs: bool) -> None:
    """8.7 is Tegra, which runs code for itself alone."""
    assert census("80", ptx=("90",)).runs(capability) is runs


def test_architectures_in_a_message() -> None:
    assert census("70", "90a").architecture_names() == "sm_70, sm_90a"


def test_empty_kernels_of_a_card(path: Path) -> None:
    assert empty_kernels(path, (12, 0)) == {MOE}
    assert empty_kernels(path, (8, 6)) == frozenset()
    assert empty_kernels(path, (7, 0)) == frozenset()


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    path = tmp_path / "x.so"
    path.write_bytes(b"not a library, though long enough to be mapped" * 4)
    with pytest.raises(ValueError, match="not a 64-bit"):
        take_census(path)


def test_a_mangled_name_is_read_and_another_stays() -> None:
    assert demangle("_ZN9turbomind15MoeGatherKernelEv") == "turbomind::MoeGatherKernel()"
    assert demangle("main") == "main"
