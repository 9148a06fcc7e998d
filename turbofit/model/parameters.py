"""Counts a checkpoint's parameters, and its bytes as stored, over all tensors.

Counts equal those of Transformers on the meta device. Bytes of unquantised checkpoints are exact.
Bytes of quantised checkpoints follow the method's published layout, and miss a few KiB of
alignment.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from turbofit.core.model import DTYPE_BYTES, Model, Quantization, TextDims, VisionDims
from turbofit.model.tensors import Tensor, elements, linears, text_tensors
from turbofit.model.towers import tower_tensors

_PAGE: Final = 2 << 20
#: Names, in checkpoints, of the linear layers that a config can exempt.
_MODULES: Final = {
    **{name: f"self_attn.{name}_proj" for name in "qkvo"},
    "q_b": "self_attn.q_b_proj",
    "delta.qkv": "linear_attn.in_proj_qkv",
    "delta.z": "linear_attn.in_proj_z",
    "delta.o": "linear_attn.out_proj",
    **{f"mlp.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    **{f"expert.{name}": f"mlp.experts.0.{name}_proj" for name in ("gate", "up", "down")},
    **{f"shared.{name}": f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")},
}

#: Stored bytes of a scale with its zero point, by method. Each output has one scale for each group
#: of inputs.
_GROUP_BYTES: Final[dict[str, float]] = {
    "awq": 2.5,  # float16 scale, 4-bit zero point
    "gptq": 2.5,
    "compressed-tensors": 2.0,  # symmetric, so without zero points
    "mxfp4": 1.0,  # one shared exponent
}
#: Bytes of a 4-bit zero point, which asymmetric compressed-tensors stores.
_ZERO_BYTES: Final = 0.5


@lru_cache
def text_parameters(text: TextDims) -> int:
    """Return the number of parameters of the language model, with embeddings and head.

    A head that is tied to the embeddings is not counted again.
    """
    return elements(text_tensors(text))


def parameters(text: TextDims, vision: VisionDims | None) -> int:
    """Return the number of parameters of the whole checkpoint."""
    towers = elements(tower_tensors(vision, text.hidden)) if vision is not None else 0
    return text_parameters(text) + towers


def stored_bytes(
    text: TextDims, vision: VisionDims | None, dtype: str, quantization: Quantization | None
) -> int:
    """Return the bytes of all tensors as stored in the checkpoint.

    Quantisation packs the language model's linear layers, except layers that its config exempts.
    Embeddings, head, norms, biases, routers and the vision tower stay in ``dtype``.
    """
    total = parameters(text, vision) * DTYPE_BYTES[dtype]
    if quantization is None:
        return total
    return (
        total
        + sum(exempt_bytes(text, dtype, quantization).values())
        + sum(
            [
                packed_bytes(linear, quantization) - linear.weights * DTYPE_BYTES[dtype]
                for linear in linears(text)
                if is_packed(linear, quantization)
            ]
        )
    )


@lru_cache
def exempt_bytes(text: TextDims, dtype: str, quantization: Quantization) -> dict[str, int]:
    """Return, by role, the bytes that layers gain because they are left unquantised.

    Only layers that the checkpoint's quantisation would otherwise pack are counted.
    """
    if not quantization.unconverted:
        return {}
    extra = {}
    for linear in linears(text):
        module, layers = _MODULES.get(linear.role), linear.layers
        if module is None or not layers or not is_packed(linear, quantization):
            continue
        exempt = sum(quantization.exempts(module, layer) for layer in layers)
        more = linear.weights * DTYPE_BYTES[dtype] - packed_bytes(linear, quantization)
        extra[linear.role] = more * exempt // len(layers)
    return extra


def unpacked_bytes(model: Model) -> int:
    """Return by how many bytes layers in 16 bits make a quantised checkpoint larger.

    Each toolkit names such layers differently, so the result follows from the sizes of the files,
    if these are known. A difference of at most ``_PAGE`` bytes counts as rounding of scales, and
    gives 0.
    """
    if model.quantization is None:
        return 0
    exempt = sum(exempt_bytes(model.text, model.dtype, model.quantization).values())
    if model.source.sizes != "file":
        return exempt
    packed = stored_bytes(model.text, model.vision, model.dtype, model.quantization) - exempt
    extra = model.weight_bytes - packed
    return extra if extra > _PAGE else 0


def is_packed(linear: Tensor, quantization: Quantization | None) -> bool:
    """Return whether quantisation packs these linear layers."""
    if quantization is None or not linear.packs:
        return False
    return not quantization.of_experts or linear.part == "expert"


def packed_bytes(linear: Tensor, quantization: Quantization) -> int:
    """Return the bytes of packed weights, scales and zero points of these layers."""
    outputs, inputs = linear.shape
    weights = linear.weights * quantization.bits // 8
    if quantization.method == "fp8":  # with a float32 scale for each block of 128 x 128
        return weights + 4 * -(-inputs // 128) * -(-outputs // 128) * linear.count
    groups = -(-inputs // (quantization.group_size or inputs))
    group_bytes = _GROUP_BYTES[quantization.method] + quantization.asymmetric * _ZERO_BYTES
    return weights + int(groups * outputs * group_bytes) * linear.count
