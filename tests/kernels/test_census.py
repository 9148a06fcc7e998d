"""Which kernels a library has for which card."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.device_code import CODE, EMPTY, cubin, fatbin, library
from turbofit.kernels.census import Census, Count, take_census
from turbofit.kernels.families import decode, demangle, experts, family, gemm, prefill

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


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    path = tmp_path / "x.so"
    path.write_bytes(b"not a library, though long enough to be mapped" * 4)
    with pytest.raises(ValueError, match="not a 64-bit"):
        take_census(path)


def test_a_mangled_name_is_read_and_another_stays() -> None:
    assert demangle("_ZN9turbomind15MoeGatherKernelEv") == "turbomind::MoeGatherKernel()"
    assert demangle("main") == "main"


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
