"""The parts of a model that a device map places, with their weights and their KV cache."""

from __future__ import annotations

from turbofit.core.model import DTYPE_BYTES, Model, TextDims
from turbofit.core.struct import Struct
from turbofit.model.parameters import parameters, text_linears, text_parameters

__all__ = ["Components", "Layer", "components", "cross_tokens"]


class Layer(Struct):
    """One decoder layer: bytes of its weights, and of its KV cache for one token and one image.

    ``kv_per_image`` is for layers that attend to an image's features in place of tokens (the
    cross-attention layers of Llama-3.2-Vision: 6404 positions an image, whatever the prompt).
    """

    weights: int
    kv_per_token: int
    kv_per_image: int = 0

    def kv(self, tokens: int, images: int) -> int:
        """Bytes of the cache for one request."""
        return self.kv_per_token * tokens + self.kv_per_image * images


class Components(Struct):
    """Weight bytes by component, in the dtype that is served.

    ``vision`` is tower, projector and bare parameters; ``head`` is 0 where it is ``tied`` to the
    embeddings. ``experts`` are those of one layer, which `layers` have too.
    """

    vision: int
    embeddings: int
    layers: tuple[Layer, ...]
    norm: int
    head: int
    tied: bool
    experts: int = 0

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        layers = sum(layer.weights for layer in self.layers)
        return self.vision + self.embeddings + layers + self.norm + self.head


def components(model: Model, dtype: str) -> Components:
    """The parts of a model. Exact for what its dims explain.

    A checkpoint that holds more elements than its dims explain (`Model.warnings` says so) is
    charged for all of them, on the first device: over.
    """
    text, width = model.text, DTYPE_BYTES[dtype]
    embeddings = text.vocab * text.hidden * width
    head = 0 if text.tie_word_embeddings else embeddings
    norm = text.hidden * width
    layers = _layers(text, width, cross_tokens(model))
    vision = (parameters(text, model.vision) - text_parameters(text)) * width
    known = vision + embeddings + head + norm + sum(layer.weights for layer in layers)
    stored = model.weight_bytes // DTYPE_BYTES[model.dtype] * width
    # An audio tower is loaded unasked, with its positions.
    audio = model.vision.audio if model.vision else None
    positions = audio.position_bytes if audio else 0
    return Components(
        vision=vision + positions + max(0, stored - known),
        embeddings=embeddings,
        layers=layers,
        norm=norm,
        head=head,
        tied=text.tie_word_embeddings,
        experts=_expert_elements(text) * width,
    )


def cross_tokens(model: Model) -> int:
    """Positions of one image in the caches of the cross-attention layers; 0 where there are none.

    Llama-3.2-Vision pads every image to all of its tiles.
    """
    rule = model.image_rule
    if not _cross_layers(model.text) or rule is None:
        return 0
    return rule.features(rule.worst_units())


def _cross_layers(text: TextDims) -> frozenset[int]:
    return frozenset(getattr(text, "cross_layers", ()))


def _layers(text: TextDims, width: int, cross: int) -> tuple[Layer, ...]:
    """Each layer; of a model with dense layers among its experts, these come first.

    All but the MLPs is split evenly over the layers: the sum is exact, and a layer of another kind
    (cross-attention) differs from the others by its norms only.
    """
    kv, apart = 2 * text.kv_heads * text.head_dim * width, _cross_layers(text)
    total = text_parameters(text)
    total -= text.vocab * text.hidden * (1 if text.tie_word_embeddings else 2) + text.hidden
    experts = _expert_elements(text)
    sparse = text.moe.layers if text.moe else 0
    dense_total = total - experts * sparse - _dense_mlp(text) * (text.layers - sparse)
    base = -(-dense_total // text.layers)
    return tuple(
        Layer(
            weights=(base + (experts if number >= text.layers - sparse else _dense_mlp(text)))
            * width,
            kv_per_token=0 if number in apart else kv,
            kv_per_image=kv * cross if number in apart else 0,
        )
        for number in range(text.layers)
    )


def _expert_elements(text: TextDims) -> int:
    """Elements of one layer's experts; its router is among what is split evenly."""
    if text.moe is None:
        return 0
    found = [one for one in text_linears(text) if one.name.startswith(("expert.", "shared."))]
    return sum(one.weights + one.biases for one in found) // text.moe.layers


def _dense_mlp(text: TextDims) -> int:
    """Elements of one dense MLP."""
    dense = text.layers - (text.moe.layers if text.moe else 0)
    if not dense:
        return 0
    found = [one for one in text_linears(text) if one.name.startswith("mlp.")]
    return sum(one.weights + one.biases for one in found) // dense
