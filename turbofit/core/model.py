"""The types of a model: its dimensions, its storage, and the source of both."""

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

#: The most repeats in an expression of a checkpoint; each repeat multiplies the time of a search.
_MOST_REPEATS: Final = 4
#: Names of a decoder's layers and their modules, but not of layers of a draft model or a tower.
_OF_LAYER: Final = r"(?:(?:model|language_model|llm)\.)*(layers\.\d{1,9}\b.*)"
#: Parts of names that, together, cover all linear layers of a decoder except its experts.
_BESIDE_EXPERTS: Final = ("self_attn", "shared_experts", "mlp")
#: The architectures of tower and projector; each has a file of its own in the families.
VisionKind = Literal[
    "internvit", "qwen2vit", "qwen2_5vit", "qwen3vit", "clip", "siglip", "eva_clip", "eva_clip_glm",
    "glm4v", "mllama", "gemma3", "phi3v", "llama4", "idefics3", "moonvit",
]  # fmt: skip
#: Bytes of one element of each unquantised dtype.
DTYPE_BYTES: Final[dict[str, int]] = {"float16": 2, "bfloat16": 2, "float32": 4}


class MoeDims(Struct):
    """Dimensions of the mixture of experts in a layer; ``layers`` is how many layers have experts.

    ``step``: one of every ``step`` successive layers may have experts. ``shared_gate``: a gate with
    one row weighs the shared expert. ``correction``: each expert has a bias of 32 bits,
    which affects only the choice of experts. ``router_bias``: each expert has a bias of the model's
    type, which is added to its score.
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
    """Dimensions of gated delta nets, which replace attention in ``layers`` layers.

    A sequence has a state of fixed size: the last ``kernel`` inputs of a convolution, and
    ``key_dim`` x ``value_dim`` numbers for each value head.
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
        """Channels of queries, keys and values together, which all pass the convolution."""
        return 2 * self.key_heads * self.key_dim + self.values


class MlaDims(Struct):
    """Dimensions of multi-head latent attention (MLA).

    All heads' keys and values come from one latent of ``kv_rank`` channels. The cache holds this
    latent and one key of ``rope_dim`` channels for all heads. Engines treat latent and key as one
    KV head of ``TextDims.head_dim`` channels. ``q_rank`` is the channels of the queries' latent, 0
    without a latent. In the checkpoint, a head's key has ``nope_dim`` + ``rope_dim`` channels, a
    head's value ``v_dim`` channels. ``expanded``: LMDeploy caches each head's keys and values in
    place of the latent.
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
    """Dimensions of the language model.

    ``architecture`` is the language model's own, ``architectures[0]`` of its config.
    ``layer_norms`` is how many norms over the hidden channels a layer has. ``vision_experts``: as
    in CogVLM, image tokens have their own set of linear layers; ``vision_expert_bias``: the layer
    for queries, keys and values in this set has biases. ``cross_layers`` are the numbers of layers
    that attend to the image alone; these layers cache tokens of the image, not of the prompt.
    ``delta`` describes layers without attention. ``output_gate``: queries have twice the channels;
    the second half gates the attention's output. ``mla`` describes attention to latents;
    ``kv_heads`` and ``head_dim`` then describe the heads in the engine's attention. ``mlp_bias``:
    linear layers of the MLP, and of experts, have biases. ``sinks``: each head has a learned value
    besides its scores. ``fourier`` is the number of frequencies that Fourier position encoding
    mixes for each KV head. ``norm_bias``: norms are layer norms with biases. ``sliding_window`` is
    the number of tokens that some layers look back; other layers look back to the first token. Only
    families that Transformers alone serves have ``sliding_window``. ``draft_layers`` is how many
    layers after the last one propose tokens (MTP), if the config says another number than 1.
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
    draft_layers: int | UnsetType = UNSET

    @property
    def window(self) -> int:
        """Tokens that layers with a sliding window look back; 0 without a sliding window."""
        return 0 if self.sliding_window is UNSET else self.sliding_window

    @property
    def cached_latent(self) -> MlaDims | None:
        """Dimensions of the cached latent; None if the cache holds keys and values."""
        return None if self.expands_latent else self.mla

    @property
    def expands_latent(self) -> bool:
        """Whether attention uses latents, while the cache holds keys and values."""
        return self.mla is not None and self.mla.expanded

    @property
    def attention_layers(self) -> int:
        """The number of layers with attention; layers with a gated delta net do not count."""
        return self.layers - (self.delta.layers if self.delta else 0)


class AudioDims(Struct):
    """Dimensions of an audio tower; engines always load the audio tower with the vision tower.

    Three convolutions of ``channels`` channels shrink ``mel_bins``. If ``channels`` is 0, the tower
    is as in Whisper: two convolutions along time into ``hidden`` channels, and keys without biases.
    ``positions`` is the number of position embeddings of 32 bits, which are not in the checkpoint.
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
        """Bytes of the position embeddings in GPU memory."""
        return self.positions * self.hidden * DTYPE_BYTES["float32"]


class VisionDims(Struct):
    """Dimensions of the vision tower and its projector.

    TurboMind has native encoders for ``internvit`` (CLS token, tiles of ``image_size``) and
    ``qwen2vit``/``qwen2_5vit`` (patches in windows of ``merge`` x ``merge``); torch runs all kinds.

    ``newline``: one learned token ends each line of an image. ``projector`` is the number of
    channels inside the projector, 0 if other dimensions decide this number. ``outputs`` is the
    number of hidden states that enter the projector side by side. Three fields are for ``mllama``
    alone: ``extra_layers`` are layers of a second stack, over all tiles; ``shapes`` is the number
    of aspect ratios with embeddings of their own; ``max_tiles`` is the most tiles of an image.
    ``deepstack`` (``qwen3vit``) is the number of projectors into the first layers of the language
    model. A plan counts only the weights of ``audio``.
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
        """Channels of one attention head in the checkpoint."""
        return self.hidden // self.heads


class Quantization(Struct):
    """How quantised linear layers are stored.

    ``group_size`` is the number of weights along the input that share a scale. ``unconverted`` are
    the modules that the config exempts: names of single layers, parts of names, or expressions
    behind ``re:``. ``asymmetric``: compressed-tensors stores zero points.
    """

    method: Literal["awq", "gptq", "fp8", "compressed-tensors", "mxfp4"]
    bits: int
    group_size: int
    unconverted: tuple[str, ...] = ()
    asymmetric: bool = False

    @property
    def of_experts(self) -> bool:
        """Whether only experts are quantised: with mxfp4, or if all other layers are exempt."""
        if self.method == "compressed-tensors":
            return all(any(word in name for name in self.unconverted) for word in _BESIDE_EXPERTS)
        return self.method == "mxfp4"

    def exempts(self, module: str, layer: int) -> bool:
        """Return whether a module of a layer is unquantised.

        ``module`` is the module's name in the layer, such as ``linear_attn.in_proj_z``.
        """
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
                raise UsageError(  # the expression repeats a group, or repeats too often
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
    """The source of a model's facts; ``sizes`` is the source of its sizes in bytes.

    ``estimate``: the sizes are of a preset of a similar model.
    """

    kind: Literal["folder", "hub_cache", "hub", "preset"]
    where: str
    sizes: Literal["file", "formula", "estimate"]
    checkpoint: str | None = None


class Adapter(Struct):
    """A LoRA adapter that is served together with the base, under its ``name``.

    ``modules`` are the last parts of the changed modules' names, such as ``q_proj``; each is
    changed in all layers, with this ``rank``. ``file_bytes`` are the bytes of the file's tensors,
    ``base`` is the base model that the adapter's config names. ``renamed``: LMDeploy cannot read
    the names in the files, so engines open a copy with other names.
    """

    name: str
    path: str
    rank: int
    modules: tuple[str, ...]
    file_bytes: int
    base: str = ""
    renamed: bool = False


class Draft(Struct):
    """A model that proposes ``tokens`` tokens, which the base then checks in one forward.

    ``algorithm`` is LMDeploy's name of the draft's class. ``text`` has the dimensions of its
    decoder. ``head_rows`` are the rows of its own head; 0: the draft uses the base's head.
    ``embeds``: its file has embeddings; else the draft uses the base's embeddings. ``path`` is
    empty if the draft is layers of the base's own checkpoint (MTP).
    """

    algorithm: str
    path: str
    tokens: int
    text: TextDims
    head_rows: int = 0
    embeds: bool = True

    @property
    def is_own(self) -> bool:
        """Whether the draft is layers of the base's checkpoint, which ranks divide as the base."""
        return not self.path


class Model(Struct):
    """A checkpoint as planning sees it; sizes in bytes.

    ``dtype`` is the 16- or 32-bit type of the unquantised tensors in the files. ``tensor_bytes``
    are the bytes in the files for each safetensors dtype (such as ``BF16``); empty if the sizes
    come from a formula. ``needs_remote_code``: the engine needs remote code for tokenizer,
    processor or config. ``thinks``: by its chat template, the model thinks before it answers.
    ``revision`` is the branch, tag or commit that was asked for. The PyTorch
    engine loads ``adapters`` and ``draft`` together with the model.
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
    thinks: bool = False
    hub_id: str | None = None
    revision: str | None = None
    source: ModelSource
    warnings: tuple[str, ...] = ()
    adapters: tuple[Adapter, ...] | UnsetType = UNSET
    draft: Draft | UnsetType = UNSET

    def __hash__(self) -> int:
        """Return a hash of few fields: a search asks often about one model."""
        return hash((self.name, self.weight_bytes, self.architecture))

    @property
    def loras(self) -> tuple[Adapter, ...]:
        """The adapters; empty if the document names no adapter."""
        return () if self.adapters is UNSET else self.adapters

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
        """Return the number of vectors that tower and projector make of ``units``.

        0 if the model takes no images.
        """
        return 0 if self.image_rule is None else self.image_rule.features(units)

    @property
    def unit_tower_tokens(self) -> int:
        """Tokens that the tower processes for one unit.

        A patch is one token. A tile has one token for each of its patches, and one more token.
        """
        if self.image_rule is None or self.vision is None:
            return 1
        return self.image_rule.tower_tokens(self.vision.patch_size)
