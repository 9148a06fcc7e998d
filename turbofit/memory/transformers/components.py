"""The parts of a model that a device map places: weights, KV cache and module names."""

from __future__ import annotations

from typing import Final

from turbofit.core.errors import UsageError
from turbofit.core.model import DTYPE_BYTES, Model, TextDims
from turbofit.core.struct import Struct
from turbofit.model.parameters import parameters, text_parameters
from turbofit.model.tensors import elements, text_tensors


class Layer(Struct):
    """One decoder layer: bytes of its weights, and of its KV cache for one token and one image.

    ``kv_per_image`` is for layers that attend to an image's features instead of tokens
    (Llama-3.2-Vision: 6404 positions an image, for every prompt).
    """

    weights: int
    kv_per_token: int
    kv_per_image: int = 0

    def kv(self, tokens: int, images: int) -> int:
        return self.kv_per_token * tokens + self.kv_per_image * images


class Components(Struct):
    """The weight bytes of each component, in the served dtype.

    ``vision`` is tower, projector and bare parameters; ``head`` is 0 if it is ``tied`` to the
    embeddings. ``experts``, of one layer, are also contained in `layers`.
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
        layers = sum(layer.weights for layer in self.layers)
        return self.vision + self.embeddings + layers + self.norm + self.head


_INSIDE: Final = "model.language_model"
_LLAVA: Final = ("model.vision_tower", "model.multi_modal_projector")


def components(model: Model, dtype: str) -> Components:
    """The parts of a model; exact for all that its dims explain.

    If a checkpoint has more elements than its dims explain (see `Model.warnings`), all of them are
    counted on the first device, so the figure there may be too high.
    """
    text, width = model.text, DTYPE_BYTES[dtype]
    embeddings = text.vocab * text.hidden * width
    head = 0 if text.tie_word_embeddings else embeddings
    norm = text.hidden * width
    layers = _layers(text, width, cross_tokens(model))
    vision = (parameters(text, model.vision) - text_parameters(text)) * width
    known = vision + embeddings + head + norm + sum(layer.weights for layer in layers)
    stored = model.weight_bytes // DTYPE_BYTES[model.dtype] * width
    # An audio tower is always loaded, with its positions.
    audio = model.vision.audio if model.vision else None
    positions = audio.position_bytes if audio else 0
    return Components(
        vision=vision + positions + max(0, stored - known),
        embeddings=embeddings,
        layers=layers,
        norm=norm,
        head=head,
        tied=text.tie_word_embeddings,
        experts=_mlp_elements(text, text.layers - 1) * width if text.moe else 0,
    )


def cross_tokens(model: Model) -> int:
    """Positions of one image in the caches of cross-attention layers; 0 without such layers.

    Llama-3.2-Vision pads every image to all of its tiles.
    """
    rule = model.image_rule
    if not _cross_layers(model.text) or rule is None:
        return 0
    return rule.features(rule.worst_units())


def _cross_layers(text: TextDims) -> frozenset[int]:
    return frozenset(getattr(text, "cross_layers", ()))


def _layers(text: TextDims, width: int, cross: int) -> tuple[Layer, ...]:
    """The layers; dense ones come before those with experts.

    Except for the MLPs, bytes are divided evenly over the layers: the sum is exact, and a layer of
    another kind (cross-attention) only differs by its norms.
    """
    kv, apart = 2 * text.kv_heads * text.head_dim * width, _cross_layers(text)
    inside = (t for t in text_tensors(text) if t.part not in ("embedding", "head", *_MLPS))
    base = -(-(elements(inside) - text.hidden) // text.layers)
    dense, sparse = _mlp_elements(text, 0), _mlp_elements(text, text.layers - 1)
    first = text.layers - (text.moe.layers if text.moe else 0)
    return tuple(
        Layer(
            weights=(base + (dense if number < first else sparse)) * width,
            kv_per_token=0 if number in apart else kv,
            kv_per_image=kv * cross if number in apart else 0,
        )
        for number in range(text.layers)
    )


#: Parts that only some layers have: a dense MLP, or experts; routers are divided evenly.
_MLPS: Final = ("mlp", "expert", "shared")


def _mlp_elements(text: TextDims, layer: int) -> int:
    """The elements of one layer's MLP or experts."""
    return sum(
        tensor.elements // len(tensor.layers)
        for tensor in text_tensors(text)
        if tensor.part in _MLPS and tensor.layers and layer in tensor.layers
    )


# Where Transformers 5 keeps the parts of each model: the names that a device map must use.
#
# A map names every parameter and buffer, bare ones (``image_newline``) too: what it leaves out
# lands on the CPU. Proved against the classes themselves in ``tests/memory/transformers``.


class Layout(Struct):
    """Module names: ``text`` holds ``embed_tokens``, ``layers``, ``norm`` and ``rotary_emb``.

    ``first`` are the modules and bare parameters outside the language model: vision tower,
    projector, and parameters that join their features. ``keeps_states``: whether the outputs of all
    tower layers stay alive until the tower's end, as in families that select a layer by its number.
    """

    text: str
    first: tuple[str, ...] = ()
    keeps_states: bool = False


_TEXT: Final = Layout(text="model")

_IDEFICS3: Final = Layout(text="model.text_model", first=("model.vision_model", "model.connector"))

#: Only the thinker, since `serving.fallback.server` loads nothing else.
_QWEN2_5_OMNI: Final = Layout(text="model", first=("audio_tower", "visual"))

_LAYOUTS: Final[dict[str, Layout]] = {
    "LlavaForConditionalGeneration": Layout(text=_INSIDE, first=_LLAVA, keeps_states=True),
    "LlavaNextForConditionalGeneration": Layout(
        text=_INSIDE, first=(*_LLAVA, "model.image_newline"), keeps_states=True
    ),
    "LlavaOnevisionForConditionalGeneration": Layout(
        text=_INSIDE, first=(*_LLAVA, "model.image_newline"), keeps_states=True
    ),
    "MllamaForConditionalGeneration": Layout(
        text=_INSIDE, first=("model.vision_model", "model.multi_modal_projector"), keeps_states=True
    ),
    "Idefics3ForConditionalGeneration": _IDEFICS3,
    "SmolVLMForConditionalGeneration": _IDEFICS3,
    "InternVLForConditionalGeneration": Layout(text=_INSIDE, first=_LLAVA, keeps_states=True),
    "Qwen2VLForConditionalGeneration": Layout(text=_INSIDE, first=("model.visual",)),
    "Qwen2_5_VLForConditionalGeneration": Layout(text=_INSIDE, first=("model.visual",)),
    "Qwen2_5OmniForConditionalGeneration": _QWEN2_5_OMNI,
    "Qwen2_5OmniModel": _QWEN2_5_OMNI,
    "Qwen2_5OmniThinkerForConditionalGeneration": _QWEN2_5_OMNI,
    "Qwen3VLForConditionalGeneration": Layout(text=_INSIDE, first=("model.visual",)),
    "LlamaForCausalLM": _TEXT,
    "MistralForCausalLM": _TEXT,
    "MixtralForCausalLM": _TEXT,
    "Qwen2ForCausalLM": _TEXT,
    "Qwen3ForCausalLM": _TEXT,
    "Qwen2MoeForCausalLM": _TEXT,
    "Qwen3MoeForCausalLM": _TEXT,
}


def layout_of(model: Model) -> Layout:
    """The layout of a model's class in Transformers.

    Raises:
        UsageError: the class is not in Transformers, or the checkpoint is quantised.
    """
    if model.quantization is not None:
        raise UsageError(
            f"the fallback engine runs no {model.quantization.method} checkpoints",
            hint="give the 16-bit checkpoint, or leave --engine to turbofit",
            options=["engine"],
        )
    layout = _LAYOUTS.get(model.architecture)
    if layout is None:
        raise UsageError(
            f"the fallback engine does not run {model.architecture[:80]}: turbofit has no map of "
            "it, and a class that only the checkpoint's own code defines cannot be served",
            hint="give the checkpoint in Transformers' own format (its name often ends in -hf)",
        )
    return layout
