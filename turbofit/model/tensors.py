"""The list of a language model's tensors.

The bytes of a rank, the names in a rehearsal's checkpoint and the number of parameters are all
computed from this list, so a missing tensor is missing in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from math import prod
from typing import Final, Literal

from turbofit.core.model import DeltaDims, MlaDims, MoeDims, TextDims
from turbofit.core.struct import Struct

Part = Literal[
    "embedding",
    "head",
    "attention",
    "delta",
    "mlp",
    "expert",
    "shared",
    "router",
    "norm",
    "projector",
]
Split = Literal["columns", "rows", "kv_heads", "whole"]
New = Callable[..., "Tensor"]

#: Rows in Llama 3.2 Vision's embeddings beyond the vocabulary; one is for the image token.
CROSS_EMBEDDINGS: Final = 8


class Tensor(Struct):
    """All tensors of one role. Their shape is the same: outputs first, then inputs.

    ``layers`` are the numbers of the layers with this role; None for a role outside the layers.
    ``copies``: the number of tensors of this role in each layer, such as the number of experts.
    ``bias``: each tensor has a bias as long as its outputs. ``packs``: quantisation packs this role
    if it packs linear layers of ``part``.
    """

    role: str
    part: Part
    shape: tuple[int, ...]
    layers: Sequence[int] | None = None
    copies: int = 1
    bias: bool = False
    split: Split = "whole"
    packs: bool = False

    @property
    def count(self) -> int:
        """Return the number of tensors of this role in the model."""
        return self.copies if self.layers is None else self.copies * len(self.layers)

    @property
    def weights(self) -> int:
        """Return the number of parameters in all tensors of this role, without biases."""
        return prod(self.shape) * self.count

    @property
    def biases(self) -> int:
        """Return the number of parameters in the biases of this role."""
        return self.shape[0] * self.count if self.bias else 0

    @property
    def elements(self) -> int:
        """Return the number of parameters in all tensors of this role, biases included."""
        return self.weights + self.biases


def elements(tensors: Iterable[Tensor]) -> int:
    """Return the number of parameters in all given tensors, biases included.

    Every start of turbofit counts a model's parameters, so for speed the loop calls no function of
    turbofit.
    """
    total = 0
    for tensor in tensors:
        each = prod(tensor.shape) + (tensor.shape[0] if tensor.bias else 0)
        total += each * tensor.copies * (1 if tensor.layers is None else len(tensor.layers))
    return total


@lru_cache
def text_tensors(text: TextDims) -> tuple[Tensor, ...]:
    """Return all tensors of a language model; a tied head has no tensor of its own."""
    tensors = [*_outside_layers(text), *_attention(text), *_mlps(text), *_norms(text)]
    if text.delta is not None:
        tensors += _delta(text, text.delta)
    if text.cross_layers:
        tensors += _cross(text)
    if text.vision_experts:
        tensors += _vision_experts(text)
    return tuple([tensor for tensor in tensors if tensor.layers is None or tensor.layers])


@lru_cache
def linears(text: TextDims) -> tuple[Tensor, ...]:
    """Return the linear layers that quantisation packs, of attention, delta nets and MLPs."""
    return tuple([tensor for tensor in text_tensors(text) if tensor.packs])


def attention_layers(text: TextDims) -> Sequence[int]:
    """Return the numbers of the layers with attention.

    In a model with delta nets, only the last layer of each period has attention.
    """
    if text.delta is None:
        return range(text.layers)
    period = text.layers // max(1, text.attention_layers)
    return range(period - 1, text.layers, period)[: text.attention_layers]


def _outside_layers(text: TextDims) -> list[Tensor]:
    """List embeddings, head and other tensors outside the layers."""
    shape, square = (text.vocab, text.hidden), (text.kv_heads, text.fourier, text.fourier)
    norm = partial(Tensor, part="norm")
    tensors = [
        Tensor(role="embedding", part="embedding", shape=shape, split="rows"),
        norm(role="norm", shape=(text.hidden,), bias=text.norm_bias),
    ]
    if not text.tie_word_embeddings:
        tensors.append(Tensor(role="head", part="head", shape=shape))
    if text.head_bias:
        tensors.append(norm(role="head.bias", shape=(text.vocab,)))
    if text.cross_layers:
        tensors.append(norm(role="embedding.image", shape=(CROSS_EMBEDDINGS, text.hidden)))
    if text.fourier:
        tensors += [norm(role=f"fourier.{wave}", shape=square) for wave in ("cos", "sin")]
    return tensors


def _norms(text: TextDims) -> list[Tensor]:
    """List the norms over the hidden channels in each layer."""
    norm = partial(Tensor, part="norm", shape=(text.hidden,), layers=range(text.layers))
    return [norm(role=f"norm.{n}", bias=text.norm_bias) for n in range(1, text.layer_norms + 1)]


def _attention(text: TextDims) -> list[Tensor]:
    """List the tensors of self-attention: projections, to latents or not, norms and sinks."""
    layers, apart = attention_layers(text), text.cross_layers
    if text.mla is not None:
        return _latent(text, text.mla, partial(Tensor, layers=layers))
    alone = [layer for layer in layers if layer not in apart] if apart else layers
    tensors = _projections(text, partial(Tensor, layers=alone), bias=text.qkv_bias)
    if text.qk_norm:
        tensors += _head_norms(text, partial(Tensor, layers=layers))
    if text.sinks:
        sink = partial(Tensor, part="attention", layers=layers, split="columns")
        tensors.append(sink(role="sinks", shape=(text.heads,)))
    return tensors


def _projections(text: TextDims, tensor: New, name: str = "", *, bias: bool) -> list[Tensor]:
    """List the projections of queries (with output gates, if any), keys, values and output."""
    hidden, query = text.hidden, text.heads * text.head_dim
    key, gated = text.kv_heads * text.head_dim, 2 if text.output_gate else 1
    linear = partial(tensor, part="attention", packs=True)
    return [
        linear(role=f"{name}q", shape=(gated * query, hidden), bias=bias, split="columns"),
        linear(role=f"{name}k", shape=(key, hidden), bias=bias, split="kv_heads"),
        linear(role=f"{name}v", shape=(key, hidden), bias=bias, split="kv_heads"),
        linear(role=f"{name}o", shape=(hidden, query), bias=text.output_bias, split="rows"),
    ]


def _head_norms(text: TextDims, tensor: New, name: str = "") -> list[Tensor]:
    norm = partial(tensor, part="norm", shape=(text.head_dim,))
    return [norm(role=f"{name}q_norm"), norm(role=f"{name}k_norm")]


def _latent(text: TextDims, mla: MlaDims, tensor: New) -> list[Tensor]:
    """List multi-head latent attention's tensors: projections to and from latents, and norms."""
    hidden, heads, bias = text.hidden, text.heads, text.qkv_bias
    linear, norm = partial(tensor, part="attention", packs=True), partial(tensor, part="norm")
    query = (heads * (mla.nope_dim + mla.rope_dim), mla.q_rank or hidden)
    latent, values = mla.kv_rank + mla.rope_dim, heads * mla.v_dim
    tensors = [
        linear(role="q_b" if mla.q_rank else "q", shape=query, split="columns"),
        linear(role="kv_a", shape=(latent, hidden), bias=bias),
        norm(role="kv_a_norm", shape=(mla.kv_rank,)),
        linear(role="kv_b", shape=(heads * mla.nope_dim + values, mla.kv_rank), split="columns"),
        linear(role="o", shape=(hidden, values), bias=text.output_bias, split="rows"),
    ]
    if mla.q_rank:
        tensors.append(linear(role="q_a", shape=(mla.q_rank, hidden), bias=bias))
        tensors.append(norm(role="q_a_norm", shape=(mla.q_rank,)))
    return tensors


def _delta(text: TextDims, delta: DeltaDims) -> list[Tensor]:
    """List the tensors of gated delta nets.

    The projections to the two gates of a value head are never packed.
    """
    hidden, heads, attention = text.hidden, delta.value_heads, attention_layers(text)
    layers = tuple([layer for layer in range(text.layers) if layer not in attention])
    net = partial(Tensor, part="delta", layers=layers)
    columns = partial(net, split="columns")
    gate = partial(columns, shape=(heads, hidden))
    return [
        columns(role="delta.qkv", shape=(delta.channels, hidden), packs=True),
        columns(role="delta.z", shape=(delta.values, hidden), packs=True),
        gate(role="delta.b"),
        gate(role="delta.a"),
        net(role="delta.o", shape=(hidden, delta.values), packs=True, split="rows"),
        columns(role="delta.decay", shape=(heads,)),
        columns(role="delta.step", shape=(heads,)),
        columns(role="delta.conv", shape=(delta.channels, 1, delta.kernel)),
        net(role="delta.norm", shape=(delta.value_dim,)),
    ]


def _cross(text: TextDims) -> list[Tensor]:
    """List Llama 3.2 Vision's cross-attention layers, with norms of heads and two gates."""
    tensor = partial(Tensor, layers=text.cross_layers)
    gate = partial(tensor, part="norm", shape=(1,))
    return [
        *_projections(text, tensor, "cross.", bias=text.qkv_bias),
        *_head_norms(text, tensor, "cross."),
        gate(role="cross.attention_gate"),
        gate(role="cross.mlp_gate"),
    ]


def _vision_experts(text: TextDims) -> list[Tensor]:
    """List CogVLM's second set of linear layers, which image tokens pass."""
    tensor = partial(Tensor, layers=range(text.layers))
    return [
        *_projections(text, tensor, "vision.", bias=text.vision_expert_bias),
        *_gated_mlp(partial(tensor, part="mlp"), "vision.mlp", text.hidden, text.intermediate),
    ]


def _mlps(text: TextDims) -> list[Tensor]:
    """List the feed-forward networks; with experts, only the first layers have plain MLPs."""
    dense = range(text.layers - (text.moe.layers if text.moe else 0))
    mlp = partial(Tensor, part="mlp", layers=dense, bias=text.mlp_bias)
    tensors = _gated_mlp(mlp, "mlp", text.hidden, text.intermediate)
    return tensors + _experts(text, text.moe) if text.moe else tensors


def _gated_mlp(tensor: New, name: str, hidden: int, inner: int) -> list[Tensor]:
    """List the gate, up and down projections of a gated MLP."""
    linear = partial(tensor, packs=True)
    return [
        linear(role=f"{name}.gate", shape=(inner, hidden), split="columns"),
        linear(role=f"{name}.up", shape=(inner, hidden), split="columns"),
        linear(role=f"{name}.down", shape=(hidden, inner), split="rows"),
    ]


def _experts(text: TextDims, moe: MoeDims) -> list[Tensor]:
    """List the experts with their router, and the shared expert."""
    hidden = text.hidden
    tensor = partial(Tensor, layers=range(text.layers - moe.layers, text.layers))
    router = partial(tensor, part="router")
    expert = partial(tensor, part="expert", copies=moe.experts, bias=text.mlp_bias)
    tensors = [
        router(role="router", shape=(moe.experts, hidden), bias=moe.router_bias),
        *_gated_mlp(expert, "expert", hidden, moe.intermediate),
    ]
    if moe.correction:
        tensors.append(router(role="correction", shape=(moe.experts,)))
    if moe.shared_intermediate:
        shared = partial(tensor, part="shared")
        tensors += _gated_mlp(shared, "shared", hidden, moe.shared_intermediate)
        if moe.shared_gate:
            tensors.append(router(role="shared.router", shape=(1, hidden)))
    return tensors
