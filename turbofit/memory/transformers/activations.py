"""Memory in a forward of Transformers' model code besides weights and cache: upper bounds.

Each bound follows the tensors that are alive at the code's peak, and was compared with rehearsals
of the real code on pretend GPUs (docs/fallback.md): none was too low. They assume ``sdpa``, which
is always requested, with a kernel that does not store the attention matrix; if a card has no such
kernel for grouped heads, the matrix is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec.structs import replace

from turbofit.core.machine import Gpu
from turbofit.core.model import DTYPE_BYTES, Model, TextDims
from turbofit.core.struct import known
from turbofit.core.units import MIB
from turbofit.machine.presets import context_bytes
from turbofit.memory.account import AMPERE, HOPPER, capability_of
from turbofit.memory.placement import Components, Layer, LayeredCopy, Load, Placement
from turbofit.memory.transformers.components import (
    Layout,
    components,
    cross_tokens,
    layout_of,
)

#: Towers whose attention has no rotation; the others rotate in 32 bits.
_UNROTATED: Final = frozenset({"internvit", "clip", "siglip", "mllama", "idefics3"})
#: Towers that get a mask of the pixels that belong to the image.
_PIXEL_MASKS: Final = frozenset({"idefics3"})
#: Channels of a token in a vision block's attention, in units of its width: residual, norm,
#: queries, keys, values, output; the second includes their rotation. Rehearsed with Qwen2-VL: 17.6.
_VISION_PLAIN: Final = 10
_VISION_ROTATED: Final = 20
#: Channels of a token beside the block's MLP. Rehearsed with SigLIP: 2.5.
_VISION_BESIDE_MLP: Final = 4
#: The projector, in units of the language model's width.
_PROJECTOR: Final = 4
_FLOAT: Final = 4
#: Channels of a token beside the MLP: the prompt's embeddings, the layer's input, the residual, the
#: norm, and rotary tables. Rehearsed with Qwen2, Llama and Mistral: 4.0 to 4.3.
_BESIDE_MLP: Final = 5
#: Copies of queries and keys before and after rotation, with temporaries.
_ROTATED: Final = 4
#: Embeddings, their copy that contains the images' features, the features, the mask, and the 64-bit
#: sum over the mask that finds each feature's place.
_SCATTER: Final = 12
#: Bytes of one element in the attention matrix: three copies with 32 bits.
_MATRIX: Final = 12
#: Copies of a mask over all pairs of positions in a tower; and of prompt and image in a decoder,
#: rehearsed with Llama-3.2-Vision: 2.1.
_TOWER_MASKS: Final = 4
_CROSS_MASKS: Final = 3
#: Bytes of a pair of positions while a sliding window's mask is computed: three booleans. Rehearsed
#: with Mistral and Qwen2-MoE, with Transformers 5.17: 3.0.
_MASK_MADE: Final = 3
#: Copies of that mask as numbers in attention: torch's memory-efficient kernel does not accept
#: booleans, and needs a longer copy if the length is not a multiple of 16. Rehearsed with Mistral:
#: 2, else 1.
_MASK_NUMBERS: Final = 2
#: Classes that always make the mask, even if no layer has a window.
_ALWAYS_MASKED: Final = frozenset({"Qwen2MoeForCausalLM"})
#: Bytes of a vocabulary entry: logits, their 32-bit copy, sorted values and indices, sums.
_SAMPLING: Final = 64

#: The cuBLAS workspace that torch allocates, once for the library and once for cuBLASLt; by Hopper.
_WORKSPACE: Final = {False: 2 * 9 * MIB, True: 2 * 32 * MIB}
#: Rounding of torch's allocator, in segments of weights; measured 8 to 57 MiB.
_ROUNDING: Final = 64 * MIB
#: Memory reserved beyond allocations at the peak, with expandable segments: measured 1 to 8 %.
_FRAGMENTS_PERCENT: Final = 10
#: Tensors that the loader has at once while it casts.
_LOADERS: Final = 4
#: Additional memory of joining experts, as a multiple of one layer's experts.
_JOINED: Final = 2


def vision_bytes(model: Model, layout: Layout, units: int, width: int) -> int:
    """Bytes in the vision tower and its projector for so many units (tiles or patches)."""
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
    return pixels * (_FLOAT + width) + tokens * channels * width + _mask_bytes(model, units, width)


def _mask_bytes(model: Model, units: int, width: int) -> int:
    """The bytes of a tower's masks.

    Idefics3 has masks of pixels with a copy, both with 32 bits, and masks of all pairs of a tile's
    patches, as booleans and numbers. Too high: no patch is masked, so real cards make none.
    """
    if cross_tokens(model):
        return _TOWER_MASKS * width * _tower(model, units)[0] ** 2
    vision, rule = model.vision, model.image_rule
    if vision is None or rule is None or vision.kind not in _PIXEL_MASKS:
        return 0
    return units * (2 * _FLOAT * rule.unit_side**2 + model.unit_tower_tokens**2 * (1 + width))


def _tower(model: Model, units: int) -> tuple[int, int]:
    """Tokens in the tower for so many units, and the number of their pixel values."""
    return units * model.unit_tower_tokens, units * model.unit_values


def prefill_bytes(model: Model, load: Load, width: int, *, writes_matrix: bool) -> int:
    """Bytes of one decoder layer, and of tensors kept around it, for a prompt.

    If the tower is on this device as well, the units' pixels, the tower's output and the features
    stay until the end of the prefill.
    """
    text, tokens, images = model.text, load.tokens, load.images
    size = tokens * _BESIDE_MLP * text.hidden * width + _layer_bytes(text, tokens, width)
    if images:
        # Qwen3-VL's tower passes features to several layers; all are kept until their layer runs.
        size += tokens * text.hidden * (1 + getattr(model.vision, "deepstack", 0)) * width
    if model.vision is not None:
        tower_tokens, pixels = _tower(model, load.units)
        size += pixels * _FLOAT + tower_tokens * model.vision.hidden * width
    if writes_matrix:
        size += _MATRIX * text.heads * tokens**2
    return size + _CROSS_MASKS * width * tokens * cross_tokens(model) * images


def _layer_bytes(text: TextDims, tokens: int, width: int) -> int:
    """Bytes inside one layer, with the mask of all pairs that a sliding window needs.

    Transformers makes the mask once for all layers if there are at least as many tokens as the
    window has; torch converts it to numbers in each attention. Later devices do not make it.
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
    """Channels of a token in the MLP: gate, up and product; with experts, of all chosen ones.

    Each chosen expert has copies of inputs and outputs. Rehearsed with Mixtral and Qwen3-MoE: 2.4
    hidden widths for each chosen expert, and 3.4 once.
    """
    dense = 3 * text.intermediate
    if text.moe is None:
        return dense
    moe = text.moe
    chosen = moe.experts_per_token * (6 * moe.intermediate + 5 * text.hidden) // 2
    return max(dense, chosen + 4 * text.hidden + 3 * moe.shared_intermediate)


class ModelCopy(LayeredCopy):
    """The bytes of one model copy on a group of GPUs; ``parts`` may be given if they are known.

    Raises:
        UsageError: Transformers does not serve the model.
    """

    def __init__(
        self,
        model: Model,
        dtype: str,
        gpus: Sequence[Gpu],
        margins: Sequence[int],
        parts: Components | None = None,
    ) -> None:
        self.model, self.dtype = model, dtype
        self.gpus, self.margins = tuple(gpus), tuple(margins)
        self.layout = layout_of(model)
        self.parts = parts or components(model, dtype)
        self._width = DTYPE_BYTES[dtype]
        #: The bytes of each CUDA context, and a note on the source of the figure.
        self.contexts = [context_bytes(gpu) for gpu in gpus]

    def writes_matrix(self, place: int) -> bool:
        """Whether attention on this card stores the matrix of all pairs.

        Torch's memory-efficient kernel does not accept grouped heads, and the flash kernel needs
        Ampere. A card of unknown capability counts as older; the result is then too high.
        """
        grouped = self.model.text.heads != self.model.text.kv_heads
        return grouped and capability_of(self.gpus[place], unknown=(0, 0)) < AMPERE

    def room(self, place: int) -> int:
        """Bytes of a card for weights, cache and activations, without others, context, margin."""
        gpu = self.gpus[place]
        fixed = self.contexts[place][0] + self.workspace(place) + self.rounding
        return gpu.usable - known(gpu.used, 0) - self.margins[place] - fixed

    def resident_bytes(self, place: int, devices: int) -> int:
        """Bytes of weights outside the decoder layers; a tied head is part of the embeddings."""
        parts = self.parts
        first = parts.vision + parts.embeddings if place == 0 else 0
        last = parts.norm + parts.head if place == devices - 1 else 0
        return first + last

    def vision(self, place: int, load: Load) -> int:
        """Bytes of the vision tower's forward on a device; the request's cache is then empty."""
        if place:
            return 0
        return self._rounded(vision_bytes(self.model, self.layout, load.units, self._width))

    def activations(self, place: int, load: Load, *, block: int = 0) -> dict[str, int]:
        """Alternatives besides a full cache; ``block``: bytes of an offloaded layer's weights."""
        model, width, matrix = self.model, self._width, self.writes_matrix(place)
        here = load if place == 0 else replace(load, units=0)
        prefill = prefill_bytes(model, here, width, writes_matrix=matrix)
        alternatives = {
            "prefill": prefill + block,
            "sampling": _SAMPLING * model.text.vocab + block,
        }
        if place == 0 and load.images and model.image_rule is not None:
            alternatives["image_features"] = _SCATTER * load.tokens * model.text.hidden * width
        return {name: self._rounded(size) for name, size in alternatives.items() if size}

    def staging(self) -> int:
        """Bytes that loading needs besides the weights if it casts them or joins experts.

        Transformers joins the experts of a layer into one tensor: torch was seen to hold
        additionally 1.0 to 1.5 times their bytes.
        """
        joined = _JOINED * self.parts.experts
        if self.dtype == self.model.dtype:
            return joined
        stored = DTYPE_BYTES[self.model.dtype]
        text = self.model.text
        largest = max(text.vocab, text.intermediate) * text.hidden * stored
        return joined + largest * _LOADERS

    def cached(self, layers: Sequence[Layer], load: Load) -> int:
        return self._rounded(sum(layer.kv(load.tokens, load.images) for layer in layers))

    def device_map(self, placement: Placement, host: int | None) -> dict[str, int | str]:
        """The device map with Transformers' module names.

        ``host`` is the host memory in bytes for offloaded layers; None: unknown. Layers that do not
        fit are read from disk for every token.
        """
        layout, parts, last = self.layout, self.parts, placement.devices - 1
        text, taken = layout.text, 0
        first = (*layout.first, f"{text}.embed_tokens", f"{text}.rotary_emb")
        mapping: dict[str, int | str] = dict.fromkeys(first, 0)
        for number, place in enumerate(placement.layers):
            taken += parts.layers[number].weights if place is None else 0
            away = "cpu" if host is None or taken <= host else "disk"
            mapping[f"{text}.layers.{number}"] = away if place is None else place
        mapping[f"{text}.norm"] = last
        mapping["lm_head"] = 0 if parts.tied else last
        return mapping

    @property
    def rounding(self) -> int:
        """Bytes of rounding, with the holes of joining experts: measured 0.3 of a layer's."""
        return _ROUNDING + self.parts.experts // 2

    def workspace(self, place: int) -> int:
        """The bytes of cuBLAS's workspaces on a card."""
        return _WORKSPACE[capability_of(self.gpus[place]) >= HOPPER]

    @staticmethod
    def _rounded(size: int) -> int:
        return -(-size * (100 + _FRAGMENTS_PERCENT) // 100)


class TightestCopy(ModelCopy):
    """One copy for all groups: the least room at each place; the matrix if one group stores it.

    It may hold too few layers: a group with more room at its first places could hold more there.
    """

    def __init__(self, copies: Sequence[LayeredCopy]) -> None:
        first = copies[0]
        super().__init__(first.model, first.dtype, first.gpus, (), first.parts)
        self._copies = tuple(copies)

    def room(self, place: int) -> int:
        return min(copy.room(place) for copy in self._copies)

    def writes_matrix(self, place: int) -> bool:
        return any(copy.writes_matrix(place) for copy in self._copies)
