"""Closed formulas for what a checkpoint holds: parameters, and bytes as stored.

Counts equal Transformers' own on the meta device. Bytes are exact for unquantised checkpoints; for
quantised ones they follow the method's published layout and err low by a few KiB of alignment.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from turbofit.core.model import DTYPE_BYTES, MlaDims, Model, Quantization, TextDims, VisionDims
from turbofit.core.struct import Struct
from turbofit.model.towers import audio_parameters, vision_parameters

_PAGE: Final = 2 << 20
#: What checkpoints call the linear layers that a config can exempt.
_MODULES: Final = {
    **{name: f"self_attn.{name}_proj" for name in "qkvo"},
    "delta.qkv": "linear_attn.in_proj_qkv",
    "delta.z": "linear_attn.in_proj_z",
    "delta.o": "linear_attn.out_proj",
    "mlp.gate_up": "mlp.gate_proj",
    "mlp.down": "mlp.down_proj",
    "expert.gate_up": "mlp.experts.0.gate_proj",
    "expert.down": "mlp.experts.0.down_proj",
    "shared.gate_up": "mlp.shared_expert.gate_proj",
    "shared.down": "mlp.shared_expert.down_proj",
}
#: Rows of Llama 3.2 Vision's embeddings beyond its vocabulary; one of them is the image's token.
CROSS_EMBEDDINGS: Final = 8

#: Bytes of one group's scale and zero point per output, as stored, by method.
_GROUP_BYTES: Final[dict[str, float]] = {
    "awq": 2.5,  # float16 scale, 4-bit zero
    "gptq": 2.5,
    "compressed-tensors": 2.0,  # symmetric: no zeros are stored
    "mxfp4": 1.0,  # one shared exponent
}
#: A zero point of 4 bits, where compressed-tensors packs asymmetrically.
_ZERO_BYTES: Final = 0.5


class Linear(Struct):
    """Linear layers of one shape: ``count`` of them, ``inputs`` x ``outputs`` each."""

    name: str
    inputs: int
    outputs: int
    count: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Elements of all of them, without biases."""
        return self.inputs * self.outputs * self.count

    @property
    def biases(self) -> int:
        """Bias elements of all of them."""
        return self.outputs * self.count if self.bias else 0


def text_linears(text: TextDims) -> tuple[Linear, ...]:
    """The linear layers that quantisation packs: attention and (expert) MLPs, unfused."""
    hidden, layers = text.hidden, text.layers
    query, key = text.heads * text.head_dim, text.kv_heads * text.head_dim
    attention, gated = text.attention_layers, 2 if text.output_gate else 1
    shapes = [
        ("q", hidden, gated * query, attention, text.qkv_bias),
        ("k", hidden, key, attention, text.qkv_bias),
        ("v", hidden, key, attention, text.qkv_bias),
        ("o", query, hidden, attention, text.output_bias),
    ]
    if text.mla:
        shapes = _latent(text, text.mla)
    if text.delta:
        shapes += [
            ("delta.qkv", hidden, text.delta.channels, text.delta.layers, False),
            ("delta.z", hidden, text.delta.values, text.delta.layers, False),
            ("delta.o", text.delta.values, hidden, text.delta.layers, False),
        ]
    if text.vision_experts:
        bias = text.vision_expert_bias
        shapes += [
            ("vision.q", hidden, query, layers, bias),
            ("vision.k", hidden, key, layers, bias),
            ("vision.v", hidden, key, layers, bias),
            ("vision.o", query, hidden, layers, False),
            *_mlp("vision.mlp", hidden, text.intermediate, layers),
        ]
    moe = text.moe
    dense = layers - (moe.layers if moe else 0)
    shapes += _mlp("mlp", hidden, text.intermediate, dense, bias=text.mlp_bias)
    if moe:
        experts = moe.layers * moe.experts
        shapes += _mlp("expert", hidden, moe.intermediate, experts, bias=text.mlp_bias)
        if moe.shared_intermediate:
            shapes += _mlp("shared", hidden, moe.shared_intermediate, moe.layers)
    return tuple(
        Linear(name=name, inputs=inputs, outputs=outputs, count=count, bias=bias)
        for name, inputs, outputs, count, bias in shapes
        if count
    )


def _latent(text: TextDims, mla: MlaDims) -> list[tuple[str, int, int, int, bool]]:
    """Attention to latents: into those of queries and of keys and values, and out of them."""
    hidden, layers, bias = text.hidden, text.layers, text.qkv_bias
    shapes = [
        ("kv_a", hidden, mla.kv_rank + mla.rope_dim, layers, bias),
        ("kv_b", mla.kv_rank, text.heads * (mla.nope_dim + mla.v_dim), layers, False),
        ("q", mla.q_rank or hidden, text.heads * (mla.nope_dim + mla.rope_dim), layers, False),
        ("o", text.heads * mla.v_dim, hidden, layers, text.output_bias),
    ]
    return [("q_a", hidden, mla.q_rank, layers, bias), *shapes] if mla.q_rank else shapes


def _mlp(
    name: str, hidden: int, inter: int, count: int, *, bias: bool = False
) -> list[tuple[str, int, int, int, bool]]:
    """A gated MLP: gate and up, then down."""
    return [
        (f"{name}.gate_up", hidden, inter, 2 * count, bias),
        (f"{name}.down", inter, hidden, count, bias),
    ]


def text_parameters(text: TextDims) -> int:
    """Parameters of the language model, embeddings and head included (once where tied)."""
    linears = sum(linear.weights + linear.biases for linear in text_linears(text))
    embeddings = text.vocab * text.hidden * (1 if text.tie_word_embeddings else 2)
    norms = (text.layer_norms * text.layers + 1) * text.hidden * (2 if text.norm_bias else 1)
    norms += text.vocab if text.head_bias else 0
    if text.qk_norm:
        norms += 2 * text.attention_layers * text.head_dim
    if text.mla:
        norms += text.layers * (text.mla.q_rank + text.mla.kv_rank)
    if text.sinks:
        norms += text.attention_layers * text.heads
    norms += 2 * text.kv_heads * text.fourier**2
    return linears + embeddings + norms + _routers(text) + _cross(text) + delta_parameters(text)


def delta_parameters(text: TextDims) -> int:
    """Elements of gated delta nets that are never packed.

    The projection to two gates a value head, their biases, the convolution, a norm of one head.
    """
    delta = text.delta
    if delta is None:
        return 0
    gates = 2 * delta.value_heads * (text.hidden + 1)
    return delta.layers * (gates + delta.channels * delta.kernel + delta.value_dim)


def _cross(text: TextDims) -> int:
    """What Llama 3.2 Vision has more: two norms of a head and two gates a layer; embeddings."""
    if not text.cross_layers:
        return 0
    return len(text.cross_layers) * (2 * text.head_dim + 2) + CROSS_EMBEDDINGS * text.hidden


def _routers(text: TextDims) -> int:
    """Elements of the expert gates with their biases, and of the gate of the shared expert."""
    if text.moe is None:
        return 0
    rows = text.moe.experts + (1 if text.moe.shared_intermediate and text.moe.shared_gate else 0)
    biases = text.moe.experts if text.moe.router_bias or text.moe.correction else 0
    return text.moe.layers * (rows * text.hidden + biases)


def parameters(text: TextDims, vision: VisionDims | None) -> int:
    """Parameters of the whole checkpoint."""
    total = text_parameters(text)
    if vision is not None:
        total += vision_parameters(vision, text.hidden)
        total += audio_parameters(vision.audio, text.hidden) if vision.audio else 0
    return total


def stored_bytes(
    text: TextDims, vision: VisionDims | None, dtype: str, quantization: Quantization | None
) -> int:
    """Bytes of all tensors as stored in the checkpoint.

    Quantisation packs the text model's linear layers but those that its config exempts;
    embeddings, head, norms, biases, routers and the vision tower stay in ``dtype``.
    """
    total = parameters(text, vision) * DTYPE_BYTES[dtype]
    if quantization is None:
        return total
    return (
        total
        + sum(exempt_bytes(text, dtype, quantization).values())
        + sum(
            packed_bytes(linear, quantization) - linear.weights * DTYPE_BYTES[dtype]
            for linear in text_linears(text)
            if is_packed(linear, quantization)
        )
    )


@lru_cache
def exempt_bytes(text: TextDims, dtype: str, quantization: Quantization) -> dict[str, int]:
    """By linear layers' name, how many bytes more they take where their config exempts them."""
    if not quantization.unconverted:
        return {}
    period = text.layers // text.attention_layers if text.delta else 1
    extra = {}
    for linear in text_linears(text):
        module = _MODULES.get(linear.name)
        if module is None or not is_packed(linear, quantization):
            continue
        layers = list(range(text.layers))
        if linear.name.startswith("delta."):
            layers = [layer for layer in layers if (layer + 1) % period]
        elif module.startswith("self_attn."):
            layers = [layer for layer in layers if (layer + 1) % period == 0]
        elif text.moe:
            dense = text.layers - text.moe.layers
            layers = layers[:dense] if linear.name.startswith("mlp.") else layers[dense:]
        exempt = sum(quantization.exempts(module, layer) for layer in layers)
        more = linear.weights * DTYPE_BYTES[dtype] - packed_bytes(linear, quantization)
        extra[linear.name] = more * exempt // len(layers)
    return extra


def unpacked_bytes(model: Model) -> int:
    """Bytes by which a quantised checkpoint exceeds a wholly packed one: layers left at 16 bits.

    Their names differ by toolkit, so files' bytes count where they are known. Differences below a
    page are rounding of scales.
    """
    if model.quantization is None:
        return 0
    exempt = sum(exempt_bytes(model.text, model.dtype, model.quantization).values())
    if model.source.sizes != "file":
        return exempt
    packed = stored_bytes(model.text, model.vision, model.dtype, model.quantization) - exempt
    extra = model.weight_bytes - packed
    return extra if extra > _PAGE else 0


def is_packed(linear: Linear, quantization: Quantization | None) -> bool:
    """Whether these layers are stored packed."""
    if quantization is None:
        return False
    return not quantization.of_experts or linear.name.startswith("expert.")


def packed_bytes(linear: Linear, quantization: Quantization) -> int:
    """Bytes of the packed weights, scales and zeros of these layers."""
    weights = linear.weights * quantization.bits // 8
    if quantization.method == "fp8":
        blocks = -(-linear.inputs // 128) * -(-linear.outputs // 128)
        return weights + 4 * blocks * linear.count
    groups = -(-linear.inputs // (quantization.group_size or linear.inputs))
    group_bytes = _GROUP_BYTES[quantization.method] + quantization.asymmetric * _ZERO_BYTES
    return weights + int(groups * linear.outputs * group_bytes) * linear.count
