"""The census of the engine that is installed, and of released wheels."""

from __future__ import annotations

import base64
import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.machine.kernels.device_code import CODE, EMPTY, cubin, fatbin, library
from turbofit.core.process.files import state_dir
from turbofit.machine.kernels import census as module
from turbofit.machine.kernels.census import (
    Census,
    Count,
    census_of,
    installed,
    released,
    take_census,
    turbomind_library,
)
from turbofit.machine.kernels.families import demangle, experts, gemm

NAME = "lmdeploy/turbomind/_turbomind.cpython-311-x86_64-linux-gnu.so"
MOE, OTHER = "_ZN9turbomind15MoeGatherKernelEv", "_ZN9turbomind9transposeEv"
BODY = library(fatbin([(80, cubin({MOE: CODE}), 0x11)]))


@pytest.fixture(autouse=True)
def nothing_kept(state: Path) -> Iterator[None]:
    installed.cache_clear()
    yield
    installed.cache_clear()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A distribution of LMDeploy, the first one on the path."""

    def make(version: str = "0.18.0", body: bytes = BODY, digest: str | None = None) -> Path:
        site = tmp_path / "site"
        info = site / f"lmdeploy-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: lmdeploy\nVersion: {version}\n"
        )
        known = base64.urlsafe_b64encode(hashlib.sha256(body).digest()).rstrip(b"=").decode()
        (info / "RECORD").write_text(f"{NAME},sha256={digest or known},{len(body)}\n")
        path = site / NAME
        path.parent.mkdir(parents=True)
        path.write_bytes(body)
        monkeypatch.setattr(sys, "path", [str(site), *sys.path])
        return path

    return make


def test_a_library_of_ones_own_is_read_once(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = install()
    assert turbomind_library() == path
    assert installed().families == {"routing of experts": {"80": Count(code=1)}}
    monkeypatch.setattr(module, "take_census", lambda library: pytest.fail("read again"))
    assert census_of(path) == installed()
    assert len(list(state_dir("kernels").iterdir())) == 1


def test_a_released_library_is_not_read(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(digest="XDy6RN7tcW9b4a6EhZkv1mC43Ipd9Na_LCsn4aRh6qM")
    monkeypatch.setattr(module, "take_census", lambda library: pytest.fail("read"))
    assert installed() == released((0, 18, 0))


def test_what_cannot_be_read_counts_as_the_release(install: Callable[..., Path]) -> None:
    install("0.16.0", body=b"no library at all, but long enough" * 10)
    assert installed() == released((0, 16, 0))


def test_the_reference_has_no_int4_for_blackwell() -> None:
    """The figures of shared knowledge: 80 int4 kernels, all empty on sm_120, and none for rows."""
    census = released((0, 18, 0))
    names = [gemm("int4", "float16"), experts("int4", "float16")]
    assert census.count(names, "86") == Count(code=80)
    assert census.count(names, "120a") == Count(empty=80)
    assert census.count([experts("float16", "float16")], "90a") == Count()
    for version in ((0, 6, 0), (0, 9, 1), (0, 12, 3)):  # before 0.13: no code for it at all
        older = released(version)
        assert (older.architecture((12, 0)), older.architecture((8, 6))) == (None, "86")


def test_kernels_are_counted_by_family_and_architecture(tmp_path: Path) -> None:
    """Code for sm_80, an empty function for sm_120a, and another fat binary."""
    full, hollow = cubin({MOE: CODE, OTHER: CODE}), cubin({MOE: EMPTY, OTHER: CODE})
    path = tmp_path / "_turbomind.so"
    path.write_bytes(
        library(fatbin([(80, full, 0x11), (120, hollow, 0x100011)]), fatbin([(80, full, 0x11)]))
    )
    found = take_census(path)
    assert (found.architectures, found.ptx) == (("80", "120a"), ())
    assert found.families == {"routing of experts": {"80": Count(code=2), "120a": Count(empty=1)}}
    assert found.count(["routing of experts", "norms"], "80") == Count(code=2)
    assert found.count(["norms"], "80") == Count()
    names = demangle(MOE), demangle("main")  # which is not mangled
    assert names == ("turbomind::MoeGatherKernel()", "main")


def census(*architectures: str, ptx: tuple[str, ...] = ()) -> Census:
    return Census(library="x.so", architectures=architectures, ptx=ptx, families={})


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        ((8, 6), "86"),
        ((8, 9), "86"),
        ((9, 0), "90a"),
        ((7, 5), None),
        ((10, 3), None),  # 100a is for 10.0 alone
        ((8, 7), None),  # Jetson runs code for itself alone
    ],
)
def test_the_code_that_a_card_runs(capability: tuple[int, int], architecture: str | None) -> None:
    assert census("80", "86", "90a", "100a", "120a").architecture(capability) == architecture


@pytest.mark.parametrize(
    ("capability", "runs"), [((8, 6), True), ((7, 5), False), ((12, 0), True), ((8, 7), False)]
)
def test_a_card_runs_cubins_or_ptx_that_is_compiled_for_newer_ones(capability, runs) -> None:
    both = census("80", "90a", ptx=("90",))
    assert both.runs(capability) is runs
    assert both.architecture_names() == "sm_80, sm_90a"
    assert not census(ptx=("90a",)).has_ptx(capability)
