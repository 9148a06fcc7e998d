"""The types of a model: its dimensions, its storage, and where its facts come from."""

from __future__ import annotations

import re
from contextlib import suppress
from functools import cache
from typing import Final, Literal

import msgspec
from msgspec import UNSET, UnsetType

from turbofit.core.errors import UsageError
from turbofit.core.images import AnyImageRule
from turbofit.core.struct import Struct

Dtype = Literal["float16", "bfloat16", "float32"]

#: The most repeats in an expression of a checkpoint; each one multiplies the time of a search.
_MOST_REPEATS: Final = 4
#: The name of a decoder's layer or of a module in it, but not of a draft model or a tower.
_OF_LAYER: Final = r"(?:(?:model|language_model|llm)\.)*(layers\.\d{1,9}\b.*)"
#: Parts of names that, together, cover all linear layers of a decoder except its experts.
_BESIDE_EXPERTS: Final = ("self_attn", "shared_experts", "mlp")


class MoeDims(Struct):
    """Mixture of experts of a layer; ``layers`` counts the layers that have experts.

    ``step``: one layer in so many may have them. ``shared_gate``: a gate of one row weighs the
    shared expert. ``correction``: a bias of 32 bits an expert for the choice alone;
    ``router_bias``: one of the model's type for the scores.
    """

    experts: int
    experts_per_token: int
    intermediate: int
    layers: int
    shared_intermediate: int = 0
    step: int = 1
    shared_gate: bool = True
    correction: bool = False
    router_bias: bool = False


class DeltaDims(Struct):
    """Gated delta nets in place of attention, in so many ``layers``.

    A sequence has a state of one size: the last ``kernel`` inputs of a convolution, and ``key_dim``
    x ``value_dim`` for each value head.
    """

    layers: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    @property
    def values(self) -> int:
        """Channels of all value heads."""
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Channels of queries, keys and values together; the convolution processes them all."""
        return 2 * self.key_heads * self.key_dim + self.values


class MlaDims(Struct):
    """Multi-head latent attention: all heads' keys and values are one latent of ``kv_rank``.

    The cache holds the latent and one key of ``rope_dim`` channels for all heads; engines attend to
    them as to one KV head of ``TextDims.head_dim`` channels. ``q_rank`` is that of the queries'
    latent, 0 without one. As stored, a head's keys have ``nope_dim`` channels more, and its values
    ``v_dim``. ``expanded``: LMDeploy caches each head's keys and values in place of the latent.
    """

    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    q_rank: int = 0
    expanded: bool = False

    @property
    def key_dim(self) -> int:
        """Channels of a head's key in LMDeploy's cache and attention."""
        return (self.nope_dim if self.expanded else self.kv_rank) + self.rope_dim


class TextDims(Struct):
    """Dimensions of the language model; ``architecture`` is its own ``architectures[0]``.

    ``layer_norms`` counts the norms of a layer over the hidden channels. ``vision_experts`` is
    CogVLM's second set of linear layers for image tokens, of which the one for queries, keys and
    values has biases where ``vision_expert_bias``. ``cross_layers``, within ``layers``, attend to
    the image alone: they cache its tokens, not the prompt's. ``delta``: layers without attention.
    ``output_gate``: queries have as many channels more, which gate the attention's output. ``mla``:
    attention to latents, where ``kv_heads`` and ``head_dim`` are what the engine attends to.
    ``mlp_bias`` is that of experts too. ``sinks``: each head has a learned value beside its scores.
    ``fourier``: frequencies that Fourier position encoding mixes for each KV head. ``norm_bias``:
    norms are layer norms with biases. ``sliding_window``: tokens that layers look back, where not
    all look back to the first; read of the families that Transformers serves alone.
    """

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    moe: MoeDims | None = None
    layer_norms: int = 2
    vision_experts: bool = False
    vision_expert_bias: bool = False
    cross_layers: tuple[int, ...] = ()
    delta: DeltaDims | None = None
    output_gate: bool = False
    mla: MlaDims | None = None
    sinks: bool = False
    fourier: int = 0
    norm_bias: bool = False
    head_bias: bool = False
    sliding_window: int | UnsetType = UNSET

    @property
    def window(self) -> int:
        """Tokens that layers with a sliding window look back; 0 if no layer has one."""
        return 0 if self.sliding_window is UNSET else self.sliding_window

    @property
    def cached_latent(self) -> MlaDims | None:
        """The latent that the cache holds; None if it holds keys and values."""
        return None if self.expands_latent else self.mla

    @property
    def expands_latent(self) -> bool:
        """Whether attention uses latents, while the cache holds keys and values."""
        return self.mla is not None and self.mla.expanded

    @property
    def attention_layers(self) -> int:
        """Layers with attention: all but those with a gated delta net."""
        return self.layers - (self.delta.layers if self.delta else 0)


#: The architecture of tower and projector, one family file each.
VisionKind = Literal[
    "internvit", "qwen2vit", "qwen2_5vit", "qwen3vit", "clip", "siglip", "eva_clip", "eva_clip_glm",
    "glm4v", "mllama", "gemma3", "phi3v", "llama4", "idefics3", "moonvit",
]  # fmt: skip


class AudioDims(Struct):
    """Dimensions of an audio tower, loaded beside the vision tower whether or not it is used.

    Three convolutions of ``channels`` shrink ``mel_bins``; where ``channels`` is 0, two along time
    into ``hidden`` channels as in Whisper, whose keys have no biases. ``positions`` take 32 bits,
    and the checkpoint has none.
    """

    layers: int
    hidden: int
    heads: int
    intermediate: int
    channels: int = 0
    mel_bins: int
    positions: int

    @property
    def position_bytes(self) -> int:
        """Bytes of the positions in GPU memory."""
        return self.positions * self.hidden * DTYPE_BYTES["float32"]


class VisionDims(Struct):
    """Dimensions of the vision tower and its projector.

    TurboMind has native encoders for ``internvit`` (CLS token, tiles of ``image_size``) and
    ``qwen2vit``/``qwen2_5vit`` (patches in windows of ``merge`` x ``merge``); torch runs all kinds.

    ``newline``: a learned row of the language model's channels ends each line of an image.
    ``projector``: channels inside the projector, where a family's own figure decides them.
    ``outputs``: how many hidden states, side by side, enter the projector. Of ``mllama``:
    ``extra_layers``, a second stack over all tiles; ``shapes``, aspect ratios with embeddings of
    their own; ``max_tiles`` of one. ``deepstack``: further projectors, into the first layers of the
    language model (``qwen3vit``). ``audio`` is planned for by its weights alone.
    """

    kind: VisionKind
    layers: int
    hidden: int
    heads: int
    intermediate: int
    patch_size: int
    image_size: int | None = None
    channels: int = 3
    temporal_patch: int = 1
    merge: int = 2
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    qkv_bias: bool = True
    qk_norm: bool = False
    gated_mlp: bool = False
    newline: bool = False
    projector: int = 0
    outputs: int = 1
    extra_layers: int = 0
    shapes: int = 0
    max_tiles: int = 1
    deepstack: int = 0
    audio: AudioDims | None = None

    @property
    def head_dim(self) -> int:
        """Channels of one attention head, as stored."""
        return self.hidden // self.heads


class Quantization(Struct):
    """How quantised linear layers are stored; ``group_size`` in elements along the input.

    ``unconverted`` are the modules that the config exempts: names of single layers, parts of names,
    or expressions behind ``re:``. ``asymmetric``: compressed-tensors stores zero points.
    """

    method: Literal["awq", "gptq", "fp8", "compressed-tensors", "mxfp4"]
    bits: int
    group_size: int
    unconverted: tuple[str, ...] = ()
    asymmetric: bool = False

    @property
    def of_experts(self) -> bool:
        """Whether only experts are quantised, as with mxfp4, or if all else is exempt."""
        if self.method == "compressed-tensors":
            return all(any(word in name for name in self.unconverted) for word in _BESIDE_EXPERTS)
        return self.method == "mxfp4"

    def exempts(self, module: str, layer: int) -> bool:
        """Return whether a module of a layer, as ``linear_attn.in_proj_z``, stays unquantised."""
        patterns, parts = _exempted(self.unconverted)
        name = f"model.language_model.layers.{layer}.{module}"
        return any(pattern.search(name) for pattern in patterns) or any(
            part in f"{name}." for part in parts
        )


@cache
def _exempted(names: tuple[str, ...]) -> tuple[list[re.Pattern[str]], list[str]]:
    """Sort names of exempt modules into regular expressions and parts of names."""
    patterns, parts = [], []
    for name in filter(None, names):
        if of_layer := re.fullmatch(_OF_LAYER, name):
            parts.append(f".{of_layer[1].rstrip('.')}.")
        elif name.startswith("re:"):
            text = name[3:]
            if re.search(r"\)[*+{]", text) or len(re.findall(r"[*+{]", text)) > _MOST_REPEATS:
                raise UsageError(  # it repeats a group, or repeats too often
                    f"quantization_config exempts layers by the expression {text[:80]!r}, which may"
                    " take for ever",
                    hint="name the layers in the checkpoint's config.json",
                )
            with suppress(re.error):
                patterns.append(re.compile(text))
        else:
            parts.append(name)
    return patterns, parts


class ModelSource(Struct):
    """Where the facts come from, and the sizes: ``estimate`` are those of a preset like it."""

    kind: Literal["folder", "hub_cache", "hub", "preset"]
    where: str
    sizes: Literal["file", "formula", "estimate"]
    checkpoint: str | None = None


class Model(Struct):
    """A checkpoint as planning sees it; sizes in bytes.

    ``dtype`` is the 16- or 32-bit type of the unquantised tensors as stored. ``tensor_bytes`` are
    bytes as stored by safetensors dtype (``BF16``, ``I32``, …), empty where only a formula is
    known. ``needs_remote_code``: the engine cannot do without remote code of tokenizer, processor
    or config. ``revision`` is the branch, tag or commit asked for.
    """

    name: str
    architecture: str
    parameters: int
    weight_bytes: int
    dtype: Dtype
    text: TextDims
    vision: VisionDims | None = None
    image_rule: AnyImageRule | None = None
    quantization: Quantization | None = None
    tensor_bytes: dict[str, int] = msgspec.field(default_factory=dict)
    needs_remote_code: bool = False
    hub_id: str | None = None
    revision: str | None = None
    source: ModelSource
    warnings: tuple[str, ...] = ()

    @property
    def unit_values(self) -> int:
        """The number of values in one unit's preprocessed pixels; 0 without a vision tower."""
        if self.image_rule is None or self.vision is None:
            return 0
        return self.image_rule.unit_values(self.vision.channels, self.vision.temporal_patch)

    def pixel_bytes(self, units: int) -> int:
        """Return the bytes of the preprocessed pixels of ``units`` at 16 bits."""
        return units * self.unit_values * DTYPE_BYTES["float16"]

    @property
    def mrope(self) -> bool:
        """Whether each token has a position in time, height and width (M-RoPE)."""
        return self.image_rule is not None and self.image_rule.mrope

    def features(self, units: int) -> int:
        """Return how many rows for the language model tower and projector make of ``units``."""
        return 0 if self.image_rule is None else self.image_rule.features(units)

    @property
    def unit_tower_tokens(self) -> int:
        """Tokens that the tower processes for one unit: 1 for a patch; a tile's patches and 1."""
        if self.image_rule is None or self.vision is None:
            return 1
        return self.image_rule.tower_tokens(self.vision.patch_size)


#: Bytes of one element of each unquantised dtype.
DTYPE_BYTES: Final[dict[str, int]] = {"float16": 2, "bfloat16": 2, "float32": 4}
