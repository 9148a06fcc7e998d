"""The dimensions from which a header-only checkpoint is written."""

from __future__ import annotations

from dataclasses import dataclass

from turbofit.core.model import AudioDims, MlaDims

__all__ = ["RehearsedDelta", "RehearsedExperts", "RehearsedModel", "RehearsedText", "Vision"]


@dataclass(frozen=True)
class RehearsedExperts:
    """Experts in place of the feed-forward network of each layer but the first ``dense`` ones.

    ``shared``: width of an expert of every token; ``correction``: biases that only choose experts.
    """

    count: int
    per_token: int
    inter: int
    dense: int = 0
    shared: int = 0
    correction: bool = False


@dataclass(frozen=True)
class RehearsedDelta:
    """Gated delta nets in place of attention: in all layers but each ``interval``-th."""

    interval: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int


@dataclass(frozen=True)
class RehearsedText:
    """A decoder: ``arch`` is a key of `model_config`'s architectures; ``mla`` of its DeepSeeks.

    ``drafting`` layers behind the others draft further tokens (GLM's and DeepSeek's MTP);
    ``fourier``, ``norm_bias`` and ``head_bias`` are `TextDims`'.
    """

    arch: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inter: int
    vocab: int
    head_dim: int | None = None
    tied: bool = False
    positions: int = 32768
    rope_theta: float = 1e6
    experts: RehearsedExperts | None = None
    mla: MlaDims | None = None
    qk_norm: bool = False
    delta: RehearsedDelta | None = None
    drafting: int = 0
    fourier: int = 0
    norm_bias: bool = False
    head_bias: bool = False

    @property
    def dim(self) -> int:
        """Elements of one head."""
        return self.head_dim or self.hidden // self.heads


@dataclass(frozen=True)
class Vision:
    """A vision tower: ``kind`` is internvit, internvit_hf, qwen2, qwen2_5, qwen3 or moonvit.

    ``deepstack``: projectors beside the last one (qwen3). ``audio``: an audio tower beside it,
    which makes it a Qwen-Omni's.
    """

    kind: str
    hidden: int
    layers: int
    heads: int
    inter: int
    qk_norm: bool = False
    qkv_bias: bool = True
    rms_norm: bool = False
    patch: int = 14
    image: int = 448
    deepstack: int = 0
    audio: AudioDims | None = None


@dataclass(frozen=True)
class RehearsedModel:
    """A model: its decoder, its tower if any, and how the decoder's linear layers are packed.

    ``packing``: awq (4 bits, groups of 128), fp8 (blocks of 128 x 128), mxfp4 (the experts of
    gpt_oss alone), compressed-tensors (4 bits, groups of 32, experts alone), or empty for 16 bits.
    ``architecture``: of config.json, where it is another name for a Qwen3.5 (Intern-S2).
    ``max_patches``: the budget of moonvit's images.
    ``intern_s1``: its tensors have Intern-S1's names, those of internvit_hf behind one prefix.
    """

    name: str
    text: RehearsedText
    vision: Vision | None = None
    packing: str = ""
    dtype: str = "bfloat16"
    max_tiles: int = 12
    max_patches: int = 16384
    intern_s1: bool = False
    architecture: str = ""
