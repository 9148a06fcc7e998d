"""Upper bounds of the memory in a forward of Transformers' model code, without weights and cache.

Each bound follows the tensors that are alive at the code's peak. Rehearsals of the real code on
pretend GPUs exceeded no bound (docs/fallback.md). turbofit always requests the attention ``sdpa``;
the bounds assume a kernel that stores no attention matrix. If a card lacks this kernel for grouped
heads, the matrix is added.
"""

from __future__ import annotations

from typing import Final

from turbofit.core.errors import UsageError
from turbofit.core.model import DTYPE_BYTES, Model, TextDims
from turbofit.core.struct import Struct
from turbofit.core.units import FLOAT
from turbofit.memory.account import Load
from turbofit.model.parameters import parameters, text_parameters
from turbofit.model.tensors import elements, text_tensors

_INSIDE: Final = "model.language_model"
_LLAVA: Final = ("model.vision_tower", "model.multi_modal_projector")
#: Tensors that only some layers have: a dense MLP, or experts. All others are divided evenly.
_MLPS: Final = ("mlp", "expert", "shared")
#: Towers with attention that rotates nothing; other towers rotate in 32 bits.
_UNROTATED: Final = frozenset({"internvit", "clip", "siglip", "mllama", "idefics3"})
#: Towers that get a mask of the pixels that belong to the image.
_PIXEL_MASKS: Final = frozenset({"idefics3"})
#: Channels of a token in a vision block's attention, in units of the block's width: residual, norm,
#: queries, keys, values, output.
_VISION_PLAIN: Final = 10
#: The same for attention that rotates queries and keys. Rehearsed with Qwen2-VL: 17.6.
_VISION_ROTATED: Final = 20
#: Channels of a token in addition to the block's MLP. Rehearsed with SigLIP: 2.5.
_VISION_BESIDE_MLP: Final = 4
#: Channels of an image token in the projector, in units of the language model's width.
_PROJECTOR: Final = 4
#: Channels of a token in addition to the MLP: the prompt's embeddings, the layer's input, the
#: residual, the norm, and rotary tables. Rehearsed with Qwen2, Llama and Mistral: 4.0 to 4.3.
_BESIDE_MLP: Final = 5
#: Copies of queries and keys before and after rotation, with temporaries.
_ROTATED: Final = 4
#: Bytes of one element in the attention matrix: three copies with 32 bits.
_MATRIX: Final = 12
#: Copies of a mask over all pairs of positions in a tower.
_TOWER_MASKS: Final = 4
#: Copies of a decoder's mask over all pairs of a prompt's and an image's positions. Rehearsed with
#: Llama-3.2-Vision: 2.1.
_CROSS_MASKS: Final = 3
#: Bytes of a pair of positions while a sliding window's mask is computed: three booleans. Rehearsed
#: with Mistral and Qwen2-MoE, with Transformers 5.17: 3.0.
_MASK_MADE: Final = 3
#: Copies of a sliding window's mask as numbers in attention. Torch's memory-efficient kernel
#: accepts no booleans; it needs a second, longer copy if the length is no multiple of 16. Rehearsed
#: with Mistral: 2 copies, or 1 with a multiple of 16.
_MASK_NUMBERS: Final = 2
#: Classes that make a sliding window's mask even if no layer has a window.
_ALWAYS_MASKED: Final = frozenset({"Qwen2MoeForCausalLM"})


class Layer(Struct):
    """One decoder layer: bytes of the weights, and of the KV cache for one token and one image.

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

    ``vision`` is tower, projector and bare parameters. ``head`` is 0 if the head is ``tied`` to the
    embeddings. ``experts`` are the experts of one layer, which `layers` also contains.
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


def components(model: Model, dtype: str) -> Components:
    """Return the bytes of a model's components, exact for all elements that the dims explain.

    A checkpoint may have more elements (see `Model.warnings`). The surplus counts on the first
    device, which may be too high for that device.
    """
    text, width = model.text, DTYPE_BYTES[dtype]
    embeddings = text.vocab * text.hidden * width
    head = 0 if text.tie_word_embeddings else embeddings
    norm = text.hidden * width
    layers = _layers(text, width, cross_tokens(model))
    vision = (parameters(text, model.vision) - text_parameters(text)) * width
    known = vision + embeddings + head + norm + sum(layer.weights for layer in layers)
    stored = model.weight_bytes // DTYPE_BYTES[model.dtype] * width
    # Transformers always loads an audio tower, with the tower's positions.
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
    """Return the positions of one image in the caches of cross-attention layers, or 0.

    Llama-3.2-Vision pads every image to the most tiles.
    """
    rule = model.image_rule
    if not _cross_layers(model.text) or rule is None:
        return 0
    return rule.features(rule.worst_units())


def _cross_layers(text: TextDims) -> frozenset[int]:
    return frozenset(getattr(text, "cross_layers", ()))


def _layers(text: TextDims, width: int, cross: int) -> tuple[Layer, ...]:
    """Return the layers; dense layers come before layers with experts.

    All bytes but those of the MLPs are divided evenly over the layers. The sum is exact; a layer
    with cross-attention has other norms, and differs a little.
    """
    kv = 2 * text.kv_heads * text.head_dim * width
    crossed = _cross_layers(text)
    inside = (t for t in text_tensors(text) if t.part not in ("embedding", "head", *_MLPS))
    base = -(-(elements(inside) - text.hidden) // text.layers)
    dense, sparse = _mlp_elements(text, 0), _mlp_elements(text, text.layers - 1)
    first = text.layers - (text.moe.layers if text.moe else 0)
    return tuple(
        Layer(
            weights=(base + (dense if number < first else sparse)) * width,
            kv_per_token=0 if number in crossed else kv,
            kv_per_image=kv * cross if number in crossed else 0,
        )
        for number in range(text.layers)
    )


def _mlp_elements(text: TextDims, layer: int) -> int:
    """Return the elements of one layer's MLP or experts."""
    return sum(
        tensor.elements // len(tensor.layers)
        for tensor in text_tensors(text)
        if tensor.part in _MLPS and tensor.layers and layer in tensor.layers
    )


# Where Transformers 5 keeps the parts of each model: the names that a device map must use.
#
# A map must name every parameter and buffer, also bare parameters (``image_newline``): a tensor
# without an entry lands on the CPU. ``tests/memory/transformers`` compares maps with the classes.


class Layout(Struct):
    """The names of a model's modules in Transformers.

    ``text`` is the module with ``embed_tokens``, ``layers``, ``norm`` and ``rotary_emb``. ``first``
    are the modules and bare parameters outside the language model: vision tower, projector, and
    parameters that join image features. ``keeps_states``: the outputs of all tower layers stay
    alive until the tower's end, as in families that select a layer by number.
    """

    text: str
    first: tuple[str, ...] = ()
    keeps_states: bool = False


_TEXT: Final = Layout(text="model")

_IDEFICS3: Final = Layout(text="model.text_model", first=("model.vision_model", "model.connector"))

#: Only the thinker: `serving.fallback_server` loads no other part.
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
    """Return the layout of a model's class in Transformers.

    Raises:
        UsageError: the class is not in Transformers, or the checkpoint is quantised.
    """
    if model.quantization is not None:
        raise UsageError(
            f"the fallback engine runs no {model.quantization.method} checkpoints",
            hint="give the 16-bit checkpoint, or leave `--engine` to turbofit",
        )
    layout = _LAYOUTS.get(model.architecture)
    if layout is None:
        raise UsageError(
            f"the fallback engine does not run {model.architecture[:80]}: turbofit has no map of "
            "this class, and cannot serve a class in the checkpoint's own code",
            hint="give the checkpoint in Transformers' own format (its name often ends in -hf)",
        )
    return layout


def vision_bytes(model: Model, layout: Layout, units: int, width: int) -> int:
    """Return the bytes of the forward of tower and projector for ``units`` (tiles or patches)."""
    vision, rule = model.vision, model.image_rule
    if vision is None or rule is None or not units:
        return 0
    tokens, pixels = _tower(model, units)
    mlp = (3 if vision.gated_mlp else 2) * vision.intermediate
    attention = _VISION_PLAIN if vision.kind in _UNROTATED else _VISION_ROTATED
    channels = max(
        attention * vision.hidden,
        mlp + _VISION_BESIDE_MLP * vision.hidden,
        int(_PROJECTOR * (1 / rule.unit_step) * model.text.hidden),
    )
    if layout.keeps_states:
        channels += (vision.layers + 1) * vision.hidden
    # Pixels arrive with 32 bits and are cast.
    return pixels * (FLOAT + width) + tokens * channels * width + _mask_bytes(model, units, width)


def _mask_bytes(model: Model, units: int, width: int) -> int:
    """Return the bytes of a tower's masks.

    Idefics3 has masks of pixels and a copy, with 32 bits, and masks of all pairs of a tile's
    patches, as booleans and numbers. The bytes of the pairs are too high: on real cards no patch is
    masked, and no mask of pairs is made.
    """
    if cross_tokens(model):
        return _TOWER_MASKS * width * _tower(model, units)[0] ** 2
    vision, rule = model.vision, model.image_rule
    if vision is None or rule is None or vision.kind not in _PIXEL_MASKS:
        return 0
    return units * (2 * FLOAT * rule.unit_side**2 + model.unit_tower_tokens**2 * (1 + width))


def _tower(model: Model, units: int) -> tuple[int, int]:
    """Return the numbers of tower tokens and of pixel values for ``units`` vision units."""
    return units * model.unit_tower_tokens, units * model.unit_values


def prefill_bytes(model: Model, load: Load, width: int, *, writes_matrix: bool) -> int:
    """Return the bytes of a prompt's prefill: one decoder layer, and tensors that outlive a layer.

    Pixels, the tower's output and the features stay until the end of the prefill, and are included.
    ``writes_matrix``: attention stores the matrix of all pairs.
    """
    text, tokens, images = model.text, load.tokens, load.images
    size = tokens * _BESIDE_MLP * text.hidden * width + _layer_bytes(text, tokens, width)
    if images:
        # Qwen3-VL's tower makes features for several layers; features stay until a layer takes
        # them.
        size += tokens * text.hidden * (1 + getattr(model.vision, "deepstack", 0)) * width
    if model.vision is not None:
        tower_tokens, pixels = _tower(model, load.units)
        size += pixels * FLOAT + tower_tokens * model.vision.hidden * width
    if writes_matrix:
        size += _MATRIX * text.heads * tokens**2
    return size + _CROSS_MASKS * width * tokens * cross_tokens(model) * images


def _layer_bytes(text: TextDims, tokens: int, width: int) -> int:
    """Return the bytes inside one layer, with the mask of all pairs that a sliding window needs.

    Transformers makes the mask once for all layers if a prompt is at least as long as the window.
    Torch converts the mask to numbers in each attention.
    """
    attention = tokens * _ROTATED * (text.heads + text.kv_heads) * text.head_dim * width
    mlp = tokens * _mlp_channels(text) * width
    windowed = 0 < text.window <= tokens
    if not windowed and text.architecture not in _ALWAYS_MASKED:
        return max(mlp, attention)
    pairs = tokens**2
    numbers = _MASK_NUMBERS * width * pairs if windowed else 0
    return max(_MASK_MADE * pairs, mlp + pairs, attention + pairs + numbers)


def _mlp_channels(text: TextDims) -> int:
    """Return the channels of a token in the MLP: gate, up and product; or in all chosen experts.

    Each chosen expert has copies of inputs and outputs. In rehearsals of Mixtral and Qwen3-MoE, the
    copies took 2.4 hidden widths for each chosen expert, and 3.4 more for a token; the function
    counts 2.5 and 4.
    """
    dense = 3 * text.intermediate
    if text.moe is None:
        return dense
    moe = text.moe
    chosen = moe.experts_per_token * (6 * moe.intermediate + 5 * text.hidden) // 2
    return max(dense, chosen + 4 * text.hidden + 3 * moe.shared_intermediate)
