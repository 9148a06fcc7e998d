"""The families of TurboMind's kernels, by their demangled names.

Source: the kernels' names in the wheels of LMDeploy 0.6 to 0.18 (`bench/census`), and the template
arguments in LMDeploy's `src/turbomind/kernels`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import ctypes

#: The C++ library with the function that demangles names; TurboMind needs this library too.
_LIBRARY: Final = "libstdc++.so.6"

#: C++ types in the names, and our names for them.
_TYPES: Final = {
    "__half": "float16",
    "__nv_bfloat16": "bfloat16",
    "turbomind::uint4_t": "int4",
    "unsigned char": "int8",
    "__nv_fp8_e4m3": "fp8",
    "turbomind::fp4_e2m1_t": "mxfp4",
}
#: Our names of types by their numbers in `turbomind::DataType`, which encode the bits of exponent
#: and mantissa.
_DATA_TYPES: Final = {0x1050A: "float16", 0x10807: "bfloat16"}
_16_BITS: Final = frozenset({"float16", "bfloat16"})

_KERNEL: Final = re.compile(r"(?:void )?(?P<name>[\w:]+)")
_OPERANDS: Final = re.compile(r"::Operand_([AB])\w*<([\w: ]+)")
#: `Striding`: 0 is a single matrix, the other values are rows of experts.
_STRIDING: Final = re.compile(r"\(turbomind::gemm::Striding\)(\d)")
_ATTENTION: Final = re.compile(
    r"::Impl<turbomind::attention::\w+, (?P<type>[\w: ]+), (?P<kv>[\w: ]+), \d+, (?P<queries>\d+),"
    r" \d+, \d+, \d+, \d+, (?P<head_dim>\d+)"
)
_SM90_U4: Final = re.compile(r"::Sm90U4Format<\d+, \(turbomind::DataType\)(\d+)>")
_SM90_FORMATS: Final = {
    "Sm90Fp8E4M3Format": "fp8", "Sm90MxFp4Format": "mxfp4", "Sm90NvFp4Format": "nvfp4",
}  # fmt: skip
#: Hopper's GEMM kernels whose name tells the type of the weights.
_SM90_WEIGHTS: Final = {
    "gemm_kernel_sm90": "fp8",
    "gemm_kernel_sm90_bf16": "bfloat16",
    "gemm_universal_sm90_mxfp4_fp8": "mxfp4",
}
_OTHERS: Final[Mapping[str, str]] = {
    r"turbomind::comm::.*NVLS": "collectives over NVLink SHARP",
    r"turbomind::comm::": "collectives",
    r"turbomind::linear_attn::|turbomind::fused_conv1d": "gated delta net",
    r"turbomind::(?:AddBias)?ActivationKernel": "activation",
    r"turbomind::Moe": "routing of experts",
    r"turbomind::(?:flattenKV|ProcessKV)": "KV cache",
    r"turbomind::(?:top|sampling|softmax|curand)": "sampling",
    r"turbomind::(?:RepetitionPenalty|BanBadWords|batchApply)": "sampling",
    r"turbomind::.*Norm": "norms",
}


def gemm(weights: str, activations: str) -> str:
    """Return the name of the family of kernels that multiply weights by activations.

    ``weights`` and ``activations`` are the names of their types, such as ``int4`` and ``bfloat16``.
    """
    return f"gemm {weights} {activations}"


def experts(weights: str, activations: str) -> str:
    """Return the name of the family of kernels that multiply the weights of a layer's experts.

    ``weights`` and ``activations`` are the names of their types, as in `gemm`.
    """
    return f"experts {weights} {activations}"


def prefill(dtype: str, head_dim: int) -> str:
    """Return the name of the kernel family for attention over a prompt's tokens."""
    return f"prefill {dtype} {head_dim}"


def decode(dtype: str, kv: str, head_dim: int) -> str:
    """Return the name of the kernel family for attention in a decode step.

    ``dtype`` is the type of the queries, ``kv`` that of the KV cache.
    """
    return f"decode {dtype} {kv} {head_dim}"


def family(name: str) -> str | None:
    """Return the family's name for a kernel's demangled name; None if no plan depends on it."""
    match = _KERNEL.match(name)
    kernel = match["name"].rpartition("::")[2] if match else ""
    if kernel == "attention_kernel":
        return _attention(name)
    if kernel == "gemm_kernel":
        return _gemm(name)
    if kernel in _SM90_WEIGHTS or kernel == "gemm_kernel_sm90_mixed":
        return _sm90(kernel, name)
    beginning = name.removeprefix("void ")
    return next(
        (kernel_family for start, kernel_family in _OTHERS.items() if re.match(start, beginning)),
        None,
    )


def _attention(name: str) -> str | None:
    """Return the family of an attention kernel; None if a type in the name is unknown."""
    match = _ATTENTION.search(name)
    dtype, kv = (_TYPES.get(match[part]) if match else None for part in ("type", "kv"))
    if match is None or dtype is None or kv is None:
        return None
    head_dim = int(match["head_dim"])
    return decode(dtype, kv, head_dim) if match["queries"] == "1" else prefill(dtype, head_dim)


def _gemm(name: str) -> str | None:
    """Return the name of a GEMM kernel's family; None if the name lacks two known types.

    The operand with a 16-bit type is the activations, and the other operand is the weights.
    """
    types = {side: _TYPES.get(kind.strip()) for side, kind in _OPERANDS.findall(name)[:2]}
    kinds = [kind for kind in types.values() if kind]
    if len(kinds) != 2:
        return None
    activations = next((kind for kind in kinds if kind in _16_BITS), kinds[0])
    weights = next((kind for kind in kinds if kind not in _16_BITS), activations)
    return _of(name, weights, activations)


def _sm90(kernel: str, name: str) -> str | None:
    """Return the name of a Hopper kernel's family; None if the type of its weights is unknown.

    If the kernel's name does not say the type of the activations, the type is bfloat16.
    """
    packed = _SM90_U4.search(name)
    if packed:
        activations = _DATA_TYPES.get(int(packed[1]))
        return None if activations is None else _of(name, "int4", activations)
    weights = _SM90_WEIGHTS.get(kernel) or next(
        (kind for form, kind in _SM90_FORMATS.items() if form in name), None
    )
    return None if weights is None else _of(name, weights, "bfloat16")


def _of(name: str, weights: str, activations: str) -> str:
    rows = _STRIDING.search(name)
    return (experts if rows and rows[1] != "0" else gemm)(weights, activations)


def demangle(name: str) -> str:
    """Demangle a C++ name; other names stay as they are."""
    import ctypes  # only names of new releases are read

    function, free = _library()
    status = ctypes.c_int()
    pointer = function(name.encode(), None, None, ctypes.byref(status))
    if status.value or not pointer:
        return name
    try:
        return ctypes.string_at(pointer).decode()
    finally:
        free(pointer)


@cache
def _library() -> tuple[ctypes._NamedFuncPointer, ctypes._NamedFuncPointer]:
    """Return the C functions that demangle a name and free the result."""
    import ctypes

    function = ctypes.CDLL(_LIBRARY).__cxa_demangle
    function.restype = ctypes.c_void_p
    function.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    free = ctypes.CDLL(None).free
    free.argtypes = (ctypes.c_void_p,)
    return function, free
