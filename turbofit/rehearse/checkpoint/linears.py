"""How a checkpoint stores a linear layer or a norm: names, safetensors types and shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["LINEARS", "PACKINGS", "Entry", "dense", "norm", "stacked"]

#: Name, safetensors type and shape.
Entry = tuple[str, str, tuple[int, ...]]
_GROUP = 128
#: Weights that share an exponent in mxfp4, and a scale in compressed-tensors.
_MX_GROUP = 32


def dense(name: str, outs: int, ins: int, dtype: str, bias: bool = False) -> Iterator[Entry]:
    """A linear layer as it is computed."""
    yield f"{name}.weight", dtype, (outs, ins)
    if bias:
        yield f"{name}.bias", dtype, (outs,)


def _awq(name: str, outs: int, ins: int, dtype: str, bias: bool = False) -> Iterator[Entry]:
    yield f"{name}.qweight", "I32", (ins, outs // 8)
    yield f"{name}.qzeros", "I32", (ins // _GROUP, outs // 8)
    yield f"{name}.scales", "F16", (ins // _GROUP, outs)
    if bias:
        yield f"{name}.bias", dtype, (outs,)


def _fp8(name: str, outs: int, ins: int, dtype: str, bias: bool = False) -> Iterator[Entry]:
    yield f"{name}.weight", "F8_E4M3", (outs, ins)
    yield f"{name}.weight_scale_inv", "BF16", (-(-outs // _GROUP), -(-ins // _GROUP))
    if bias:
        yield f"{name}.bias", dtype, (outs,)


def _int4(name: str, outs: int, ins: int, dtype: str, bias: bool = False) -> Iterator[Entry]:
    """Of compressed-tensors, which packs experts alone here."""
    if ".experts." not in name:
        yield from dense(name, outs, ins, dtype, bias)
        return
    yield f"{name}.weight_packed", "I32", (outs, ins // 8)
    yield f"{name}.weight_scale", dtype, (outs, ins // _MX_GROUP)
    yield f"{name}.weight_shape", "I32", (2,)


#: Of mxfp4 the experts alone are packed.
LINEARS = {
    "": dense, "awq": _awq, "fp8": _fp8, "mxfp4": dense, "compressed-tensors": _int4,
}  # fmt: skip


def norm(name: str, size: int, dtype: str, bias: bool = False) -> Iterator[Entry]:
    """A norm's weight, and its bias where it has one."""
    yield f"{name}.weight", dtype, (size,)
    if bias:
        yield f"{name}.bias", dtype, (size,)


def stacked(name: str, shape: tuple[int, ...], dtype: str, packing: str) -> Iterator[Entry]:
    """All experts of a layer in one tensor, with biases: experts, outputs, inputs (gpt-oss)."""
    experts, outs, ins = shape
    if packing == "mxfp4":
        groups = ins // _MX_GROUP
        yield f"{name}_blocks", "U8", (experts, outs, groups, _MX_GROUP // 2)
        yield f"{name}_scales", "U8", (experts, outs, groups)
    else:
        yield name, dtype, (experts, ins, outs)
    yield f"{name}_bias", dtype, (experts, outs)


#: What a config says of each way of packing.
PACKINGS: dict[str, dict[str, Any]] = {
    "awq": {
        "quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True,
    },
    "fp8": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
    "mxfp4": {"quant_method": "mxfp4"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [
            "lm_head", "re:.*self_attn.*", "re:.*shared_experts.*",
            "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
        ],
        "config_groups": {"group_0": {
            "targets": ["Linear"], "input_activations": None, "output_activations": None,
            "weights": {
                "num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True,
                "dynamic": False, "type": "int",
            },
        }},
    },
}  # fmt: skip
