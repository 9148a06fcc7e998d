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
from turbofit.machine.kernels.families import decode, demangle, experts, family, gemm, prefill

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


# ruff: noqa: E501


GEMM = "void turbomind::gemm::gemm_kernel<turbomind::gemm::GemmUniversal<turbomind::gemm::"
SM80 = "turbomind::gemm::sm80_s16816::"
SM90 = "void turbomind::gemm::gemm_kernel_sm90"
FLAT, ROWS = "(turbomind::gemm::Striding)0", "(turbomind::gemm::Striding)2"
ATTENTION = "void turbomind::attention_kernel<turbomind::AttentionUniversal<turbomind::arch::Sm80, turbomind::attention::Mainloop<turbomind::arch::Sm80, turbomind::attention::Impl<turbomind::attention::"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"{GEMM}Sm80, {SM80}Operand_A<__half, (turbomind::gemm::Order)1>, {FLAT}, {SM80}Operand_B_Pack<turbomind::uint4_t, (turbomind::gemm::Order)0, 2>", gemm("int4", "float16")),
        (f"{GEMM}Sm80, {SM80}Operand_A<__half, (turbomind::gemm::Order)1>, {ROWS}, {SM80}Operand_B_Pack<turbomind::uint4_t, (turbomind::gemm::Order)0, 2>", experts("int4", "float16")),
        (f"{GEMM}Sm90, {SM80}Operand_A<__half, (turbomind::gemm::Order)1>, turbomind::gemm::IteratorSm80<turbomind::cache_policy::Default>, {SM80}Operand_B_Pack<turbomind::uint4_t, (turbomind::gemm::Order)0>", gemm("int4", "float16")),
        (f"{GEMM}Sm70, turbomind::gemm::sm70_s884::Operand_A<__half>, {ROWS}, turbomind::gemm::sm70_s884::Operand_B_Pack<turbomind::fp4_e2m1_t>", experts("mxfp4", "float16")),
        (f"{GEMM}Sm80, {SM80}Operand_A<__nv_fp8_e4m3, (turbomind::gemm::Order)0, 1>, {ROWS}, {SM80}Operand_B<__nv_bfloat16, (turbomind::gemm::Order)1, 16>", experts("fp8", "bfloat16")),
        (f"{GEMM}Sm80, {SM80}Operand_A<__nv_bfloat16, (turbomind::gemm::Order)1>, {ROWS}, {SM80}Operand_B<__nv_bfloat16, (turbomind::gemm::Order)1, 1>", experts("bfloat16", "bfloat16")),
        (f"{SM90}<turbomind::gemm::GemmUniversalSm90_v3<(turbomind::gemm::Order)0, 1, 2, true> >", gemm("fp8", "bfloat16")),
        (f"{SM90}_bf16<turbomind::gemm::GemmUniversalSm90_Bf16<{ROWS}> >", experts("bfloat16", "bfloat16")),
        (f"{SM90}_mixed<turbomind::gemm::GemmUniversalSm90Mixed<turbomind::gemm::Sm90U4Format<32, (turbomind::DataType)66826>, {FLAT}> >", gemm("int4", "float16")),
        (f"{SM90}_mixed<turbomind::gemm::GemmUniversalSm90Mixed<turbomind::gemm::Sm90U4Format<32, (turbomind::DataType)67591>, {ROWS}> >", experts("int4", "bfloat16")),
        (f"{SM90}_mixed<turbomind::gemm::GemmUniversalSm90Mixed<turbomind::gemm::Sm90MxFp4Format, {FLAT}> >", gemm("mxfp4", "bfloat16")),
        (f"{ATTENTION}MMA_16816, __half, __half, 1, 64, 64, 1, 16, 64, 128, 2> >", prefill("float16", 128)),
        (f"{ATTENTION}MMA_81616, __nv_bfloat16, turbomind::uint4_t, 8, 1, 64, 8, 1, 16, 64, 5> >", decode("bfloat16", "int4", 64)),
        (f"{ATTENTION}MMA_SIMT, __half, unsigned char, 1, 1, 64, 1, 1, 16, 192, 3> >", decode("float16", "int8", 192)),
        # Types that no release has yet: no plan depends on them, and none may fail over them.
        (f"{ATTENTION}MMA_16816, __half, turbomind::fp6_t, 8, 1, 64, 8, 1, 16, 64, 5> >", None),
        (f"{ATTENTION}MMA_16816, float, float, 1, 64, 64, 1, 16, 64, 128, 2> >", None),
        (f"{SM90}_mixed<turbomind::gemm::GemmUniversalSm90Mixed<turbomind::gemm::Sm90U4Format<32, (turbomind::DataType)1>, {FLAT}> >", None),
        ("void turbomind::ActivationKernel<__half>(int)", "activation"),
        ("turbomind::comm::Allreduce_NVLS_V2<float>(int)", "collectives over NVLink SHARP"),
        ("turbomind::comm::Allreduce_Simple_Pull<float>(int)", "collectives"),
        ("void cub::EmptyKernel<void>()", None),
        ("main", None),
    ],
)  # fmt: skip
def test_family_of_a_name(name: str, expected: str | None) -> None:
    assert family(name) == expected
