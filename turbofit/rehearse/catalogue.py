"""Dimensions of published models, for header-only checkpoints.

From each model's ``config.json`` on its hub page; parameter counts computed from them
are checked in the tests against counts of the models' own classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["CATALOGUE", "Model", "Text", "Vision"]


@dataclass(frozen=True)
class Text:
    """A decoder: ``arch`` is internlm2, llama, qwen2 or qwen3."""

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

    @property
    def dim(self) -> int:
        """Elements of one head."""
        return self.head_dim or self.hidden // self.heads


@dataclass(frozen=True)
class Vision:
    """A vision tower: ``kind`` is internvit, internvit_hf, qwen2 or qwen2_5."""

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


@dataclass(frozen=True)
class Model:
    """A model: its decoder, its tower if any, and whether the decoder is AWQ (4 bit, group 128)."""

    name: str
    text: Text
    vision: Vision | None = None
    awq: bool = False
    dtype: str = "bfloat16"
    max_tiles: int = 12


_HF = "internvit_hf"
_VIT_300M = Vision("internvit", 1024, 24, 16, 4096)
_VIT_6B = Vision("internvit", 3200, 45, 25, 12800, qk_norm=True, qkv_bias=False, rms_norm=True)
_QWEN2_VIT = Vision("qwen2", 1280, 32, 16, 5120)
_QWEN2_5_VIT = Vision("qwen2_5", 1280, 32, 16, 3420, rms_norm=True)

_INTERNLM2_2B = Text("internlm2", 2048, 24, 16, 8, 8192, 92553)
_INTERNLM2_7B = Text("internlm2", 4096, 32, 32, 8, 14336, 92553)
_INTERNLM2_20B = Text("internlm2", 6144, 48, 48, 8, 16384, 92553)
_QWEN2_0_5B = Text("qwen2", 896, 24, 14, 2, 4864, 151655)
_YI_34B = Text("llama", 7168, 60, 56, 8, 20480, 64007, positions=4096, rope_theta=5e6)
_LLAMA3_70B = Text("llama", 8192, 80, 64, 8, 28672, 128265, positions=8192, rope_theta=5e5)
_QWEN2_1_5B = Text("qwen2", 1536, 28, 12, 2, 8960, 151936, tied=True)
_QWEN2_7B = Text("qwen2", 3584, 28, 28, 4, 18944, 152064)
_QWEN2_72B = Text("qwen2", 8192, 80, 64, 8, 29568, 152064)
_QWEN25_3B = Text("qwen2", 2048, 36, 16, 2, 11008, 151936, tied=True)
_QWEN3_8B = Text("qwen3", 4096, 36, 32, 8, 12288, 151936, head_dim=128, positions=40960)

_BASE = (
    Model("internvl2-1b", _QWEN2_0_5B, _VIT_300M),
    Model("internvl2-2b", _INTERNLM2_2B, _VIT_300M),
    Model("internvl2-8b", _INTERNLM2_7B, _VIT_300M),
    Model("internvl2-26b", _INTERNLM2_20B, _VIT_6B),
    Model("internvl2-40b", _YI_34B, _VIT_6B),
    Model("internvl2-76b", _LLAMA3_70B, _VIT_6B),
    Model("internvl3-1b", replace(_QWEN2_0_5B, vocab=151674), _VIT_300M),
    Model("internvl3-2b", replace(_QWEN2_1_5B, vocab=151674, tied=False), _VIT_300M),
    Model("internvl3-8b", replace(_QWEN2_7B, vocab=151674), _VIT_300M),
    Model("internvl3-8b-hf", replace(_QWEN2_7B, vocab=151674), replace(_VIT_300M, kind=_HF)),
    Model("internvl3-78b", replace(_QWEN2_72B, vocab=151674), _VIT_6B),
    Model("internvl3.5-8b", _QWEN3_8B, _VIT_300M),
    Model("qwen2-vl-2b", _QWEN2_1_5B, _QWEN2_VIT),
    Model("qwen2-vl-7b", _QWEN2_7B, _QWEN2_VIT),
    Model("qwen2-vl-72b", _QWEN2_72B, _QWEN2_VIT),
    Model("qwen2.5-vl-3b", _QWEN25_3B, _QWEN2_5_VIT),
    Model("qwen2.5-vl-7b", _QWEN2_7B, _QWEN2_5_VIT),
    Model("qwen2.5-vl-72b", _QWEN2_72B, replace(_QWEN2_5_VIT, inter=3456)),
    Model(
        "llama-2-7b",
        Text("llama", 4096, 32, 32, 32, 11008, 32000, positions=4096, rope_theta=1e4),
        dtype="float16",
    ),
    Model(
        "llama-3.1-8b",
        Text("llama", 4096, 32, 32, 8, 14336, 128256, positions=131072, rope_theta=5e5),
    ),
    Model("qwen2.5-0.5b", replace(_QWEN2_0_5B, vocab=151936, tied=True)),
    Model("qwen2.5-7b", _QWEN2_7B),
    Model("qwen3-8b", _QWEN3_8B),
    Model("internlm2.5-7b", replace(_INTERNLM2_7B, vocab=92544)),
)

_QUANTISED = (
    "internvl2-2b",
    "internvl2-8b",
    "internvl2-26b",
    "internvl2-40b",
    "internvl2-76b",
    "qwen2.5-7b",
)

CATALOGUE: dict[str, Model] = {m.name: m for m in _BASE} | {
    f"{m.name}-awq": replace(m, name=f"{m.name}-awq", awq=True, dtype="float16")
    for m in _BASE
    if m.name in _QUANTISED
}
