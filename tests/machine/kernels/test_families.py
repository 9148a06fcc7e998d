"""The family of a kernel by its demangled name."""

from __future__ import annotations

import pytest

from turbofit.machine.kernels.families import decode, experts, family, gemm, prefill

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
